"""Hydra's launchers and sweepers, W&B sweeps and the search with Optuna (faults 21, 27, 28)."""

import copy
import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
import wandb
from hydra.experimental.callback import Callback
from wandb.sdk.launch.sweeps.utils import load_sweep_config
from wandb.wandb_agent import Agent

import runs
from dropkey import cli, session
from dropkey.commands import search, train
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.config.identity import run_directory
from dropkey.engine import tracking
from dropkey.errors import Busy, ConfigError, DataError, Diverged, Interrupted, RunError, StorageError
from dropkey.records import RunDirectory

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

# --------------------------------------------------------------------------------------- what a sweeper plugin sees


class Returned(Callback):
    """Of each job what a launcher hands to the sweeper."""

    values: ClassVar[list[float]] = []

    def on_job_end(self, config, job_return, **_) -> None:
        self.values.append(job_return.return_value)


def test_a_sweeper_is_given_the_metric_of_each_job_finished_ones_included(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Returned, "values", [])
    monkeypatch.setattr(train, "headline", lambda summary: "")

    def trained(cfg, run):
        summary = {**RESULT, "objective": 40.0 + cfg.seed, "run": str(run.path)}
        run.set_status("done")
        run.write_result("summary.json", summary)
        return summary

    monkeypatch.setattr(session, "train", trained)
    words = ["-m", "seed=1,2", f"output={tmp_path}", "+hydra.callbacks.test._target_=test_sweeps.Returned"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    for said in ("next ", "done already"):
        with cli.command():
            train.main()
        assert capsys.readouterr().out.count(said) == 2
    assert Returned.values == [41.0, 42.0] * 2


def test_the_metric_is_that_of_the_last_epoch_on_the_validation_split(tmp_path):
    cfg = runs.config(tmp_path)
    value = train.train(cfg)
    run = RunDirectory(run_directory(cfg))
    assert value == pytest.approx(run.records("epoch")[-1]["eval_top1"])
    assert run.summary()["best_split"] == "val"


# ------------------------------------------------------------------------------------------------ Hydra's launchers

JOBS = """
    import os, signal
    from pathlib import Path
    import hydra
    from dropkey import cli
    from dropkey.config.compose import CONFIGS, register_schemas, typed
    from dropkey.errors import Diverged, Interrupted

    register_schemas()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def main(cfg):
        with cli.job():
            task(typed(cfg))

    def task(cfg):  # in place of a training, which takes ten seconds to import torch
        (Path(cfg.output) / str(cfg.seed)).write_text(os.environ.get("OMP_NUM_THREADS", ""))
        if cfg.seed == 1:
            raise Diverged("loss nan")
        if cfg.seed == 100:
            raise ZeroDivisionError("division by zero")
        if cfg.seed == 1000:
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        with cli.command():
            main()
"""
RESULT = {"objective": 50.0, "top1": 50.0, "samples": 1, "epochs": 1, "seconds": 1.0, "best_split": "val"}
RESULT["metrics"] = [{"key": "top1", "label": "top-1", "unit": "%"}]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}


def multirun(launcher: str, output: Path, seeds: str) -> tuple[int, str, dict[str, str]]:
    """Exit code, standard error and, for each job that began, how many threads it was told to take."""
    (output / "jobs.py").write_text(textwrap.dedent(JOBS))
    (output / "begun").mkdir()
    words = ["-m", f"seed={seeds}", f"output={output / 'begun'}", *LAUNCHERS[launcher]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(output / "jobs.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr, {p.name: p.read_text() for p in (output / "begun").iterdir() if p.is_file()}


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "launcher, seed, code, message",
    [("joblib", 1, 4, "error: loss nan"), ("submitit", 100, 1, "error: ZeroDivisionError: division by zero")],
)
def test_a_failing_job_leaves_the_others_going_and_gives_the_exit_code(launcher, seed, code, message, tmp_path):
    found, error, begun = multirun(launcher, tmp_path, f"{seed},2,3")
    assert (found, set(begun)) == (code, {str(seed), "2", "3"})
    assert error.splitlines()[-1] == message
    if launcher == "joblib" and hasattr(os, "sched_getaffinity"):  # two jobs that took all cores would stall each other
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert all(1 <= int(threads) <= share for threads in begun.values())


@pytest.mark.fault(28)
def test_a_killed_worker_of_joblib_ends_in_one_line(tmp_path):
    code, error, _ = multirun("joblib", tmp_path, "1000,2")
    assert code == 1
    assert re.fullmatch(r"error: a job was lost \(.*\); the same command goes on with the rest\n", error)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_train_py_itself_runs_under_every_launcher(launcher, tmp_path):
    """On finished runs, which need no torch."""
    words = ["logger=none", f"output={tmp_path}"]
    for seed in (0, 1):
        run = RunDirectory(run_directory(check(compose([*words, f"seed={seed}"]))))
        run.set_status("done")
        run.write_result("summary.json", {**RESULT, "run": str(run.path)})
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, "seed=0,1", *LAUNCHERS[launcher]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    written = done.stdout + "".join(file.read_text() for file in tmp_path.rglob("*.out"))
    assert written.count("done already") == 2


# -------------------------------------------------------------------------------------------------------- W&B sweeps

SWEEPS = sorted((ROOT / "scripts").glob("sweep_*.yaml"))


def agent_command(monkeypatch, directory: Path, sweep: dict, values: dict) -> list[str]:
    """What `wandb agent` starts when the server has drawn `values`, by its own code."""
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them; put back after the test
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "swe3pabc")
    monkeypatch.setenv("WANDB_DIR", str(directory))
    started = []
    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", lambda command, **_: started.append(command) or NoProcess())
    agent = Agent(api=None, queue=None, sweep_id="swe3pabc")
    agent._sweep_command = list(sweep["command"])
    arguments = {key: {"value": value} for key, value in values.items()}
    response = agent._process_command(
        {"id": 1, "type": "run", "run_id": "agentsrun", "program": sweep["program"], "args": arguments}
    )
    assert "exception" not in response, response
    return started[0]


class NoProcess:
    last_sigterm_time = None


def drawn(parameter: dict) -> list:
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_command_of_a_wandb_agent_composes(file, tmp_path, monkeypatch):
    sweep = load_sweep_config(str(file))
    first = {key: drawn(parameter)[0] for key, parameter in sweep["parameters"].items()}
    for key, parameter in sweep["parameters"].items():
        for value in drawn(parameter):
            command = agent_command(monkeypatch, tmp_path, sweep, first | {key: value})
            assert command[:3] == ["/usr/bin/env", "python", "train.py"]
            cfg = check(compose(command[3:]))
            assert cfg.logger.mode == "online"  # or the sweep would hear nothing
            assert cfg.data.val_fraction > 0  # or the metric would be one of the test split


def test_a_run_reports_the_sweeps_metric_to_the_agents_run(tmp_path, monkeypatch):
    sweep = load_sweep_config(str(SWEEPS[0]))
    agent_command(monkeypatch, tmp_path, sweep, {"optim.lr": 0.01})  # sets the environment of the training
    trained = tmp_path / "trained"
    record = runs.train(trained, "trainer.max_steps=1").records("epoch")[-1]
    wandb.teardown()  # an agent starts a process for each run; an earlier test of this one has read the environment
    tracker = tracking.start(runs.config(tmp_path, "logger=wandb"), tmp_path, print)
    try:
        tracker.log(record)
        assert (tracker.run.id, tracker.run.sweep_id) == ("agentsrun", "swe3pabc")
        assert tracker.run.summary[sweep["metric"]["name"]] == record["eval_top1"]
    finally:
        tracker.finish(None)
        wandb.teardown()


def test_a_run_that_was_finished_before_reports_to_the_agents_run_too(tmp_path, monkeypatch):
    agent_command(monkeypatch, tmp_path, load_sweep_config(str(SWEEPS[0])), {"optim.lr": 0.01})
    run = runs.train(tmp_path / "trained", "trainer.max_steps=2")
    told, finished = [], []
    monkeypatch.setattr(tracking.Wandb, "log", lambda self, record: told.append(record))
    monkeypatch.setattr(tracking.Wandb, "finish", lambda self, summary, picture: finished.append(summary))
    wandb.teardown()
    try:
        train.train(runs.config(tmp_path / "trained", "trainer.max_steps=2", "logger=wandb"))
    finally:
        wandb.teardown()
    assert told == run.records() and finished == [run.summary()]


def test_sweeps_maximise_validation_and_never_test():
    assert len(SWEEPS) == 2
    for file in SWEEPS:
        assert load_sweep_config(str(file))["metric"] == {"name": "epoch/eval_top1", "goal": "maximize"}


# ----------------------------------------------------------------------------------------------- Optuna: the search

SPACE = ("optim.lr=log:1e-4..1e-2", "regularizer.ratio=0..0.5")


class Trainings:
    """In place of train.train: what each call raises, if anything, and the configs it was given."""

    def __init__(self, *errors):
        self.errors, self.configs = list(errors), []

    def __call__(self, cfg) -> float:
        self.configs.append(cfg)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return 100 * cfg.regularizer.ratio + cfg.seed


@functools.lru_cache(maxsize=None)
def composed(*words: str):
    return check(compose(list(words)))


def compose_quickly(words: list[str]):
    """A config, which takes a while to compose, with the numbers that trials differ in filled in afterwards."""
    numbers = {"optim.lr": float, "regularizer.ratio": float, "seed": int}
    cfg = copy.deepcopy(composed(*(word for word in words if word.partition("=")[0] not in numbers)))
    for key, _, value in (word.partition("=") for word in words):
        if key in numbers:
            *parents, last = key.split(".")
            setattr(functools.reduce(getattr, parents, cfg), last, numbers[key](value))
    return cfg


@pytest.fixture
def searching(tmp_path, monkeypatch):
    """Searches with `trainings` in place of real ones; the directory of the searches is `tmp_path`."""

    def run(trainings, *words: str, trials: int = 3) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(train, "train", trainings)
        monkeypatch.setattr(search, "compose", compose_quickly)
        search.search([*(words or SPACE), f"trials={trials}"])

    return run


def trials_in(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{directory / 'runs' / 'search.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def states(directory: Path) -> list[str]:
    return [trial.state.name for trial in trials_in(directory)]


def test_a_trial_is_judged_by_what_train_py_returns(searching, tmp_path):
    trainings = Trainings()
    searching(trainings)
    for trial, cfg in zip(trials_in(tmp_path), trainings.configs, strict=True):
        assert trial.params == {"optim.lr": cfg.optim.lr, "regularizer.ratio": cfg.regularizer.ratio}
        assert 1e-4 <= cfg.optim.lr <= 1e-2 and 0 <= cfg.regularizer.ratio <= 0.5
        assert trial.value == pytest.approx(100 * cfg.regularizer.ratio)


def test_the_metric_decides_whether_more_is_better(searching, tmp_path, monkeypatch):
    metric = search.tasks.build(composed()).metrics[0]
    for higher in (True, False):
        task = type("Task", (), {"metrics": [type(metric)("error", "error", higher_is_better=higher)]})
        monkeypatch.setattr(search.tasks, "build", lambda cfg, task=task: task)
        assert search.Space(list(SPACE)).direction == ("maximize" if higher else "minimize")


def test_the_same_command_trains_nothing_again_and_more_trials_add(searching, tmp_path):
    trainings = Trainings()
    for trials, calls in ((2, 2), (2, 2), (3, 3)):
        searching(trainings, trials=trials)
        assert len(trainings.configs) == calls


@pytest.mark.parametrize(
    "error", [Interrupted("all saved", 15), KeyboardInterrupt(), DataError("a"), StorageError("b"), Busy("c")], ids=repr
)
def test_what_is_not_the_settings_fault_ends_the_search_and_its_trial_is_resumed(error, searching, tmp_path):
    trainings = Trainings(error)
    with pytest.raises(type(error)):
        searching(trainings, trials=1)
    searching(trainings, trials=1)
    assert trainings.configs[0] == trainings.configs[1]  # the same run, which is resumed
    assert states(tmp_path) == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("error", [Diverged("loss nan"), ConfigError("b"), RunError("out of memory")], ids=repr)
def test_a_trial_that_cannot_be_trained_is_pruned_with_its_reason(error, searching, tmp_path, capsys):
    searching(Trainings(error), trials=2)
    assert states(tmp_path) == ["PRUNED", "COMPLETE"]
    assert f"pruned, {error}" in capsys.readouterr().out


def test_the_trial_of_a_dead_process_is_trained_again(searching, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "HEARTBEAT", 1)
    with pytest.raises(SystemExit):  # Optuna files nothing, as when the process is killed
        searching(Trainings(SystemExit()), trials=1)
    (dead,) = trials_in(tmp_path)
    time.sleep(4)  # heartbeats are stored in whole seconds
    searching(Trainings(), trials=1)
    first, second = trials_in(tmp_path)
    assert (first.state.name, second.state.name, second.params) == ("FAIL", "COMPLETE", dead.params)


def test_seeds_are_averaged_not_searched(searching, tmp_path):
    trainings = Trainings()
    searching(trainings, "regularizer.ratio=0..0.5", "seed=0,2,4", trials=1)
    (trial,) = trials_in(tmp_path)
    assert [cfg.seed for cfg in trainings.configs] == [0, 2, 4]
    assert trial.value == pytest.approx(100 * trial.params["regularizer.ratio"] + 2)


def test_whole_numbers_and_choices_are_drawn_as_such(searching, tmp_path):
    trainings = Trainings()
    searching(trainings, "trainer.epochs=2..9", "regularizer=none,dropout", "regularizer.layers=[self]", trials=2)
    for cfg, trial in zip(trainings.configs, trials_in(tmp_path), strict=True):
        assert trial.params == {"trainer.epochs": cfg.trainer.epochs, "regularizer": cfg.regularizer.name}
        assert isinstance(trial.params["trainer.epochs"], int) and 2 <= cfg.trainer.epochs <= 9
        assert cfg.regularizer.layers == ["self"]


def test_the_command_it_ends_with_trains_the_best_setting_with_fresh_seeds(searching, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dropkey search"])
    searching(Trainings(), *SPACE, "seed=3,4", trials=2)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    best = max(trials_in(tmp_path), key=lambda trial: trial.value)
    assert words[:3] == ["dropkey", "train", "-m"]
    assert words[3:] == [*(f"{key}={value}" for key, value in best.params.items()), "seed=5,6,7"]


def test_a_search_is_its_words_in_any_order_without_those_that_change_no_result(searching, tmp_path):
    trainings = Trainings()
    searching(trainings, *SPACE, trials=1)
    searching(trainings, *reversed(SPACE), "logger=none", trials=1)
    assert len(trials_in(tmp_path)) == len(trainings.configs) == 1


def test_a_changed_default_begins_another_search(monkeypatch):
    name = search.Space(list(SPACE)).name
    before = search.compose

    def changed(words):
        cfg = before(words)
        cfg.trainer.epochs += 1
        return cfg

    monkeypatch.setattr(search, "compose", changed)
    assert search.Space(list(SPACE)).name != name


WRONG = {
    "seed=0": "nothing to search",
    "optim.lr=1e-2..1e-4": "the lower end comes first",
    "optim.weight_decay=log:0..1": "low",
    "lr=0..1": "did you mean optim.lr?",
    "regularizer.ratio=0..1": "must be in [0, 1)",
    "regularizer=none,dropky": "did you mean dropkey?",
    "trainer.epochs=0.5..2": "could not be converted to Integer",
    "regularizer.ratio=0..0.5 key value": "cannot read 'key'",
    "regularizer.ratio=0..0.5 seed=a": "could not be converted to Integer",
    "regularizer.ratio=0..0.5 trials=many": "trials=many must be a whole number",
    "regularizer.ratio=0..0.5 overwrite=true": "leave it out",
    "regularizer.ratio=0..0.5 data.val_fraction=0": "search on the test split",
}


@pytest.mark.parametrize("words, message", WRONG.items(), ids=WRONG)
def test_a_mistake_ends_in_one_line_before_anything_is_trained(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainings = Trainings()
    monkeypatch.setattr(train, "train", trainings)
    with pytest.raises(SystemExit) as stopped, cli.command():
        search.search(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert trainings.configs == []


def test_a_search_over_real_trainings(tmp_path):
    words = [*runs.SMALL, "trainer.max_steps=2", "regularizer.ratio=0..0.5", f"output={tmp_path / 'runs'}"]
    search.search([*words, "trials=2"])
    finished = [RunDirectory(path).summary()["objective"] for path in (tmp_path / "runs").glob("vit_*")]
    assert sorted(trial.value for trial in trials_in(tmp_path)) == sorted(finished)
