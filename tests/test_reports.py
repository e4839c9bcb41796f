"""Reports: pure functions of records. A committed mini-sweep pins every format."""

import csv
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dropkey.errors import ConfigError
from dropkey.plotting import COLORS, GREY
from dropkey.records import RunDirectory
from dropkey.reproduction import content, pictures, record_file, report, results, sentences, tables, versions
from dropkey.reproduction.comparison import Comparison, compare
from dropkey.reproduction.jobs import Job, composed

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "table"  # regenerate: python tests/golden/make.py table
PICTURES = ("forest.svg", "curves.svg", "entropy.svg", "claims.svg", "tuning.svg")
FORMATS = ("report.md", "report.tex", "report.csv", "report.json", "report.html", *PICTURES)
DRAWN = dict.fromkeys(PICTURES, "<svg/>")
RESULTS = sorted((ROOT / "results").glob("*/records.jsonl"))


def changed(**changes):
    """The golden table, head and records, the records changed by `changes`: a function of a record for each key."""
    table = tables.load(str(GOLDEN / "mini.yaml"), "smoke")
    table, head, found = results.read(GOLDEN / "records.jsonl", table)
    return table, head, [{**entry, **{key: change(entry) for key, change in changes.items()}} for entry in found]


def golden_comparison() -> Comparison:
    table, head, found = changed()
    return compare(table, head, found, versions.require_one_version(head, found, mixed=False))


def markdown(comparison: Comparison) -> str:
    return report.markdown(comparison, DRAWN)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    report.write(golden_comparison(), directory)
    return directory


# ----------------------------------------------------------------------------------------------- bytes, records


@pytest.mark.parametrize("name", FORMATS)
def test_the_mini_sweep_gives_exactly_the_committed_report(name, written):
    assert (written / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_committed_results_are_what_their_records_say(file, tmp_path):
    name, scale = file.parent.name.rsplit("-", 1)
    table, head, found = results.read(file, tables.load(name, scale))
    report.write(compare(table, head, found, versions.require_one_version(head, found, mixed=False)), tmp_path)
    for written in sorted(tmp_path.iterdir()):
        assert written.read_bytes() == (file.parent / written.name).read_bytes(), written.name


def test_records_survive_writing_and_reading(tmp_path):
    table, head, found = changed()
    record_file.write(tmp_path / "r.jsonl", head, found)
    assert results.read(tmp_path / "r.jsonl", table) == (table, head, found)


def test_records_of_another_table_are_refused():
    with pytest.raises(ConfigError, match="records of table=mini scale=smoke, not of table=schedule scale=cpu"):
        results.read(GOLDEN / "records.jsonl", tables.load("schedule", "cpu"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json", '{"table": "mini"}'], ids=str)
def test_a_file_without_records_is_refused(text, tmp_path):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="has no records of a table"):
        results.read(tmp_path / "r.jsonl", tables.load(str(GOLDEN / "mini.yaml"), "smoke"))


@pytest.fixture(scope="module")
def recorded():
    """(head, settings of the golden table now)"""
    table, head, _ = changed()
    return head, results.settings(table, results.jobs_of(table, "runs"))


@pytest.mark.parametrize("key", json.loads((GOLDEN / "records.jsonl").open().readline())["settings"]["shared"])
def test_records_made_with_another_default_are_refused(key, recorded):
    head, now = recorded
    now = {place: {**keys, key: "changed"} for place, keys in now.items()}
    message = f"was run with {key}={head['settings']['shared'][key]}, now it is changed; run the table again"
    with pytest.raises(ConfigError, match=re.escape(message)):
        results.require_same_settings(Path("r.jsonl"), head, now)


def test_a_key_that_is_gone_is_refused_and_a_new_one_is_not(recorded):
    head, now = recorded
    results.require_same_settings(Path("r.jsonl"), head, {place: {**keys, "new": 1} for place, keys in now.items()})
    without = {place: {k: v for k, v in keys.items() if k != "optim.lr"} for place, keys in now.items()}
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.002, now it is not a key"):
        results.require_same_settings(Path("r.jsonl"), head, without)


def mini_with(tmp_path: Path, old: str, new: str) -> tables.Table:
    (tmp_path / "mini.yaml").write_text((GOLDEN / "mini.yaml").read_text().replace(old, new))
    return tables.load(str(tmp_path / "mini.yaml"), "smoke")


def test_records_whose_row_has_changed_since_are_refused(tmp_path):
    table = mini_with(tmp_path, "regularizer.ratio=0.3 schedule=constant", "regularizer.ratio=0.4 schedule=constant")
    with pytest.raises(ConfigError, match=r"row 'DropKey, constant', .* with regularizer\.ratio=0\.3, now it is 0\.4"):
        results.read(GOLDEN / "records.jsonl", table)


def test_records_made_without_an_override_of_the_command_are_refused():
    table = tables.load(str(GOLDEN / "mini.yaml"), "smoke", overrides=("trainer.epochs=7",))
    with pytest.raises(ConfigError, match=r"with trainer\.epochs=25, now it is 7"):
        results.read(GOLDEN / "records.jsonl", table)


def renamed(tmp_path: Path) -> Comparison:
    """From the golden records, after a row of the table and its claim were renamed."""
    text = (GOLDEN / "mini.yaml").read_text()
    text = text.replace("  Dropout: reg", "  Another: reg").replace("decreasing > Dropout", "decreasing > Another")
    (tmp_path / "mini.yaml").write_text(text)
    table, head, found = results.read(GOLDEN / "records.jsonl", tables.load(str(tmp_path / "mini.yaml"), "smoke"))
    return compare(table, head, found, [])


def test_after_a_row_was_renamed_the_others_are_reported_and_it_is_named(tmp_path):
    text = markdown(renamed(tmp_path))
    assert "- row 'Dropout', column 'ViT 2 x 32' of " in text and "is no longer in the table" in text
    assert "- Another, seed 0, 1, 2, 3: missing: no intact record in " in text
    assert "| DropKey, decreasing | 61.49 ± 4.41 (4) |" in text


def test_a_claim_that_was_renamed_is_told_as_a_changed_plan(tmp_path):
    text = markdown(renamed(tmp_path))
    assert "The plan was changed after results had been seen: before, it had claims" in text
    line = next(line for line in text.splitlines() if line.startswith("| DropKey, decreasing > Another"))
    assert line.endswith("| not yet: 0 of the 3 planned seeds finished |")


def test_plan_and_report_import_no_torch():
    program = (
        "import sys; sys.argv = ['x']; import runpy; module = runpy.run_path('scripts/reproduce.py');"
        "from dropkey.reproduction import slurm, study;"
        "print([name for name in ('torch', 'timm', 'torchvision', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------ what it says


def test_cells_that_are_not_finished_say_how_many_are(written):
    text = (written / "report.md").read_text()
    assert re.search(r"\| DropKey, constant \| [\d.]+ ± [\d.]+ \(3/4\) \|", text)
    assert "- DropKey, constant, seed 2: diverged: loss nan" in text


def test_an_unfinished_cell_is_compared_over_the_seeds_it_has():
    cell = golden_comparison().cells["DropKey, constant", "ViT 2 x 32"]
    assert cell.to_baseline.n == 3


def test_what_the_paper_does_not_tell_is_not_known(written):
    line = next(line for line in (written / "report.md").read_text().splitlines() if line.startswith("| Dropout"))
    assert line.endswith("| not known |")


def test_ours_is_named_for_what_it_is(written):
    text = (written / "report.md").read_text()
    assert "ours: ViT 2 x 32" in text and "digits, 8 px, 480 training samples" in text


def test_a_row_that_is_trained_in_another_way_is_named_beside_the_baselines_training():
    table, head, found = changed(facts=lambda entry: "digits, 9 epochs" if entry["row"] == "Dropout" else "digits")
    rows = {**table.rows, "Dropout": tables.Row("Dropout", of="DropKey")}
    text = sentences.about(compare(dataclasses.replace(table, rows=rows), head, found, []))
    assert "ViT 2 x 32: digits; 'Dropout': digits, 9 epochs, starting from the runs of 'DropKey'." in text


def rows_of(comparison: Comparison) -> dict[str, list[str]]:
    return {label: line for label, *line in content.recipes(comparison)[1]}


def test_the_report_states_regularizer_ratio_and_overrides_of_every_row(written):
    found = rows_of(golden_comparison())
    assert found["no regularizer"] == ["none", "–", "regularizer=none"]
    line = "regularizer=dropkey regularizer.ratio=0.3 schedule="
    assert found["DropKey, decreasing"] == ["dropkey", "0.3 → 0", f"{line}decreasing"]
    assert found["DropKey, constant"] == ["dropkey", "0.3", f"{line}constant"]
    assert found["best DropKey"] == [
        "dropkey",
        "0 → 0.3",
        "regularizer=dropkey schedule=increasing regularizer.ratio=0.3",
    ]
    text = (written / "report.md").read_text()
    assert "| Dropout | dropout | 0.3 → 0 | regularizer=dropout" in text
    assert "In every row of 'ViT 2 x 32': `experiment=digits_few`." in text


def test_a_row_made_from_another_names_it_and_one_that_waits_for_tuning_says_so():
    table, head, found = changed()
    tuned = tables.Row("tuned", of="DropKey, constant", overrides=("regularizer=none", "trainer.epochs=5"))
    averaged = tables.Row("averaged", of="Dropout", evaluate=("eval.monte_carlo=4",))
    rows = {**table.rows, "tuned": tuned, "averaged": averaged}
    lines = rows_of(compare(dataclasses.replace(table, rows=rows, chosen={}), head, found, []))
    assert lines["tuned"][2] == "regularizer=none trainer.epochs=5; starts from the runs of 'DropKey, constant'"
    assert lines["averaged"][2] == "eval.monte_carlo=4; starts from the runs of 'Dropout'"
    assert lines["best DropKey"][2] == "best of 2 candidates, not known yet"


def with_rows(count: int) -> Comparison:
    """The golden table with copies of a row, `count` rows in all."""
    table, head, found = changed()
    names = [f"copy {i}" for i in range(count - len(table.rows))]
    copies = {name: dataclasses.replace(table.rows["Dropout"], label=name) for name in names}
    found = found + [{**entry, "row": name} for name in names for entry in found if entry["row"] == "Dropout"]
    return compare(dataclasses.replace(table, rows={**table.rows, **copies}), head, found, [])


def figure_of(draw, comparison: Comparison, monkeypatch):
    """The figure that a function of pictures.py saves."""
    monkeypatch.setattr(pictures, "save", lambda figure: figure)
    figure = draw(comparison)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("draw", [pictures.curves, pictures.entropy])
def test_many_rows_are_small_multiples_beside_the_baseline(draw, monkeypatch):
    comparison = with_rows(9)
    axes = figure_of(draw, comparison, monkeypatch).get_axes()
    rows = [row for row in comparison.table.rows if row != "no regularizer"]
    assert [axis.get_title(loc="left") for axis in axes] == rows * (2 if draw is pictures.curves else 1)
    for axis in axes:
        lines = [line for line in axis.lines if line.get_linestyle() == "-"]
        assert [line.get_color() for line in lines] == [GREY, COLORS[0]]


@pytest.mark.parametrize("draw", [pictures.curves, pictures.entropy])
def test_few_rows_share_a_panel_in_different_colours(draw, monkeypatch):
    comparison = golden_comparison()
    rows = dict(list(comparison.table.rows.items())[:4])
    comparison = dataclasses.replace(comparison, table=dataclasses.replace(comparison.table, rows=rows))
    figure = figure_of(draw, comparison, monkeypatch)
    assert len({line.get_color() for line in figure.get_axes()[0].lines}) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(rows)


@pytest.mark.parametrize("rows", [4, 5])
def test_bars_of_entropy_stay_between_0_and_1(rows, monkeypatch):
    table, head, found = changed(
        heads=lambda entry: [[entry["seed"] % 2 * 1.0] * 2, [0.99 + 0.01 * (entry["seed"] % 2)] * 2]
    )
    table = dataclasses.replace(table, rows=dict(list(table.rows.items())[:rows]), claims=())
    figure = figure_of(pictures.entropy, compare(table, head, found, []), monkeypatch)
    ends = [
        point[1]
        for axis in figure.get_axes()
        for bars in axis.collections
        for line in bars.get_segments()
        for point in line
    ]
    assert ends and all(0 <= end <= 1 for end in ends)


def test_attentions_of_encoder_and_decoder_have_lines_of_their_own(monkeypatch):
    """Layers in forward order: the encoder's, then self- and cross-attention of each layer of the decoder."""
    kinds = [("encoder", "self"), ("decoder", "self"), ("decoder", "cross"), ("decoder", "self"), ("decoder", "cross")]
    layers = [{"stack": stack, "kind": kind} for stack, kind in kinds]
    table, head, found = changed(heads=lambda r: [[0.1], [0.2], [0.3], [0.4], [0.5]], layers=lambda r: layers)
    axis = figure_of(pictures.entropy, compare(table, head, found, []), monkeypatch).axes[0]
    lines = [list(bars.lines[0].get_ydata()) for bars in axis.containers]
    assert lines[:3] == [[0.1], pytest.approx([0.2, 0.4]), pytest.approx([0.3, 0.5])] and len(lines) % 3 == 0
    ticks = [label.get_text() for label in axis.get_xticklabels()]
    assert ticks == ["1\nencoder\nself", "1\ndecoder\nself", "2", "1\ndecoder\ncross", "2"]


def test_every_claim_has_a_verdict_with_its_rule(written):
    text = (written / "report.md").read_text()
    for claim in golden_comparison().table.claims:
        assert re.search(rf"\| {claim} \|.*\| (better|worse|equivalent|not decided)[^|]* \|", text)
    assert "Holm's correction over all 4 planned claims and after one for the looks" in text


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {str(found.claim): content.verdict(comparison, found) for found in comparison.findings}


def with_values(values: dict[str, tuple[float, ...]]) -> Comparison:
    """The golden table with these values of four seeds for each row, all finished."""
    table, head, found = changed(top1=lambda entry: values[entry["row"]][entry["seed"]])
    found = [{**found[0], **entry, "state": "done"} for entry in found]
    return compare(table, head, [{k: v for k, v in entry.items() if k != "correct"} for entry in found], [])


SPREAD = (0.0, 0.1, 0.2, 0.15, 0.05)
LEVELS = {"no regularizer": 50, "DropKey, decreasing": 60, "DropKey, constant": 50, "Dropout": 70, "best DropKey": 50}
LEVELED = {  # rows at LEVELS, each with another small noise
    row: tuple(level + SPREAD[(seed + number) % 5] for seed in range(4))
    for number, (row, level) in enumerate(LEVELS.items())
}


def test_a_clear_difference_is_better_or_worse_and_noise_is_not_decided():
    found = verdicts(with_values(LEVELED))
    assert found["DropKey, decreasing > DropKey, constant"] == "better"
    assert found["DropKey, decreasing > Dropout"] == "worse"
    noise = [(50, 53, 49, 52), (52, 49, 51, 50), (49, 52, 51, 53), (51, 50, 53, 48), (53, 48, 52, 50)]
    found = verdicts(with_values(dict(zip(LEVELS, noise, strict=True))))
    assert all(
        re.fullmatch(r"not decided \(a true [\d.]+ would be found in 4 of 5 studies\)", text) for text in found.values()
    )


def test_rows_that_differ_by_less_than_the_margin_are_equivalent():
    assert verdicts(with_values(LEVELED))["best DropKey > no regularizer"] == "equivalent, within 2"


def test_a_claim_about_several_rows_is_about_their_mean():
    comparison = with_values(LEVELED)
    found = next(found for found in comparison.findings if str(found.claim) == "DropKey > no regularizer")
    means = {row: sum(values) / 4 for row, values in LEVELED.items()}
    expected = (means["DropKey, decreasing"] + means["DropKey, constant"]) / 2 - means["no regularizer"]
    assert found.difference.mean == pytest.approx(expected)


def test_before_the_first_look_there_is_no_verdict_whatever_the_difference():
    comparison = with_values(LEVELED)
    records = [entry for entry in comparison.records if entry["seed"] < 2]
    early = compare(comparison.table, comparison.head, records, [])
    assert set(verdicts(early).values()) == {"not yet: 2 of the 3 planned seeds finished"}
    assert "| better |" not in markdown(early)


def test_a_look_waits_for_all_its_runs():
    comparison = with_values(LEVELED)
    records = [{**entry, "state": "interrupted"} if entry["seed"] == 1 else entry for entry in comparison.records]
    found = verdicts(compare(comparison.table, comparison.head, records, []))
    assert set(found.values()) == {"not yet: 1 of the 3 planned seeds finished"}


def test_seeds_beyond_the_plan_do_not_count_for_a_verdict():
    comparison = with_values(LEVELED)
    table = dataclasses.replace(comparison.table, design=tables.Design(seeds=(0, 1, 2), looks=(3,)))
    found = compare(table, comparison.head, comparison.records, []).findings[0]
    assert (found.decision.estimate.n, found.difference.n) == (3, 4)


def test_a_table_of_two_seeds_decides_nothing():
    comparison = with_values(LEVELED)
    table = dataclasses.replace(comparison.table, design=tables.Design(seeds=(0, 1), looks=(2,)))
    records = [entry for entry in comparison.records if entry["seed"] < 2]
    found = verdicts(compare(table, comparison.head, records, []))
    assert set(found.values()) == {"not yet: 2 seeds decide nothing"}


def test_a_diverged_run_counts_at_its_worst_in_a_line_of_its_own():
    comparison = with_values(LEVELED)
    lost = ("DropKey, decreasing", 1)
    records = [
        {**entry, "state": "diverged"} if (entry["row"], entry["seed"]) == lost else entry
        for entry in comparison.records
    ]
    found = compare(comparison.table, comparison.head, records, []).findings[0]
    assert found.difference.n == 3 and found.difference.mean == pytest.approx(10, abs=0.3)
    assert found.worst.n == 4 and found.worst.mean == pytest.approx(7.5, abs=0.3)  # 50, the worst, stands in for 60
    assert comparison.findings[0].worst is None


def at_paper_scale(published: float) -> set[str]:
    comparison = with_values(LEVELED)
    known = {next(iter(comparison.table.columns)): published}
    table = dataclasses.replace(comparison.table, scale="paper", published=known)
    return set(verdicts(compare(table, comparison.head, comparison.records, [])).values())


def test_at_paper_scale_a_verdict_needs_the_published_baseline():
    assert "better" in at_paper_scale(50.3)
    assert at_paper_scale(50.6) == {"not yet: 'no regularizer' in 'ViT 2 x 32' is not within 0.3 of the published 50.6"}


def test_at_paper_scale_there_is_no_verdict_where_no_baseline_is_published():
    comparison = with_values(LEVELED)
    table = dataclasses.replace(comparison.table, scale="paper")
    found = verdicts(compare(table, comparison.head, comparison.records, []))
    assert set(found.values()) == {"not yet: no published baseline is known for 'ViT 2 x 32'"}


def test_a_plan_that_was_changed_after_results_were_seen_is_told():
    table, head, found = changed()
    earlier = {**head["design"], "seeds": [0, 1, 2], "looks": [3]}
    text = markdown(compare(table, {**head, "earlier_designs": [earlier]}, found, []))
    assert "The plan was changed after results had been seen: before, it had seeds 0, 1 and 2; looks 3.**" in text


def test_the_hash_of_the_protocol_is_in_the_report():
    table, head, found = changed()
    table = dataclasses.replace(table, protocol="docs/protocol.md")
    digest = hashlib.sha256((ROOT / "docs" / "protocol.md").read_bytes()).hexdigest()[:10]
    assert results.protocol_hash(table) == digest
    text = markdown(compare(table, {**head, "protocol": digest}, found, []))
    assert f"The study follows `docs/protocol.md` (hash `{digest}`)" in text and "changed since" not in text
    text = markdown(compare(table, {**head, "protocol": "0123456789"}, found, []))
    assert "hash `0123456789`" in text and f"The protocol was changed since, to hash `{digest}`" in text


def noise(column: str, entry: dict) -> float:
    return 0.1 * ((entry["seed"] * 7 + len(entry["row"])) % 3) * (column == "b")


def two_columns(shift: float) -> Comparison:
    """The golden table with a second column, where DropKey, decreasing is better by `shift` more."""
    comparison = with_values(LEVELED)
    table = dataclasses.replace(comparison.table, columns={"a": (), "b": ()})
    records = [
        {**entry, "column": column, "top1": entry["top1"] + more}
        for column in ("a", "b")
        for entry in comparison.records
        for more in [shift * (column == "b" and entry["row"] == "DropKey, decreasing") + noise(column, entry)]
    ]
    return compare(table, comparison.head, records, [])


def test_a_claim_is_about_the_mean_over_columns():
    one, both = with_values(LEVELED).findings[0], two_columns(4.0).findings[0]
    assert both.difference.mean == pytest.approx(one.difference.mean + 2.0, abs=0.2)
    assert both.difference.n == one.difference.n == 4


def test_columns_that_differ_show_in_the_summary_over_columns():
    claim = "DropKey, decreasing > DropKey, constant"
    alike, unlike = two_columns(0.01), two_columns(4.0)
    assert alike.summaries[claim][1].tau == 0 and unlike.summaries[claim][1].tau > 2
    assert "### Over columns" in markdown(unlike) and "### Over columns" not in markdown(with_values(LEVELED))


def test_rows_that_are_the_same_training_count_once_in_the_pooled_error():
    comparison = with_values(LEVELED)
    same = [
        {**entry, "run": f"r{entry['seed']}", "top1": LEVELED["Dropout"][entry["seed"]]}
        if entry["row"] in ("Dropout", "best DropKey")
        else entry
        for entry in comparison.records
    ]
    error = compare(comparison.table, comparison.head, same, []).error
    assert error.df == (4 - 1) * (4 - 1)


def test_no_p_is_shown_before_the_plan_is_finished():
    comparison = with_values(LEVELED)
    records = [entry for entry in comparison.records if entry["seed"] < 2]
    text = markdown(compare(comparison.table, comparison.head, records, [])).split("### How sure")[1].split("##")[0]
    assert "sign-flip" not in text and ", p " not in text and "detectable" in text


def test_the_pooled_error_is_not_that_of_rows_that_start_from_others():
    comparison = with_values(LEVELED)
    rows = {**comparison.table.rows, "Dropout": tables.Row("Dropout", of="DropKey, constant")}
    table = dataclasses.replace(comparison.table, rows=rows)
    found = {str(one.claim): one.pooled for one in compare(table, comparison.head, comparison.records, []).findings}
    assert found["DropKey, decreasing > Dropout"] is None
    assert found["DropKey, decreasing > DropKey, constant"] is not None


def test_the_error_over_samples_too_needs_to_know_which_samples_were_right():
    table, head, found = changed()
    findings = compare(table, head, found, []).findings
    assert all(one.sampling.both >= max(one.sampling.seeds, one.sampling.samples) for one in findings)
    without = [{k: v for k, v in entry.items() if k != "correct"} for entry in found]
    assert all(one.sampling is None for one in compare(table, head, without, []).findings)


def test_the_bits_of_a_record_are_its_top1():
    for entry in golden_comparison().done:
        right = results.correct_samples(entry)
        assert len(right) == entry["samples"] and 100 * right.mean() == pytest.approx(entry["top1"], abs=1e-3)


def lower_is_better(values: dict[str, tuple[float, ...]]) -> Comparison:
    """The golden table with an error in millimetres as its metric; values of four seeds for each row."""
    table, head, found = changed(error=lambda entry: values[entry["row"]][entry["seed"]])
    found = [{**found[0], **entry, "state": "done", "top1": None} for entry in found]
    head = {**head, "tuning": [{**entry, "higher_is_better": False} for entry in head["tuning"]]}
    metric = {"key": "error", "label": "vertex error", "unit": "mm", "digits": 3, "higher_is_better": False}
    return compare(dataclasses.replace(table, paper={}), {**head, "metrics": [metric]}, found, [])


ERRORS = {
    "no regularizer": (5.0, 5.1, 5.2, 5.1),
    "DropKey, decreasing": (1.0, 1.1, 1.2, 1.1),
    "DropKey, constant": (2.0, 2.1, 2.21, 2.1),
    "Dropout": (0.5, 0.61, 0.7, 0.6),
    "best DropKey": (5.1, 5.0, 5.2, 5.1),
}


def test_where_lower_is_better_the_row_with_the_lower_metric_wins_a_claim():
    found = verdicts(lower_is_better(ERRORS))
    assert found["DropKey > no regularizer"] == "better"
    assert found["DropKey, decreasing > DropKey, constant"] == "better, but by less than 2"
    assert found["DropKey, decreasing > Dropout"] == "worse, but by less than 2"
    assert found["best DropKey > no regularizer"] == "equivalent, within 2"


def test_labels_units_digits_and_direction_are_those_of_the_metric(tmp_path):
    report.write(lower_is_better(ERRORS), tmp_path)
    text = {name: (tmp_path / name).read_text() for name in FORMATS if (tmp_path / name).exists()}
    assert "last epoch: vertex error (mm)" in text["report.md"]
    assert "| DropKey, decreasing | 1.100 ± 0.082 (4) |" in text["report.md"]
    assert (
        "a lower vertex error is better" in text["report.md"]
        and "Differences in vertex error (mm)" in text["report.md"]
    )
    assert "| DropKey, decreasing | −4.000 |" in text["report.md"]
    assert "vertex error (mm) & difference" in text["report.tex"]
    assert "reason,error,train_loss" in text["report.csv"]
    assert "vertex error minus that of 'no regularizer' (mm), lower is better" in text["forest.svg"]
    assert "vertex error (mm)" in text["curves.svg"]
    for written in text.values():
        assert "top-1" not in written and "binomial" not in written


def test_no_code_of_tables_knows_a_metric():
    for file in [*(ROOT / "dropkey" / "reproduction").rglob("*.*"), ROOT / "scripts" / "reproduce.py"]:
        if file.suffix != ".pyc":
            assert not re.search(r"top.?[15]|\bece\b|accurac|image", file.read_text(), re.I), file.name


@pytest.fixture
def job(tmp_path):
    """A finished training of two epochs."""
    job = Job("train.py", (), tmp_path / "run", "summary.json", composed(("logger=none",)))
    run = RunDirectory(job.run)
    run.set_status("done")
    for epoch, top1 in ((1, 99.0), (2, 40.0)):
        run.append(
            {
                "kind": "epoch",
                "step": epoch,
                "epoch": epoch,
                "train_loss": 1.0 / epoch,
                "eval_top1": top1,
                "eval_loss": 1.0,
            }
        )
    keys = {"samples": 8, "epochs": 2, "seconds": 1.0, "best_split": "test", "commit": "c", "hardware": "h", "code": {}}
    metrics = [{"key": "top1", "label": "top-1"}, {"key": "loss", "label": "loss", "higher_is_better": False}]
    values = {"top1": 41.0, "loss": 1.5, "best_top1": 99.0, "best_epoch": 1}
    run.write_result("summary.json", {**keys, **values, "metrics": metrics, "versions": {"torch": "t"}})
    return job


def test_the_last_epoch_counts_not_the_best(job):
    entry = results.record(
        tables.load("schedule", "smoke"), ("no regularizer", "column", 0), job, RunDirectory(job.run).summary()
    )
    assert (entry["top1"], entry["loss"], entry["train_loss"]) == (41.0, 1.5, 0.5)
    assert 99.0 not in [value for value in entry.values() if isinstance(value, float)]


def test_the_curve_of_a_run_is_its_training_loss_and_the_watched_metric(job):
    entry = results.record(
        tables.load("schedule", "smoke"), ("no regularizer", "column", 0), job, RunDirectory(job.run).summary()
    )
    assert entry["curve"] == [[1, 1.0, 99.0], [2, 0.5, 40.0]]


def test_runs_with_different_metrics_are_refused(job, tmp_path):
    table = tables.load("schedule", "smoke", (0,))
    other = dataclasses.replace(job, run=tmp_path / "other")
    RunDirectory(other.run).set_status("done")
    RunDirectory(other.run).write_result(
        "summary.json", {**RunDirectory(job.run).summary(), "error": 1.0, "metrics": [{"key": "error", "label": "e"}]}
    )
    with pytest.raises(ConfigError, match="different metrics: run and other"):
        results.gather(table, {("no regularizer", "c", 0): job, ("no regularizer", "c", 1): other})


def test_runs_of_different_versions_are_not_mixed_unasked():
    _, head, found = changed(code=lambda r: {"engine": "old" if r["seed"] == 0 else "new", "data": "same"})
    with pytest.raises(ConfigError, match=r"2 versions of the code of engine .new: 14 runs, old: 5 runs.*mixed=true"):
        versions.require_one_version(head, found, mixed=False)
    assert len(versions.require_one_version(head, found, mixed=True)) == 1


def test_runs_conflict_only_in_code_that_they_share():
    _, head, found = changed(code=lambda r: {"engine": "e", f"regularizer/{r['row']}": r["row"]})
    assert versions.require_one_version(head, found, mixed=False) == []


@pytest.mark.parametrize(
    ("key", "message"), [("data", "versions of the data in column 'ViT 2 x 32'"), ("torch", "4 versions of torch")]
)
def test_runs_of_different_data_or_torch_are_not_mixed_unasked(key, message):
    _, head, found = changed(**{key: lambda r: str(r["seed"])})
    with pytest.raises(ConfigError, match=message):
        versions.require_one_version(head, found, mixed=False)


def test_where_each_seed_draws_its_own_data_those_of_one_seed_are_compared():
    _, head, found = changed(data=lambda r: f"{r['column']} {r['seed']}")
    head = {**head, "settings": {**head["settings"], "shared": {"data.split_seed": "run"}}}
    assert versions.require_one_version(head, found, mixed=False) == []
    (other,) = [r for r in found if (r["row"], r["seed"], r["column"]) == ("no regularizer", 1, found[0]["column"])]
    other["data"] = "another"
    with pytest.raises(ConfigError, match=r"2 versions of the data in column .*, seed 1 "):
        versions.require_one_version(head, found, mixed=False)


def test_a_metric_that_no_run_has_is_not_shown():
    key = changed()[1]["metrics"][1]["key"]
    table, head, found = changed(**{key: lambda r: None})
    comparison = compare(table, head, found, versions.require_one_version(head, found, mixed=False))
    assert key in [metric.key for metric in golden_comparison().other_metrics]
    assert key not in [metric.key for metric in comparison.other_metrics]
    assert markdown(comparison).count(" top-5 ") < markdown(golden_comparison()).count(" top-5 ")


def test_a_mixed_report_says_so():
    table, head, found = changed(torch=lambda r: str(r["seed"]))
    text = markdown(compare(table, head, found, versions.require_one_version(head, found, mixed=True)))
    assert "mixed on request" in text and "4 versions of torch" in text


def test_a_table_of_one_seed_shows_means_without_intervals():
    table, head, found = changed()
    text = markdown(compare(table, head, [r for r in found if r["seed"] == 0], []))
    assert " ± 0.00" not in text and not re.search(r"\bnan\b", text.replace("loss nan", ""))


def test_a_table_without_runs_can_be_shown(tmp_path):
    table, head, found = changed(state=lambda r: "missing")
    assert "– (0/4)" in report.write(compare(table, head, found, []), tmp_path)


# --------------------------------------------------------------------------------------------------- formats


def test_without_measurements_there_is_no_picture_of_entropy(tmp_path):
    table, head, found = changed(heads=lambda entry: None, entropy=lambda entry: None)
    assert "ntropy" not in report.write(compare(table, head, found, []), tmp_path)
    assert not (tmp_path / "entropy.svg").exists()


def test_csv_and_json_hold_every_seed(written):
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    runs = json.loads((written / "report.json").read_text())["runs"]
    places = [(entry["row"], entry["column"], str(entry["seed"])) for entry in golden_comparison().records]
    assert [(row["row"], row["column"], row["seed"]) for row in rows] == places
    assert [(run["row"], run["column"], str(run["seed"])) for run in runs] == places


def test_the_page_needs_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    assert page.count("<svg") == len(PICTURES)
    assert not re.search(r'(src|href)="(?!#)', page.replace("http://www.w3.org", ""))
    assert "<script" not in page


def test_the_page_fits_a_phone(written):
    page = (written / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="wide"><table') > 3
    assert re.search(r"\.wide[^{]*\{ overflow-x: auto; \}", page)


def test_the_page_is_well_formed(written):
    page = (written / "report.html").read_text()
    body = re.search(r"<main>.*</main>", page, re.S).group()
    ElementTree.fromstring(re.sub(r"xlink:href", "href", body))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_well_formed_and_tell_no_date(name, written):
    text = (written / name).read_text()
    ElementTree.fromstring(text)
    assert "dc:date" not in text


def test_code_in_markdown_does_not_end_at_a_backtick_of_its_own():
    table, head, found = changed()
    head["overrides"] = ["data.root=a`b"]
    text = markdown(compare(table, head, found, versions.require_one_version(head, found, mixed=False)))
    assert "<code>data.root=a`b</code>" in report.html("", text, DRAWN)


def test_latex_is_balanced_and_escaped(written):
    text = (written / "report.tex").read_text()
    body = text.split("\\begin{tabular}")[1]
    lines = [line for line in body.splitlines() if line.endswith("\\\\") and "cmidrule" not in line]
    assert len({line.count(" & ") for line in lines[1:]}) == 1
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    assert not re.search(r"(?<!\\)[%_#]", text.split("\n", 1)[1].replace("tab:mini-smoke", ""))
    assert all(ord(char) < 128 for char in text)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_latex_compiles_without_a_complaint(written, tmp_path):
    lines = [r"\documentclass{article}\usepackage{booktabs}\begin{document}", r"\input{report}\end{document}"]
    (tmp_path / "main.tex").write_text("\n".join(lines))
    shutil.copy(written / "report.tex", tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-2000:]


def test_special_characters_do_not_break_a_format():
    table, head, found = changed()
    odd = "A | B & C_1 <50 %> \\ {x} 'y' \"z\""
    rows = {odd if label == "Dropout" else label: row for label, row in table.rows.items()}
    found = [{**entry, "row": odd if entry["row"] == "Dropout" else entry["row"]} for entry in found]
    comparison = compare(dataclasses.replace(table, rows=rows, claims=()), head, found, [])
    text = markdown(comparison)
    assert r"| A \| B & C_1 \<50 %> \\ {x} 'y' \"z\" |".replace('\\"', '"') in text
    assert r"A | B \& C\_1 $<$50 \%$>$ \textbackslash{} \{x\}" in report.latex(comparison)
    page = report.html("a < b", text, DRAWN)
    assert "<td>A | B &amp; C_1 &lt;50 %&gt; \\ {x} 'y' &quot;z&quot;</td>" in page
    assert "<title>a &lt; b</title>" in page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_shows_the_page(written, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2200", f"--screenshot={picture}"]
    subprocess.run([CHROMIUM, *options, f"file://{written}/report.html"], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000
