"""scripts/reproduce.py: its words, its three actions with real runs, and Slurm (submitit's local stand-in)."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dropkey.errors import ConfigError
from dropkey.reproduction import jobs, plan, results, slurm, tables
from dropkey.reproduction.jobs import DONE
from dropkey.reproduction.runner import Launcher

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce.py"
spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)
TABLE = """
title: Everything that a row can be
baseline: none
rows:
  none: regularizer=none
  dropkey: regularizer=dropkey regularizer.ratio=0.3
  two passes: { of: dropkey, evaluate: eval.monte_carlo=2 }
  tuned: { of: dropkey, train: regularizer=none trainer.max_steps=3 }
claims: [dropkey > none]
"""
SHORT = ("trainer.epochs=2", "data.max_train_samples=64")


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


# ----------------------------------------------------------------------------------------------------------- words

WRONG = {
    "paln": "paln is no action; choices: plan, run, report",
    "run": "table= is missing; choices: alignment, cifar, controls, imagenet, schedule, structured",
    "run table=schedule": "scale= is missing",
    "run table=schedul scale=smoke": "table=schedul does not exist; did you mean schedule?",
    "run table=schedule scale=smok": "scale=smok does not exist; did you mean smoke?",
    "run table=schedule scale=smoke job=2": "job=2 is no option; did you mean jobs?",
    "run table=schedule scale=smoke jobs=two": "jobs=two must be a whole number",
    "run table=schedule scale=smoke retry=yes": "retry=yes must be true or false",
    "run table=schedule scale=smoke seed=1": "seed=1: a table sets seed itself; take seeds=",
    "run table=schedule scale=smoke overwrite=true": "overwrite=true: a table sets overwrite itself",
    "run table=schedule scale=smoke seeds=a": "seeds=a: a number, or numbers with commas",
    "run table=schedule scale=smoke seeds=0": "seeds=(): a number of seeds from 1",
    "run table=schedule scale=smoke optim.lrr=1": "optim.lrr is no key of the config; did you mean optim.lr?",
    "run table=schedule scale=smoke launcher=sge": "launcher=sge; choices: local, slurm",
    "report table=schedule scale=smoke": "no run of table=schedule scale=smoke is done yet",
    "report table=schedule scale=smoke records=nowhere": "nowhere holds no records of a table",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=str)
def test_a_mistake_is_one_line_with_the_way_out(words, message, tmp_path):
    words = words.split()
    with pytest.raises(ConfigError) as error:
        reproduce.main([*words, f"output={tmp_path}"] if len(words) > 2 else words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_other_word_goes_to_all_runs():
    _, options = reproduce.read(["run", "table=a", "data.root=/data", "model=deit_tiny", "+model.args.qk_norm=true"])
    assert options.extra == ["data.root=/data", "model=deit_tiny", "+model.args.qk_norm=true"]


# ------------------------------------------------------------------------------------------------------- real runs


def test_run_trains_evaluates_tunes_and_reports(finished, place):
    assert finished.returncode == 0, finished.stdout + finished.stderr
    names = {path.name for path in (place / "results" / "mini-smoke").iterdir()}
    expected = {"report.md", "report.html", "report.tex", "report.csv", "report.json", "forest.svg", "curves.svg"}
    assert expected | {"records.jsonl", "entropy.svg"} == names


def test_the_report_has_the_entropy_of_attention(finished, place):
    runs = json.loads((place / "results" / "mini-smoke" / "report.json").read_text())["runs"]
    assert all(0 < run["entropy"] <= 1 for run in runs)


def test_the_same_command_again_starts_nothing_and_reports_the_same_bytes(finished, place):
    directory = place / "results" / "mini-smoke"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    began = time.monotonic()
    again = call(place, "run", "seeds=1", "jobs=2")
    assert again.returncode == 0 and "start " not in again.stdout
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert time.monotonic() - began < 60  # no training, no torch: a second or two


def test_the_report_from_its_records_is_the_report_from_the_runs(finished, place):
    directory = place / "results" / "mini-smoke"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    again = call(place, "report", f"records={directory / 'records.jsonl'}")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_run_of_a_table_is_the_run_of_train_py(finished, place):
    task = next(task for (row, _, _), task in mini_tasks(place).items() if row == "dropkey")
    again = subprocess.run(
        [sys.executable, "train.py", *task.words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert again.returncode == 0 and again.stdout.startswith("done already")


def mini_tasks(place: Path) -> dict:
    return jobs.jobs_of(tables.load(str(place / "mini.yaml"), "smoke", (0,), SHORT), str(place / "runs"))


def test_plan_counts_what_is_done_and_tries_nothing_where_a_run_tells_the_time(finished, place):
    done = call(place, "plan", "seeds=2")
    assert "6 trainings, 2 evaluations: 4 done, 4 missing" in done.stdout, done.stderr
    assert "trying" not in done.stdout and "to do: about" in done.stdout


def test_plan_probes_where_nothing_is_known_and_remembers(place):
    words = ("seeds=1", f"output={place}/elsewhere")
    first = call(place, "plan", *words)
    assert "trying vit_2x32 on digits for 12 steps" in first.stdout, first.stderr
    assert "trying" not in call(place, "plan", *words).stdout
    assert not list((place / "elsewhere").glob(".probe-*"))


def test_a_probe_counts_all_epochs_and_evaluations():
    table = tables.load("schedule", "cpu", (0,))
    composed = jobs.Composed("x", {}, "m", "d", 8, None, epochs=10, max_steps=None, batch_size=32, eval_every=5)
    task = jobs.Job("train.py", (), Path(table.name), "summary.json", composed)
    summary = {"samples_per_second": 64.0, "steps": 4, "steps_per_epoch": 20, "seconds": 3.0, "images": 100}
    cost = plan.extrapolate(task, summary, wall=9.0, size=7)
    # 6 s around it, 10 x 20 steps of 0.5 s, 2 evaluations of 1 s
    assert (cost.seconds, cost.startup, cost.bytes) == (6 + 100 + 2, 6, 7)


# ----------------------------------------------------------------------------------------------------------- Slurm


def test_tasks_run_as_jobs_of_a_cluster(place, stand_in, tmp_path):
    table = tables.load(str(place / "mini.yaml"), "smoke", (0,))
    todo = plan.distinct(jobs.jobs_of(table, str(tmp_path / "runs")).values())
    start = slurm.starter({"cluster": "local", "timeout_min": "5"}, tmp_path / "runs", gpus=0)
    items = Launcher(todo, slurm.slots(2, 1, 1), start=start).run()
    assert {item.state for item in items} == {DONE}


def is_job(cmdline: Path, folder: Path) -> bool:
    try:
        words = cmdline.read_bytes()
    except OSError:  # gone by now
        return False
    return b"submitit.core._submit" in words and str(folder).encode() in words


def test_a_preempted_job_saves_queues_again_and_goes_on(place, stand_in, tmp_path, monkeypatch):
    table = tables.load(str(place / "mini.yaml"), "smoke", (0,))
    task = next(iter(jobs.jobs_of(table, str(tmp_path / "runs")).values()))
    task.run.mkdir()
    monkeypatch.setenv("BEHAVIOUR", json.dumps({"none": "wait once"}))
    start = slurm.starter({"cluster": "local", "timeout_min": "5"}, tmp_path / "runs", gpus=0)
    (slot,) = slurm.slots(1, 1, 1)
    submitted = start(slot.command(task), slot.environment(), task.log)
    deadline = time.monotonic() + 100
    while not (task.run / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    (job,) = [path.parent for path in Path("/proc").glob("*/cmdline") if is_job(path, tmp_path)]
    os.kill(int(job.name), signal.SIGUSR2)  # what Slurm sends before the time limit
    while submitted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert submitted.poll() == 0 and jobs.state(task)[0] == DONE
    assert len((tmp_path / "runs" / "starts.txt").read_text().split()) == 2


def test_slurm_without_a_cluster_is_one_line(tmp_path):
    if os.environ.get("SLURM_JOB_ID"):
        pytest.skip("there is a cluster")
    with pytest.raises(ConfigError, match="launcher=slurm"):
        slurm.starter({}, tmp_path, gpus=1)


def test_an_unknown_parameter_of_slurm_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"launcher=slurm: .*partitoin"):
        slurm.starter({"cluster": "local", "partitoin": "gpu"}, tmp_path, gpus=1)


def test_records_leave_out_what_only_one_machine_has(place):
    table = tables.load(str(place / "mini.yaml"), "smoke", (0,), ("data.root=/somewhere", "optim.lr=1e-3"))
    assert results.header(table)["extra"] == ["optim.lr=1e-3"]
