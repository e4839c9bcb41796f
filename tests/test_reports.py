"""Reports: pure functions of records. A committed mini-sweep pins every format."""

import csv
import dataclasses
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
from dropkey.records import RunDirectory
from dropkey.reproduction import document, results, tables, writers
from dropkey.reproduction.comparison import compare
from dropkey.reproduction.jobs import Composed, Job
from dropkey.reproduction.statistics import AGREES, UNDECIDED

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "table"  # regenerate: python tests/golden/make.py table
FORMATS = (
    "report.md",
    "report.tex",
    "report.csv",
    "report.json",
    "report.html",
    "forest.svg",
    "curves.svg",
    "entropy.svg",
)
NO_PICTURES = {"forest.svg": "<svg/>", "curves.svg": "<svg/>", "entropy.svg": "<svg/>"}
RESULTS = sorted((ROOT / "results").glob("*/records.jsonl"))


def golden_comparison():
    table = tables.load(str(GOLDEN / "mini.yaml"), "smoke")
    head, found = results.read(GOLDEN / "records.jsonl", "mini", "smoke")
    return compare(table, head, found, results.require_one_version(found, mixed=False))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    writers.write(golden_comparison(), directory)
    return directory


def changed(**changes):
    """The golden comparison, its records changed by `changes`, a function of a record for each key."""
    table = tables.load(str(GOLDEN / "mini.yaml"), "smoke")
    head, found = results.read(GOLDEN / "records.jsonl", "mini", "smoke")
    found = [{**entry, **{key: change(entry) for key, change in changes.items()}} for entry in found]
    return table, head, found


# ------------------------------------------------------------------------------------------------ to the byte


@pytest.mark.parametrize("name", FORMATS)
def test_the_mini_sweep_gives_the_committed_report_to_the_byte(name, written):
    assert (written / name).read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_committed_results_are_what_their_records_say(file, tmp_path):
    name, scale = file.parent.name.rsplit("-", 1)
    table = tables.load(name, scale)
    head, found = results.read(file, name, scale)
    writers.write(compare(table, head, found, results.require_one_version(found, mixed=False)), tmp_path)
    for written in sorted(tmp_path.iterdir()):
        assert written.read_bytes() == (file.parent / written.name).read_bytes(), written.name


def test_records_survive_writing_and_reading(tmp_path):
    table, head, found = changed()
    results.write(tmp_path / "r.jsonl", dataclasses.replace(table, name="mini", seeds=tuple(head["seeds"])), found)
    assert results.read(tmp_path / "r.jsonl", "mini", "smoke") == (head, found)


def test_records_of_another_table_are_refused():
    with pytest.raises(ConfigError, match="records of table=mini scale=smoke, not schedule cpu"):
        results.read(GOLDEN / "records.jsonl", "schedule", "cpu")


def test_plan_and_report_import_no_torch():
    program = (
        "import sys; sys.argv = ['x']; import runpy; module = runpy.run_path('scripts/reproduce.py');"
        "from dropkey.reproduction import comparison, display, document, plan, results, runner, jobs, writers;"
        "print([name for name in ('torch', 'timm', 'torchvision', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------ what it says


def test_cells_that_are_not_finished_say_how_many_are(written):
    text = (written / "report.md").read_text()
    assert re.search(r"\| DropKey, constant \| [\d.]+ ± [\d.]+ \(2/3\) \|", text)
    assert "- DropKey, constant, seed 2: diverged: loss nan" in text


def test_an_unfinished_cell_is_compared_over_the_seeds_it_has():
    cell = golden_comparison().cells["DropKey, constant", "ViT 2 x 32"]
    assert cell.to_baseline.n == 2


def test_what_the_paper_does_not_tell_is_not_known(written):
    line = next(line for line in (written / "report.md").read_text().splitlines() if line.startswith("| Dropout"))
    assert line.endswith("| not known |")


def test_ours_is_named_for_what_it_is(written):
    text = (written / "report.md").read_text()
    assert "ours: ViT 2 x 32" in text and "digits, 8 px, 480 training images" in text


def test_a_row_that_is_trained_in_another_way_is_named_beside_the_baselines_training():
    table, head, found = changed(facts=lambda entry: "digits, 9 epochs" if entry["row"] == "Dropout" else "digits")
    rows = {**table.rows, "Dropout": tables.Row("Dropout", of="DropKey")}
    text = document.what_was_run(compare(dataclasses.replace(table, rows=rows), head, found, []))
    assert "ViT 2 x 32: digits; 'Dropout': digits, 9 epochs, starting from the runs of 'DropKey'." in text


def test_no_p_is_shown_without_the_least_that_its_seeds_can_reach(written):
    text = (written / "report.md").read_text()
    assert "(least 0.25)" in text and "(least 0.5)" in text
    assert "with 3 pairs it cannot be below 0.25, and below 0.05 only from 6 seeds on" in text


def test_every_claim_has_a_verdict_with_its_rule(written):
    text = (written / "report.md").read_text()
    for claim in golden_comparison().table.claims:
        assert re.search(rf"\| {claim} \|.*\| (agrees|disagrees|cannot tell yet) \|", text)
    assert "adjusted by Holm over the 3 claims" in text


def test_a_clear_difference_agrees_and_noise_does_not():
    table, head, found = changed(top1=lambda r: {"DropKey, decreasing": 60}.get(r["row"], 50) + r["seed"] / 9)
    found = [{**entry, "state": "done", "data": "d", "code": "c", "torch": "t"} for entry in found]
    verdicts = {str(f.claim): f.verdict for f in compare(table, head, found, []).findings}
    assert verdicts["DropKey, decreasing > DropKey, constant"] == AGREES
    noise = dict(zip(table.rows, [(50, 53, 49), (52, 49, 51), (49, 52, 51), (51, 50, 53)], strict=True))
    table, head, found = changed(top1=lambda r: noise[r["row"]][r["seed"]])
    assert {f.verdict for f in compare(table, head, found, []).findings} == {UNDECIDED}


def test_the_last_epoch_counts_not_the_best(tmp_path):
    task = Job("train.py", (), tmp_path / "run", "summary.json", Composed("", {}, "m", "d", 8, None, 2, None, 32, 1))
    run = RunDirectory(task.run)
    run.set_status("done")
    for epoch, top1 in ((1, 99.0), (2, 40.0)):
        run.append({"kind": "epoch", "epoch": epoch, "train_loss": 1.0 / epoch, "eval_top1": top1, "eval_loss": 1.0})
    keys = dict.fromkeys(("top5", "loss", "ece", "images", "epochs", "seconds", "best_split", "commit", "hardware"), 1)
    run.write_summary({**keys, "top1": 41.0, "best_top1": 99.0, "best_epoch": 1, "versions": {"torch": "t"}})
    entry = results.record(("row", "column", 0), task)
    assert (entry["top1"], entry["train_loss"]) == (41.0, 0.5)
    assert 99.0 not in [value for value in entry.values() if isinstance(value, float)]


def test_runs_of_different_versions_are_not_mixed_unasked():
    _, _, found = changed(code=lambda r: "old" if r["seed"] == 0 else "new")
    with pytest.raises(ConfigError, match=r"2 versions of the code .new: 7 runs, old: 4 runs.*mixed=true"):
        results.require_one_version(found, mixed=False)
    assert results.require_one_version(found, mixed=True)


def test_runs_of_different_data_are_not_mixed_unasked():
    _, _, found = changed(data=lambda r: str(r["seed"]))
    with pytest.raises(ConfigError, match="versions of the data in column 'ViT 2 x 32'"):
        results.require_one_version(found, mixed=False)


def test_a_mixed_report_says_so():
    table, head, found = changed(torch=lambda r: str(r["seed"]))
    blocks = document.build(compare(table, head, found, results.require_one_version(found, mixed=True)))
    assert "Mixed on request" in writers.markdown(blocks)


def test_a_table_of_one_seed_shows_means_without_intervals():
    table, head, found = changed()
    text = writers.markdown(document.build(compare(table, head, [r for r in found if r["seed"] == 0], [])))
    assert " ± 0.00" not in text and "nan" not in text.replace("loss nan", "")


def test_a_table_without_runs_can_be_shown():
    table, head, found = changed(state=lambda r: "missing")
    assert "– (0/3)" in writers.markdown(document.build(compare(table, head, found, [])))
    assert writers.page(document.build(compare(table, head, found, [])), NO_PICTURES)


# --------------------------------------------------------------------------------------------------- formats


def test_without_measurements_there_is_no_picture_of_entropy():
    table, head, found = changed(heads=lambda entry: None, entropy=lambda entry: None)
    assert "ntropy" not in writers.markdown(document.build(compare(table, head, found, [])))


def test_csv_and_json_hold_every_seed(written):
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    runs = json.loads((written / "report.json").read_text())["runs"]
    places = [(entry["row"], entry["column"], str(entry["seed"])) for entry in golden_comparison().records]
    assert [(row["row"], row["column"], row["seed"]) for row in rows] == places
    assert [(run["row"], run["column"], str(run["seed"])) for run in runs] == places


def test_the_page_needs_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!#)', page.replace("http://www.w3.org", ""))
    assert "<script" not in page


def test_the_page_is_well_formed(written):
    page = (written / "report.html").read_text()
    body = re.search(r"<main>.*</main>", page, re.S).group()
    ElementTree.fromstring(re.sub(r"xlink:href", "href", body))


@pytest.mark.parametrize("name", ["forest.svg", "curves.svg", "entropy.svg"])
def test_pictures_are_well_formed_and_tell_no_date(name, written):
    text = (written / name).read_text()
    ElementTree.fromstring(text)
    assert "dc:date" not in text


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
    assert "A \\| B" in writers.markdown(document.build(comparison))
    assert r"A | B \& C\_1 $<$50 \%$>$ \textbackslash{} \{x\}" in writers.latex(comparison)
    assert "&lt;50 %&gt;" in writers.page(document.build(comparison), NO_PICTURES)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_shows_the_page(written, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2200", f"--screenshot={picture}"]
    subprocess.run([CHROMIUM, *options, f"file://{written}/report.html"], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000
