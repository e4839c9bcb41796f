"""Tables: their YAML, the runs they need, and what runs them. A stand-in trains where the launcher is the matter."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dropkey.config import check, compose, identity
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory
from dropkey.reproduction import jobs, runner, slots, tables
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, MISSING
from dropkey.reproduction.plan import distinct
from dropkey.reproduction.runner import Launcher

ROOT = Path(__file__).parents[1]
SCALES = ("smoke", "cpu", "small", "paper")
MINI = """
title: A small table
baseline: none
rows:
  none: regularizer=none
  dropkey: regularizer=dropkey regularizer.ratio=0.3
  several passes: { of: dropkey, evaluate: eval.monte_carlo=4 }
  tuned: { of: dropkey, train: regularizer=none trainer.epochs=5 }
claims: [dropkey > none]
"""


@pytest.fixture(scope="module")
def compositions(tmp_path_factory):
    """A directory in which compositions are remembered: composing takes a third of a second."""
    return tmp_path_factory.mktemp("compositions")


@pytest.fixture
def mini(tmp_path):
    file = tmp_path / "mini.yaml"
    file.write_text(MINI)
    return file


def launched(table, output: Path, at_once: int = 2, **options) -> dict[str, runner.JobState]:
    """Run directory's name -> job, after a launch of the whole table."""
    todo = distinct(jobs.jobs_of(table, str(output)).values())
    items = Launcher(todo, slots.slots(at_once, "none", 1, 1), **options).run()
    return {item.job.name: item for item in items}


def started(output: Path) -> collections.Counter:
    return collections.Counter((output / "starts.txt").read_text().split())


# ------------------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", tables.names())
def test_every_table_has_every_scale(name, scale):
    table = tables.load(name, scale)
    assert table.rows and table.columns and table.seeds and table.about


@pytest.mark.parametrize("name", tables.names())
def test_every_row_of_every_table_composes(name, compositions):
    table = tables.load(name, "smoke", seeds=(0,))
    assert len(jobs.jobs_of(table, str(compositions))) == len(table.rows) * len(table.columns)


@pytest.mark.parametrize("scale", SCALES)
def test_every_column_of_every_scale_composes(scale, compositions):
    for name in tables.names():
        table = tables.load(name, scale)
        for words in table.columns.values():
            jobs.Compositions(compositions).get((*words, "regularizer=dropkey"))


@pytest.mark.parametrize("name", tables.names())
def test_every_table_says_in_its_header_what_it_claims_and_how_to_run_it(name):
    text = (tables.TABLES / f"{name}.yaml").read_text()
    assert "# Claim:" in text and f"# Command: make table TABLE={name} SCALE=" in text


WRONG = {
    ("title", "tilte"): "tilte is no key of a table; did you mean title?",
    ("baseline: none", "baseline: nothing"): "baseline 'nothing' is no row",
    ("dropkey > none", "dropkey > nothing"): "claim 'dropkey > nothing'",
    ("of: dropkey, evaluate", "of: drop, evaluate"): "row 'several passes' is of 'drop', which is no row",
    ("regularizer=none\n", "none\n"): "row 'none': 'none' is no key=value",
    (
        "evaluate: eval.monte_carlo=4",
        "evaluate: eval.device=cpu",
    ): "row 'several passes', column 'ViT 2 x 32': a row may evaluate",
    ("regularizer.ratio=0.3", "regularizer.ratio=3"): "row 'dropkey', column 'ViT 2 x 32': regularizer.ratio=3",
    ("rows:", "rows: [1, 2]\nold:"): "rows",
}


@pytest.mark.parametrize(("change", "message"), WRONG.items(), ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_table_is_one_line_that_names_it(change, message, mini, tmp_path):
    mini.write_text(MINI.replace(*change))
    with pytest.raises(ConfigError) as error:
        jobs.jobs_of(tables.load(str(mini), "smoke"), str(tmp_path / "runs"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_table_or_scale_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean schedule"):
        tables.load("shedule", "smoke")
    with pytest.raises(ConfigError, match="did you mean small"):
        tables.load("schedule", "smal")


def test_a_row_of_ones_own_needs_one_line_in_a_copy(mini, tmp_path):
    mini.write_text(MINI.replace("claims", "  mine: regularizer=dropkey regularizer.ratio=0.2\nclaims"))
    table = tables.load(str(mini), "smoke")
    assert len(distinct(jobs.jobs_of(table, str(tmp_path)).values())) == 5 * len(table.seeds)


# ----------------------------------------------------------------------------------------------------------- tasks


def test_a_task_knows_the_directory_that_train_py_will_use(mini, tmp_path):
    table = tables.load(str(mini), "smoke", seeds=(3,), extra=("optim.lr=3e-3",))
    for task in jobs.jobs_of(table, str(tmp_path / "runs")).values():
        if task.script == "train.py":
            words = [word for word in task.words if not word.startswith("init_from=")]
            cfg = check.check(compose.compose(words))
            cfg.init_from = next((w.split("=", 1)[1] for w in task.words if w.startswith("init_from=")), None)
            assert identity.run_directory(cfg) == task.run


def test_the_name_of_a_fine_tuned_run_does_not_depend_on_whether_its_start_exists(mini, tmp_path):
    table = tables.load(str(mini), "smoke", seeds=(0,))
    before = jobs.jobs_of(table, str(tmp_path))["tuned", "ViT 2 x 32", 0]
    before.needs.run.mkdir(parents=True)
    words = [word for word in before.words if not word.startswith("init_from=")]
    cfg = check.check(compose.compose(words))
    cfg.init_from = str(before.needs.run)
    assert identity.run_directory(cfg) == before.run


def test_tables_share_the_runs_they_have_in_common(tmp_path):
    runs = [
        {task.run for task in jobs.jobs_of(tables.load(name, "smoke", (0,)), str(tmp_path)).values()}
        for name in ("schedule", "controls", "structured")
    ]
    assert len(set.intersection(*runs)) == 2  # no regularizer; DropKey, decreasing


def test_compositions_are_kept_until_a_config_changes(mini, tmp_path, monkeypatch):
    table = tables.load(str(mini), "smoke")
    first = jobs.jobs_of(table, str(tmp_path))
    monkeypatch.setattr(jobs, "summarise", lambda words: pytest.fail("composed again"))
    assert jobs.jobs_of(table, str(tmp_path)) == first
    monkeypatch.setattr(jobs, "sources", lambda: "another version")
    with pytest.raises(pytest.fail.Exception):
        jobs.jobs_of(table, str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- slots


def test_runs_at_once_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [slot.threads for slot in slots.slots(4, "none", 1, 1)] == [2, 2, 2, 2]
    assert [slot.threads for slot in slots.slots(1, "none", 1, 1)] == [8]


@pytest.mark.parametrize("cores, jobs", [(1, 1), (2, 2), (64, 4)])
def test_without_a_gpu_there_is_a_run_per_core_up_to_four(cores, jobs, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert [slot.threads for slot in slots.slots(None, "none", 1, 1)] == [cores // jobs] * jobs


def test_several_runs_share_a_gpu():
    places = slots.slots(None, "0,1", 2, 1)
    assert sorted(slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in places) == ["0", "0", "1", "1"]


def test_a_run_on_several_gpus_goes_through_torchrun():
    (first, second) = slots.slots(None, "0,1,2,3", 1, 2)
    task = jobs.Job("train.py", ("a=1",), Path("runs/x"), "summary.json", None)
    assert "torch.distributed.run" in first.command(task) and "--nproc-per-node=2" in first.command(task)
    assert second.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(
    ("given", "message"),
    [((1, "none", 1, 2), "no GPU is visible"), ((1, "0", 2, 2), "one must be 1"), ((1, "0", 1, 4), "there are 1 GPUs")],
)
def test_slots_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        slots.slots(*given)


# ---------------------------------------------------------------------------------------------------------- runner


def test_everything_runs_once_and_a_second_launch_has_nothing_to_do(mini, tmp_path, stand_in):
    table, output = tables.load(str(mini), "smoke"), tmp_path / "runs"
    assert {job.state for job in launched(table, output).values()} == {DONE}
    launched(table, output)
    assert set(started(output).values()) == {1}
    assert len(started(output)) == 3 * len(table.seeds)


@pytest.fixture
def six(tmp_path):
    file = tmp_path / "six.yaml"
    rows = "\n".join(f"  r{i}: regularizer=dropkey regularizer.ratio=0.{i}" for i in (1, 2, 3))
    file.write_text(f"title: Six\nbaseline: r1\nrows:\n{rows}\n")
    return tables.load(str(file), "smoke")


def test_runs_that_raise_exit_die_or_diverge_leave_the_others_going(six, tmp_path, stand_in, monkeypatch):
    output = tmp_path / "runs"
    names = [task.run.name for task in jobs.jobs_of(six, str(output)).values()]
    bad = dict(zip(names[1:5], ("raise", "exit", "kill", "diverge"), strict=True))
    monkeypatch.setenv("BEHAVIOUR", json.dumps(bad))
    items = launched(six, output)
    assert [items[name].state for name in names] == [DONE, FAILED, FAILED, FAILED, DIVERGED, DONE]
    reasons = [items[name].reason for name in names[1:5]]
    assert "a made-up error" in reasons[0] and "exit code 7: leaving early" in reasons[1]
    assert "SIGKILL" in reasons[2] and reasons[3] == "loss nan"
    assert "a made-up error" in items[names[1]].job.log.read_text()

    before = started(output)
    monkeypatch.delenv("BEHAVIOUR")
    assert [launched(six, output)[name].state for name in names[1:5]] == [FAILED, FAILED, FAILED, DIVERGED]
    assert started(output) == before  # only when asked to
    assert {job.state for job in launched(six, output, retry=True).values()} == {DONE}
    assert [(started(output) - before)[name] for name in names] == [0, 1, 1, 1, 1, 0]


def test_what_fails_now_is_tried_again_as_often_as_asked(six, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"-s0-": "once"}')
    assert FAILED in {job.state for job in launched(six, tmp_path / "a").values()}
    assert {job.state for job in launched(six, tmp_path / "b", retries=1).values()} == {DONE}


def test_what_depends_on_a_failed_run_says_so(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"dropkey-digits": "exit"}')
    jobs = launched(tables.load(str(mini), "smoke", (0,)), tmp_path / "runs")
    assert sum("it needs" in job.reason for job in jobs.values()) == 2
    assert collections.Counter(job.state for job in jobs.values()) == {DONE: 1, FAILED: 3}


def test_a_run_that_somebody_stops_is_left_to_be_resumed_and_so_is_what_needs_it(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"dropkey-digits": "stop"}')
    table = tables.load(str(mini), "smoke", (0,))
    jobs = launched(table, tmp_path / "runs")
    assert collections.Counter(job.state for job in jobs.values()) == {DONE: 1, INTERRUPTED: 3}
    monkeypatch.delenv("BEHAVIOUR")
    assert {job.state for job in launched(table, tmp_path / "runs").values()} == {DONE}


LAUNCH = """
import json, sys
from pathlib import Path
sys.path[:0] = {path}
from dropkey.reproduction import runner, slots, tables, jobs, plan
slots.SCRIPTS = Path({scripts!r})
table = tables.load({table!r}, "smoke", (0, 1, 2))
todo = plan.distinct(jobs.jobs_of(table, {output!r}).values())
launcher = runner.Launcher(todo, slots.slots(2, "none", 1, 1))
jobs = launcher.run()
print(json.dumps([[job.state for job in jobs], launcher.stopped]))
"""


def launcher_process(mini, scripts, output) -> subprocess.Popen:
    code = LAUNCH.format(path=[str(ROOT)], scripts=str(scripts), table=str(mini), output=str(output))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_launchers_at_once_run_nothing_twice_and_both_see_all_done(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.3")
    output = tmp_path / "runs"
    jobs.jobs_of(tables.load(str(mini), "smoke", (0, 1, 2)), str(output))
    both = [launcher_process(mini, stand_in, output) for _ in range(2)]
    for process in both:
        states, _ = json.loads(process.communicate(timeout=120)[0])
        assert set(states) == {DONE}
    assert set(started(output).values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_lets_its_runs_save_and_the_next_one_goes_on(number, mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"dropkey": "sleep"}')
    output = tmp_path / "runs"
    process = launcher_process(mini, stand_in, output)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(output.glob("*dropkey*/status.json")):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    states, stopped = json.loads(process.communicate(timeout=60)[0])
    assert stopped == number and INTERRUPTED in states
    monkeypatch.delenv("BEHAVIOUR")
    jobs = launched(tables.load(str(mini), "smoke", (0, 1, 2)), output)
    assert {job.state for job in jobs.values()} == {DONE}


def test_a_launcher_killed_outright_loses_nothing(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("PAUSE", "1")
    output = tmp_path / "runs"
    process = launcher_process(mini, stand_in, output)
    while not list(output.glob("*/status.json")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    jobs = launched(tables.load(str(mini), "smoke", (0, 1, 2)), output)  # while its runs still go on
    assert {job.state for job in jobs.values()} == {DONE}
    assert max(started(output).values()) <= 2  # a second start finds the run locked or done


def test_the_state_of_a_run_whose_process_died_is_interrupted(tmp_path):
    task = jobs.Job("train.py", (), tmp_path / "run", "summary.json", None)
    assert jobs.state(task) == (MISSING, "")
    RunDirectory(task.run).set_status("running")
    status = RunDirectory(task.run).status()
    (task.run / "status.json").write_text(json.dumps({**status, "pid": 2**22 + 1}))
    assert jobs.state(task)[0] == INTERRUPTED
