"""scripts/reproduce.py: its arguments, its three actions with real runs, and Slurm (submitit's local cluster)."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import regression_task
import runs
import stand_in as standing_in
from dropkey import evaluation, session
from dropkey.commands import reproduce
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory
from dropkey.reproduction import jobs, report, results, slurm, tables, versions
from dropkey.reproduction.comparison import compare
from dropkey.reproduction.jobs import DONE, distinct, jobs_of
from dropkey.reproduction.runner import Launcher

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce.py"
TABLE = """
title: Everything that a row can be
baseline: dropkey
rows:
  dropkey: regularizer=dropkey regularizer.ratio=0.3
  two passes: { of: dropkey, evaluate: eval.monte_carlo=2 }
  tuned: { of: dropkey, train: regularizer=none trainer.max_steps=3 }
claims: [tuned > dropkey]
"""
SHORT = ("trainer.epochs=2", "data.max_train_samples=64", "data.test_fraction=0.05")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("reproduce")
    (place / "mini.yaml").write_text(TABLE)
    return place


def call(place: Path, action: str, *words: str) -> subprocess.CompletedProcess:
    common = (f"table={place}/mini.yaml", "scale=smoke", f"output={place}/runs", f"results={place}/results")
    command = [sys.executable, str(SCRIPT), action, *common, *SHORT, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def finished(place):
    """The output of a first `run`, of one seed."""
    return call(place, "run", "seeds=1", "jobs=2")


# ------------------------------------------------------------------------------------------------------- arguments

WRONG = {
    "paln": "paln does not exist; choices: plan, run, report",
    "table=schedule": "an action is missing; choices: plan, run, report",
    "run": "table= is missing; choices: alignment, best, cifar, controls, detection, imagenet, interaction, mesh, "
    "schedule, structured",
    "run table=schedule": "scale= is missing",
    "run table=schedul scale=smoke": "table=schedul does not exist; did you mean schedule?",
    "run table=schedule scale=smok": "scale=smok does not exist; did you mean smoke?",
    "run table=schedule scale=smoke job=2": "job=2: job is not an argument; did you mean jobs?",
    "run table=schedule scale=smoke jobs=two": "jobs=two: Value 'two' of type 'str' could not be converted to Integer",
    "run table=schedule scale=smoke retry=maybe": "retry=maybe: Value 'maybe' is not a valid bool",
    "run table=schedule scale=smoke seed=1": "seed=1: a table sets seed itself (see seeds=)",
    "run table=alignment scale=smoke init_from=a.pth": "init_from: row 'Monte Carlo, 1 pass' of this table starts from",
    "run table=schedule scale=smoke overwrite=true": "overwrite=true: a table sets overwrite itself",
    "run table=schedule scale=smoke seeds=a": "seeds=a: a number, or numbers with commas",
    "run table=schedule scale=smoke seeds=0": "seeds=0: a number of seeds from 1",
    "run table=schedule scale=smoke optim.lrr=1": "optim.lrr is no key of the config; did you mean optim.lr?",
    "run table=schedule scale=smoke launcher=sge": "launcher=sge does not exist; choices: local, slurm",
    "run table=schedule scale=smoke until=forever": "until=forever does not exist; choices: planned, decided",
    "run table=schedule scale=smoke until=decided max_seeds=2": "max_seeds=2 must be 3 or more",
    "run table=schedule scale=smoke until=decided seeds=2": "leave out seeds=",
    "plan table=schedule scale=smoke delta=1 power=2": "power=2.0 must be between 0 and 1",
    "plan table=schedule scale=smoke delta=1 deviation=-1": "deviation=-1.0 must be above 0",
    "run table=best scale=cpu until=decided": "follows docs/protocol.md, which fixes when it ends",
    "plan table=schedule scale=smoke delta=1": "no 3 seeds are finished; say deviation=, such as 1.2",
    "report table=best scale=smoke": "table=best is not tuned yet: 60 runs are missing; run it first",
    "report table=schedule scale=smoke": "no run of table=schedule scale=smoke is finished yet",
    "report table=schedule scale=smoke records=nowhere": "nowhere has no records of a table",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=str)
def test_a_mistake_is_one_line_with_the_way_out(words, message, tmp_path):
    words = words.split()
    place = [f"output={tmp_path}", f"results={tmp_path}"] if len(words) > 2 else []
    with pytest.raises(ConfigError) as error:
        reproduce.main([*words, *place])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_other_words_are_overrides_of_every_run():
    _, overrides = reproduce.read(["run", "table=a", "data.root=/data", "model=deit_tiny", "+model.args.qk_norm=true"])
    assert overrides == ("data.root=/data", "model=deit_tiny", "+model.args.qk_norm=true")


# ------------------------------------------------------------------------------------------------------- real runs


def test_run_trains_evaluates_tunes_and_reports(finished, place):
    assert finished.returncode == 0, finished.stdout + finished.stderr
    names = {path.name for path in (place / "results" / "mini-smoke").iterdir()}
    expected = {"report.md", "report.html", "report.tex", "report.csv", "report.json", "forest.svg", "curves.svg"}
    assert expected | {"records.jsonl", "entropy.svg", "claims.svg"} == names


def test_the_report_has_the_entropy_of_attention(finished, place):
    runs = json.loads((place / "results" / "mini-smoke" / "report.json").read_text())["runs"]
    assert all(0 < run["entropy"] <= 1 for run in runs)


def test_the_same_command_again_starts_nothing_and_reports_the_same_bytes(finished, place):
    directory = place / "results" / "mini-smoke"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    again = call(place, "run", "seeds=1", "jobs=2")
    assert again.returncode == 0 and "start " not in again.stdout
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_the_report_from_its_records_is_the_report_from_the_runs(finished, place):
    directory = place / "results" / "mini-smoke"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    again = call(place, "report", f"records={directory / 'records.jsonl'}")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_finished_records_stand_for_runs_that_are_gone(finished, place, tmp_path):
    shutil.copytree(place / "results", tmp_path / "results")
    words = ("seeds=1", f"output={tmp_path}/runs", f"results={tmp_path}/results")
    planned = call(place, "plan", *words)
    assert "0 trainings, 0 evaluations: ; 3 more are finished in the records" in planned.stdout, planned.stderr
    again = call(place, "run", *words)
    assert again.returncode == 0 and "start " not in again.stdout, again.stdout + again.stderr
    for name in ("report.md", "records.jsonl"):
        written = tmp_path / "results" / "mini-smoke" / name
        assert written.read_bytes() == (place / "results" / "mini-smoke" / name).read_bytes()


def test_records_of_other_overrides_are_neither_used_nor_overwritten(finished, place, tmp_path):
    done = call(place, "plan", "seeds=1", f"output={tmp_path}/runs", "optim.weight_decay=0.1")
    assert done.returncode == 2 and "give another results=, or move it away" in done.stderr


def mini_table(place: Path, seeds=(0,), overrides=()) -> tables.Table:
    return tables.load(str(place / "mini.yaml"), "smoke", seeds, overrides)


def test_a_run_of_a_table_is_the_run_of_train_py(finished, place):
    job = jobs_of(mini_table(place, overrides=SHORT), str(place / "runs"))["dropkey", "ViT 2 x 32", 0]
    command = [sys.executable, "train.py", *job.overrides]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout.startswith("done already")


def test_plan_counts_what_is_done_and_takes_the_time_from_finished_runs(finished, place):
    done = call(place, "plan", "seeds=2")
    assert "4 trainings, 2 evaluations: 3 done, 3 missing" in done.stdout, done.stderr
    assert re.search(r"about \d+:\d\d ", done.stdout)


def test_plan_says_where_the_time_is_not_known(place):
    done = call(place, "plan", "seeds=1", f"output={place}/elsewhere", f"results={place}/elsewhere")
    assert "3 jobs of unknown length: no run of their model and data is finished" in done.stdout
    assert "about" not in done.stdout and not (place / "elsewhere").exists()


def test_a_table_of_another_task_is_reported_with_its_metric(tmp_path):
    (tmp_path / "points.yaml").write_text(
        "title: Points\nbaseline: none\nrows:\n  none: regularizer=none\n  dropkey: regularizer=dropkey\n"
        "  passes: { of: dropkey, evaluate: eval.monte_carlo=2 }\nclaims: [dropkey > none]\n"
    )
    overrides = (*runs.SMALL, *regression_task.OVERRIDES, "trainer.epochs=2")
    table = tables.load(str(tmp_path / "points.yaml"), "smoke", (0, 1), overrides)
    found = jobs_of(table, str(tmp_path / "runs"))
    for job in distinct(found):
        if job.evaluation:
            evaluation.evaluate_run(dataclasses.replace(job.evaluation, run=str(job.run)), job.config, job.run)
        else:
            session.train(job.config, RunDirectory(job.run))
    head, records = results.gather(table, found)
    assert {entry["state"] for entry in records} == {DONE}
    text = report.write(
        compare(table, head, records, versions.require_one_version(head, records, False)), tmp_path / "report"
    )
    metric = regression_task.Regression.metrics[0]
    assert f"last epoch: {metric.label}" in text and f"a lower {metric.label} is better" in text
    for row in ("none", "dropkey", "passes"):
        mean = sum(entry[metric.key] for entry in records if entry["row"] == row) / 2
        assert f"| {row} | {mean:.{metric.digits}f} ± " in text


# ------------------------------------------------------------------------------------------------------ outdated runs


@pytest.fixture
def outdated(place, tmp_path, stand_in):
    """Arguments for a table of one finished run, trained by other code than today's, and two missing jobs."""
    todo = distinct(jobs_of(mini_table(place), str(tmp_path / "runs")))
    standing_in.announce(todo, tmp_path / "runs")
    standing_in.main("train.py", list(todo[0].overrides))
    run = RunDirectory(todo[0].run)
    run.write_result("summary.json", {**run.summary(), "code": {"engine": "old"}})
    common = [f"table={place}/mini.yaml", "scale=smoke", "seeds=1", f"output={tmp_path}/runs"]
    return [*common, f"results={tmp_path}/results", "entropy=false"]


def starts(tmp_path) -> list[str]:
    return [line.split("-")[1] for line in (tmp_path / "runs" / "starts.txt").read_text().splitlines()[1:]]


def test_run_refuses_to_add_to_outdated_runs_before_it_trains(outdated, tmp_path):
    with pytest.raises(ConfigError) as error:
        reproduce.main(["run", *outdated])
    assert "1 finished runs cannot be compared with new runs: vit_2x32-dropkey-0.3-digits-s0-" in str(error.value)
    assert "because the code of engine has changed" in str(error.value)
    assert all(way in str(error.value) for way in ("outdated=retrain", "mixed=true", "output="))
    assert starts(tmp_path) == []


def test_plan_names_outdated_runs(outdated, capsys):
    reproduce.main(["plan", *outdated])
    assert "cannot be compared with new runs: vit_2x32-dropkey-0.3-digits-s0-" in capsys.readouterr().out


def test_outdated_runs_are_trained_again_on_request(outdated, tmp_path):
    assert reproduce.main(["run", *outdated, "outdated=retrain"]) == 0
    assert sorted(starts(tmp_path)) == ["dropkey", "dropkey", "none"]


def test_outdated_runs_are_compared_on_request_and_the_report_shows_it(outdated, tmp_path):
    assert reproduce.main(["run", *outdated, "mixed=true"]) == 0
    assert sorted(starts(tmp_path)) == ["dropkey", "none"]
    assert "Versions are mixed on request" in (tmp_path / "results" / "mini-smoke" / "report.md").read_text()


# ----------------------------------------------------------------------------------------------------------- Slurm


def test_jobs_run_on_a_cluster(place, stand_in, tmp_path):
    todo = distinct(jobs_of(mini_table(place), str(tmp_path / "runs")))
    standing_in.announce(todo, tmp_path / "runs")
    submit = slurm.submitter({"cluster": "local", "timeout_min": "5"}, tmp_path / "runs", gpus=0)
    states = Launcher(todo, slurm.queue_slots(2, 1, "1"), start=submit).run()
    assert {one.state for one in states} == {DONE}


def is_job(cmdline: Path, folder: Path) -> bool:
    try:
        words = cmdline.read_bytes()
    except OSError:  # gone by now
        return False
    return b"submitit.core._submit" in words and str(folder).encode() in words


def test_a_preempted_job_saves_queues_again_and_goes_on(place, stand_in, tmp_path, monkeypatch):
    job = distinct(jobs_of(mini_table(place), str(tmp_path / "runs")))[0]
    standing_in.announce([job], tmp_path / "runs")
    job.run.mkdir()
    monkeypatch.setenv("BEHAVIOUR", json.dumps({"dropkey": "wait once"}))
    submit = slurm.submitter({"cluster": "local", "timeout_min": "5"}, tmp_path / "runs", gpus=0)
    (slot,) = slurm.queue_slots(1, 1, "1")
    submitted = submit(slot.command(job), slot.environment(), job.log)
    deadline = time.monotonic() + 100
    while not (job.run / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    (process,) = [path.parent for path in Path("/proc").glob("*/cmdline") if is_job(path, tmp_path)]
    os.kill(int(process.name), signal.SIGUSR2)  # what Slurm sends before the time limit
    while submitted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert submitted.poll() == 0 and jobs.state(job)[0] == DONE
    assert len((tmp_path / "runs" / "starts.txt").read_text().splitlines()) == 2


def test_slurm_without_a_cluster_is_one_line(tmp_path):
    if os.environ.get("SLURM_JOB_ID"):
        pytest.skip("there is a cluster")
    with pytest.raises(ConfigError, match="launcher=slurm"):
        slurm.submitter({}, tmp_path, gpus=1)


def test_an_unknown_parameter_of_slurm_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"launcher=slurm: .*partitoin"):
        slurm.submitter({"cluster": "local", "partitoin": "gpu"}, tmp_path, gpus=1)


def test_records_leave_out_overrides_without_effect(place):
    table = mini_table(place, overrides=("data.root=/somewhere", "optim.lr=1e-3"))
    head, _ = results.gather(table, jobs_of(table, "nowhere"))
    assert head["overrides"] == ["optim.lr=1e-3"]
