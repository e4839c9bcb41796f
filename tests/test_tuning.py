"""Rows that are the best of candidates, and tables that go on until their claims are decided. A stand-in trains."""

import collections
import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import stand_in as standing_in
from dropkey.commands import reproduce
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory
from dropkey.reproduction import jobs, record_file, results, tables, tuning
from dropkey.reproduction.study import Study

TABLE = """
title: Best against best
baseline: none
tuning: { seeds: 2 }
rows:
  none: regularizer=none
  best: { best_of: "regularizer=dropkey regularizer.ratio=0.1,0.3 schedule=constant,decreasing" }
  increasing: { like: best, train: schedule=increasing }
claims: [best > none]
"""
COLUMN = "ViT 2 x 32"


def arguments(tmp_path: Path, *words: str) -> list[str]:
    place = (f"table={tmp_path}/best.yaml", "scale=smoke", f"output={tmp_path}/runs", f"results={tmp_path}/results")
    return ["run", *place, "entropy=false", "jobs=4", *words]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "best.yaml").write_text(TABLE)
    return tables.load(str(tmp_path / "best.yaml"), "smoke")


def announce(table: tables.Table, output: Path, seeds=tuple(range(8))) -> None:
    """Every job that the table may come to."""
    found = list(tuning.jobs_of(table, str(output)).values())
    for candidate in table.rows["best"].candidates:
        chosen = replace(table, chosen={("best", COLUMN): candidate}, seeds=seeds)
        found += jobs.jobs_of(chosen, str(output)).values()
    standing_in.announce(found, output)


def report_of(tmp_path: Path) -> str:
    return (tmp_path / "results" / "best-smoke" / "report.md").read_text()


def started(tmp_path: Path) -> collections.Counter:
    return collections.Counter((tmp_path / "runs" / "starts.txt").read_text().split()[::2])


@pytest.fixture
def tuned(table, tmp_path, stand_in):
    """The exit code of a run."""
    announce(table, tmp_path / "runs")
    return reproduce.main(arguments(tmp_path))


# -------------------------------------------------------------------------------------------------------- the YAML


def test_candidates_are_all_combinations_in_the_order_of_writing(table):
    expected = [
        ("regularizer=dropkey", f"regularizer.ratio={ratio}", f"schedule={schedule}")
        for ratio, schedule in itertools.product(("0.1", "0.3"), ("constant", "decreasing"))
    ]
    assert list(table.rows["best"].candidates) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows:", "scales: { smoke: { looks: 5 } }\nrows:", "looks=5 must be a list"),
        ("rows:", "scales: { smoke: { looks: [] } }\nrows:", "looks=[]: ascending numbers"),
        ("rows:", "scales: { smoke: { looks: [3.5, 5] } }\nrows:", "looks=[3.5, 5]: ascending numbers"),
        ("rows:", "scales: { smoke: { looks: [3, 5], seeds: [7, 8, 9] } }\nrows:", "looks=[3, 5] end at another"),
        ("rows:", "scales: { smoke: { seeds: 2.5 } }\nrows:", "seeds=2.5 must be a number or a list"),
        ("rows:", "scales: { smoke: { seeds: true } }\nrows:", "seeds=True must be a number or a list"),
        ("rows:", "scales: { smoke: { seeds: [0, 1000] } }\nrows:", "seeds=[1000] are seeds of tuning"),
        ("rows:", "scales: { smoke: { columns: {} } }\nrows:", "scale=smoke has no columns"),
        ("rows:", "scales: { smoke: { protocol: nowhere.md } }\nrows:", "protocol=nowhere.md does not exist"),
        ("rows:", "scales: { smoke: 5 }\nrows:", "smoke=5 must be a mapping"),
        ("rows:", "scales: [a]\nrows:", "scales=['a'] must be a mapping"),
        ("rows:", "margin: abc\nrows:", "margin=abc must be a number"),
        ("rows:", "paper: [a]\nrows:", "paper=['a'] must be a mapping"),
        ("rows:", "paper: { c: 3 }\nrows:", "column 'c' of paper=3 must be a mapping"),
        ("title: Best against best", "title: 5", "title=5 must be text"),
        ("tuning: { seeds: 2 }", "tuning: 3", "tuning=3 must be a mapping"),
        ("{ seeds: 2 }", "{ column: [a] }", "column=['a'] must be text"),
        ("like: best", "of: [none]", "of=['none'] must be text"),
        ("claims: [best > none]", "claims: 5", "claims=5 must be a list"),
        ("[best > none]", "[{ claim: c, better: best, worse: 5 }]", "worse=5 must be a row or a list of rows"),
        ("[best > none]", "[{ claim: c, better: [], worse: none }]", "a claim needs claim, better and worse"),
        ("[best > none]", "[best > best]", "needs different rows on both sides"),
        ("[best > none]", "[best > none, best > none]", "claim 'best > none' is there twice"),
        ("none: regularizer=none", "none: output=x", "a table sets output itself"),
        ("none: regularizer=none", "none: 'task.name=\"x'", "cannot be read (No closing quotation)"),
        ("ratio=0.1,0.3", "ratio=interval(0,1)", "row 'best'"),
        ("ratio=0.1,0.3", "ratio=0.1,0.3 data.val_fraction=0", "best_of needs validation data: set data.val_fraction"),
        ("ratio=0.1,0.3 schedule=constant,decreasing", "ratio=0.1", "best_of needs values with commas"),
        ("like: best", "like: worst", "row 'increasing' is like 'worst', which is not a row"),
        ("like: best", "like: best, of: none", "has train: and nothing else"),
        ("{ seeds: 2 }", "{ seeds: 0 }", "tuning: seeds=0 must be a number from 1"),
        ("{ seeds: 2 }", "{ column: A }", "tuning: column 'A' does not exist; choices: ViT 2 x 32"),
        ("[best > none]", "[{ claim: c, better: best }]", "a claim needs claim, better and worse"),
        ("rows:", "scales: { smoke: { looks: [5, 4] } }\nrows:", "looks=[5, 4]: ascending numbers of seeds from 3"),
        ("rows:", "scales: { smoke: { looks: [2, 4] } }\nrows:", "looks=[2, 4]: ascending numbers of seeds from 3"),
        ("rows:", "margin: 0\nrows:", "margin=0 must be above 0"),
        ("ratio=0.1,0.3", "ratio=0.1,3", "candidate regularizer=dropkey regularizer.ratio=3 schedule=constant: "),
    ],
)
def test_a_mistake_is_one_line_that_names_it(old, new, message, tmp_path):
    (tmp_path / "best.yaml").write_text(TABLE.replace(old, new))
    with pytest.raises(ConfigError) as error:
        tuning.jobs_of(tables.load(str(tmp_path / "best.yaml"), "smoke"), "runs")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rows_wait_for_the_choice(table):
    assert {row for row, _, _ in jobs.jobs_of(table, "runs")} == {"none"}


def test_a_row_like_the_best_has_its_overrides_and_its_own(table):
    chosen = replace(table, chosen={("best", COLUMN): ("regularizer=dropkey", "regularizer.ratio=0.3")})
    config = jobs.jobs_of(chosen, "runs")["increasing", COLUMN, 0].config
    assert (config.regularizer.ratio, config.schedule.name) == (0.3, "increasing")


# ------------------------------------------------------------------------------------------------------- the choice


def candidate(name: str, *validation, test: float = 50.0, higher: bool = True) -> dict:
    """None as a value of validation: that run diverged."""
    found = {"test": test, "higher_is_better": higher}
    runs = {str(seed): {} if value is None else {"validation": value, **found} for seed, value in enumerate(validation)}
    return {"row": "best", "column": COLUMN, "candidate": name, "runs": runs}


def order(*entries: dict) -> list[str]:
    return [entry["candidate"] for entry in tuning.ranked(list(entries), "best", COLUMN)]


def test_the_best_mean_on_validation_wins_whatever_the_test_says():
    assert order(candidate("a", 50, 52, test=99), candidate("b", 40, 70, test=1))[0] == "b"


def test_of_equal_candidates_the_first_wins():
    assert order(candidate("a", 50, 52), candidate("b", 52, 50))[0] == "a"


def test_where_lower_is_better_the_lowest_wins():
    assert order(candidate("a", 2.0, higher=False), candidate("b", 1.0, higher=False))[0] == "b"


def test_a_candidate_with_a_diverged_run_cannot_win():
    assert order(candidate("a", 90, None), candidate("b", 50, 50)) == ["b"]


def test_the_budget_curve_is_what_drawing_candidates_gives():
    generator = random.Random(0)
    entries = [candidate(str(i), generator.random(), test=generator.random()) for i in range(6)]
    curve = tuning.budget_curve(entries, "best", COLUMN)
    for k, expected in enumerate(curve, 1):
        draws = list(itertools.combinations(entries, k))
        winners = [max(drawn, key=lambda entry: entry["runs"]["0"]["validation"]) for drawn in draws]
        assert expected == pytest.approx(sum(one["runs"]["0"]["test"] for one in winners) / len(draws))


# -------------------------------------------------------------------------------------------------------- the run


def test_the_best_on_validation_is_trained_on_fresh_seeds(tuned, tmp_path):
    assert tuned == 0
    head, records, _ = record_file.parse(tmp_path / "results" / "best-smoke" / record_file.FILE)
    assert [sorted(entry["runs"]) for entry in head["tuning"]] == [["1000", "1001"]] * 4
    # the stand-in's validation prefers a low ratio, its test a high one
    best = next(entry for entry in records if (entry["row"], entry["seed"]) == ("best", 0))
    assert best["top1"] == 51 and {entry["seed"] for entry in records} == {0, 1}
    text = report_of(tmp_path)
    assert "| best | regularizer=dropkey regularizer.ratio=0.1 schedule=constant |" in text


def test_the_same_command_again_starts_nothing(tuned, tmp_path):
    before = started(tmp_path)
    assert reproduce.main(arguments(tmp_path)) == 0
    assert started(tmp_path) == before and set(before.values()) == {1}


def test_tuning_in_the_records_is_not_repeated_when_its_runs_are_gone(tuned, tmp_path):
    directory = tmp_path / "results" / "best-smoke"
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    assert reproduce.main(arguments(tmp_path)) == 0
    assert not (tmp_path / "runs" / "starts.txt").exists()
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_the_report_from_records_knows_the_choice(tuned, tmp_path):
    directory = tmp_path / "results" / "best-smoke"
    before = (directory / "report.json").read_bytes()
    words = [word for word in arguments(tmp_path)[1:] if not word.startswith("output")]
    assert reproduce.main(["report", *words, f"records={directory / record_file.FILE}"]) == 0
    assert (directory / "report.json").read_bytes() == before


def test_a_diverged_run_of_tuning_takes_its_candidate_out(table, tmp_path, stand_in, monkeypatch):
    announce(table, tmp_path / "runs")
    first = tuning.jobs_of(table, str(tmp_path / "runs"))["best", COLUMN, 0, 1000]
    monkeypatch.setenv("BEHAVIOUR", json.dumps({first.run.name: "diverge"}))
    assert reproduce.main(arguments(tmp_path)) == 1
    text = report_of(tmp_path)
    assert "| best | regularizer=dropkey regularizer.ratio=0.1 schedule=decreasing |" in text
    assert "(a run diverged)" in next(line for line in text.splitlines() if "ratio=0.1 schedule=constant" in line)


def test_a_failed_run_of_tuning_must_be_repeated_before_the_comparison(table, tmp_path, stand_in, monkeypatch, capsys):
    announce(table, tmp_path / "runs")
    first = tuning.jobs_of(table, str(tmp_path / "runs"))["best", COLUMN, 0, 1000]
    monkeypatch.setenv("BEHAVIOUR", json.dumps({first.run.name: "exit"}))
    assert reproduce.main(arguments(tmp_path)) == 1
    assert "retry=true tries them again" in capsys.readouterr().out
    assert set(started(tmp_path)) == {job.run.name for job in tuning.jobs_of(table, str(tmp_path / "runs")).values()}
    monkeypatch.setenv("BEHAVIOUR", "{}")
    assert reproduce.main(arguments(tmp_path, "retry=true")) == 0


def test_if_every_candidate_has_a_diverged_run_that_is_said_and_saved(table, tmp_path, stand_in, monkeypatch):
    announce(table, tmp_path / "runs")
    monkeypatch.setenv("BEHAVIOUR", json.dumps({"-dropkey-": "diverge"}))
    with pytest.raises(ConfigError, match="every candidate of best has a run that diverged"):
        reproduce.main(arguments(tmp_path))
    assert record_file.parse(tmp_path / "results" / "best-smoke" / record_file.FILE)[0]["tuning"]
    with pytest.raises(ConfigError, match="every candidate"):  # not a dead end before it has looked
        reproduce.main(arguments(tmp_path))


def test_records_of_another_winner_are_not_those_of_todays(tuned, table, tmp_path, monkeypatch):
    """A run of tuning is replaced and another candidate wins: its runs are trained."""
    shutil.rmtree(tmp_path / "runs")
    announce(table, tmp_path / "runs")
    file = tmp_path / "results" / "best-smoke" / record_file.FILE
    head, records, _ = record_file.parse(file)
    first = next(entry for entry in head["tuning"] if "ratio=0.1 schedule=constant" in entry["candidate"])
    first["runs"]["1000"]["validation"] = 0.0
    record_file.write(file, head, records)
    assert reproduce.main(arguments(tmp_path)) == 0
    head, records, _ = record_file.parse(file)
    assert len(started(tmp_path)) == 2  # the new best; what is like it is the same again
    (best,) = {entry["run"] for entry in records if (entry["row"], entry["seed"]) == ("best", 0)}
    assert best in started(tmp_path)


def test_an_interrupted_tuning_keeps_what_is_finished_in_the_records(table, tmp_path, stand_in, monkeypatch):
    announce(table, tmp_path / "runs")
    last = tuning.jobs_of(table, str(tmp_path / "runs"))["best", COLUMN, 3, 1001]
    monkeypatch.setenv("BEHAVIOUR", json.dumps({last.run.name: "stop"}))
    assert reproduce.main(arguments(tmp_path)) == 1
    head = record_file.parse(tmp_path / "results" / "best-smoke" / record_file.FILE)[0]
    assert sum(len(entry["runs"]) for entry in head["tuning"]) == 7


def test_tuning_on_test_data_is_refused(table, tmp_path, stand_in):
    announce(table, tmp_path / "runs")
    job = tuning.jobs_of(table, str(tmp_path / "runs"))["best", COLUMN, 0, 1000]
    standing_in.main("train.py", list(job.overrides))
    run = RunDirectory(job.run)
    run.write_result("summary.json", {**run.summary(), "best_split": "test"})
    with pytest.raises(ConfigError, match="had no validation data, which best_of needs"):
        tuning.gather(table, str(tmp_path / "runs"), [])


# ------------------------------------------------------------------------------------------------------------ looks


def study(tmp_path: Path, table: str, *words: str) -> tuple[int, dict]:
    """(exit code, head of the records) of a run of a table without tuning, with looks at each seed."""
    (tmp_path / "best.yaml").write_text(table)
    loaded = tables.load(str(tmp_path / "best.yaml"), "smoke", tuple(range(8)))
    standing_in.announce(jobs.jobs_of(loaded, str(tmp_path / "runs")).values(), tmp_path / "runs")
    code = reproduce.main(arguments(tmp_path, *words))
    return code, record_file.parse(tmp_path / "results" / "best-smoke" / record_file.FILE)[0]


PLAIN = """
title: Two rows
baseline: none
rows:
  none: regularizer=none
  dropkey: regularizer=dropkey regularizer.ratio={ratio}
claims: [dropkey > none]
"""


def test_seeds_are_added_until_the_claim_is_decided(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("NOISE", "0.1")
    code, head = study(tmp_path, PLAIN.format(ratio=0.9), "until=decided", "max_seeds=8")
    assert code == 0 and head["seeds"] == [0, 1, 2, 3, 4]  # 9 points with a noise of 0.1
    assert "after 5 seeds:" in capsys.readouterr().out
    text = report_of(tmp_path)
    assert "| better |" in text and "with a look at the claims after 5, 6, 7 and 8" in text


def test_where_nothing_is_decided_the_budget_is_spent(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "5")
    code, head = study(tmp_path, PLAIN.format(ratio=0.001), "until=decided", "max_seeds=8")
    assert code == 0 and head["seeds"] == list(range(8))


def test_a_table_with_looks_stops_at_them(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { looks: [4, 8] } }\n"
    assert study(tmp_path, text)[1]["seeds"] == [0, 1, 2, 3]


def test_seeds_on_the_command_line_do_not_change_the_plan(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 8 } }\n"
    _, head = study(tmp_path, text, "seeds=4")
    assert (head["seeds"], head["design"]["looks"]) == ([0, 1, 2, 3], [8])
    assert "not yet: 4 of the 8 planned seeds finished" in report_of(tmp_path)


def test_a_plan_that_changes_after_results_is_remembered(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9)
    study(tmp_path, text + "scales: { smoke: { seeds: 3 } }\n")
    _, head = study(tmp_path, text + "scales: { smoke: { seeds: 4 } }\n")
    assert [one["looks"] for one in head["earlier_designs"]] == [[3]]
    _, head = study(tmp_path, text + "scales: { smoke: { seeds: 4 } }\n")
    assert len(head["earlier_designs"]) == 1


def test_the_file_of_records_never_gets_shorter(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9)
    study(tmp_path, text + "scales: { smoke: { seeds: 6 } }\n")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    words = [word for word in arguments(tmp_path) if word not in ("run", "entropy=false")]
    assert reproduce.main(["report", *words, "seeds=3"]) == 0
    head, records, _ = record_file.parse(tmp_path / "results" / "best-smoke" / record_file.FILE)
    assert (head["seeds"], len(records)) == ([0, 1, 2], 12)
    assert reproduce.main(arguments(tmp_path)) == 0
    assert not (tmp_path / "runs" / "starts.txt").exists()


def test_a_report_uses_only_the_seeds_it_names(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    study(tmp_path, PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 6 } }\n")
    words = [word for word in arguments(tmp_path) if word not in ("run", "entropy=false")]
    reproduce.main(["report", *words, "seeds=3"])
    file = tmp_path / "results" / "best-smoke" / record_file.FILE
    _, _, records = results.read(file, tables.load(str(tmp_path / "best.yaml"), "smoke"))
    assert {entry["seed"] for entry in records} == {0, 1, 2}


def test_other_overrides_do_not_overwrite_finished_records(tmp_path, stand_in, monkeypatch):
    study(tmp_path, PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 3 } }\n")
    with pytest.raises(ConfigError, match=r"has runs with the overrides '', not 'optim\.lr=1'; give another results="):
        reproduce.main(arguments(tmp_path, "optim.lr=1"))


def test_a_report_keeps_the_design_of_until_decided(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    study(tmp_path, PLAIN.format(ratio=0.9), "until=decided", "max_seeds=8")
    directory = tmp_path / "results" / "best-smoke"
    before = (directory / "report.md").read_bytes(), (directory / record_file.FILE).read_bytes()
    words = [word for word in arguments(tmp_path) if word not in ("run", "entropy=false")]
    assert reproduce.main(["report", *words]) == 0
    assert ((directory / "report.md").read_bytes(), (directory / record_file.FILE).read_bytes()) == before
    assert reproduce.main(["report", *words, f"records={directory / record_file.FILE}"]) == 0
    assert (directory / "report.md").read_bytes() == before[0]


def test_a_claim_taken_out_after_results_is_told(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 3 } }\n"
    study(tmp_path, text.replace("[dropkey > none]", "[dropkey > none, none > dropkey]"))
    study(tmp_path, text)
    report = report_of(tmp_path)
    assert "before, it had claims dropkey > none and none > dropkey.**" in report


def test_runs_that_were_finished_before_the_plan_are_told(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 3 } }\n"
    study(tmp_path, text)
    report = report_of(tmp_path)
    assert "finished before this plan" not in report
    shutil.rmtree(tmp_path / "results")
    study(tmp_path, text)
    report = report_of(tmp_path)
    assert "**6 of its runs were finished before this plan was first used.**" in report


def test_a_run_replaced_after_a_look_is_told(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 4 } }\n"
    (tmp_path / "best.yaml").write_text(text)
    job = jobs.jobs_of(tables.load(str(tmp_path / "best.yaml"), "smoke"), str(tmp_path / "runs"))["none", COLUMN, 1]
    monkeypatch.setenv("BEHAVIOUR", json.dumps({job.run.name: "exit"}))
    study(tmp_path, text)
    report = tmp_path / "results" / "best-smoke" / "report.md"
    assert "| better |" in report.read_text()
    monkeypatch.setenv("BEHAVIOUR", "{}")
    monkeypatch.setenv("NOISE", "50")
    study(tmp_path, text, "retry=true")
    assert "**Runs were replaced after this look, whose verdicts were: better.**" in report.read_text()


def test_a_diverged_start_does_not_block_the_verdict(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9).replace("claims", "  passes: { of: dropkey, evaluate: eval.monte_carlo=2 }\nclaims")
    text += "scales: { smoke: { seeds: 4 } }\n"
    (tmp_path / "best.yaml").write_text(text)
    job = jobs.jobs_of(tables.load(str(tmp_path / "best.yaml"), "smoke"), str(tmp_path / "runs"))["dropkey", COLUMN, 1]
    monkeypatch.setenv("BEHAVIOUR", json.dumps({job.run.name: "diverge"}))
    assert study(tmp_path, text)[0] == 1
    report = report_of(tmp_path)
    assert "| better |" in report
    assert f"passes, seed 1: failed: it needs {job.label}, which is diverged" in report


def test_plan_tells_the_seeds_and_hours_that_a_claim_needs(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("NOISE", "1")
    study(tmp_path, PLAIN.format(ratio=0.1), "seeds=6")
    capsys.readouterr()
    words = [word for word in arguments(tmp_path, "seeds=6") if word not in ("run", "entropy=false")]
    reproduce.main(["plan", *words, "delta=1", "deviation=1.19"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dropkey > none "))
    assert line.split()[3:] == ["1.19", "(guess)", "14", "14", "–", "0.0"]
    reproduce.main(["plan", *words, "delta=1"])
    assert "(6 seeds)" in capsys.readouterr().out


def test_a_study_without_claims_runs_all_its_seeds(tmp_path, stand_in):
    text = PLAIN.format(ratio=0.9).replace("claims: [dropkey > none]\n", "")
    assert study(tmp_path, text, "until=decided", "max_seeds=5")[1]["seeds"] == [0, 1, 2, 3, 4]


def test_a_look_needs_what_is_in_the_records_too(tmp_path, stand_in, monkeypatch):
    """Runs of the first seeds are gone: their records count at the look all the same."""
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { seeds: 4 } }\n"
    study(tmp_path, text, "seeds=3")
    shutil.rmtree(tmp_path / "runs")
    study(tmp_path, text)
    assert len(started(tmp_path)) == 2  # seed 3 of two rows
    loaded = tables.load(str(tmp_path / "best.yaml"), "smoke")
    args = reproduce.read(arguments(tmp_path))[0]
    assert Study(loaded, args).compare().decided


def test_a_report_ends_at_the_look_that_decided(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("NOISE", "0.1")
    text = PLAIN.format(ratio=0.9) + "scales: { smoke: { looks: [4, 8] } }\n"
    study(tmp_path, text)
    before = (tmp_path / "results" / "best-smoke" / "report.md").read_bytes()
    words = [word for word in arguments(tmp_path) if word != "run"]
    assert reproduce.main(["report", *words]) == 0
    assert (tmp_path / "results" / "best-smoke" / "report.md").read_bytes() == before
