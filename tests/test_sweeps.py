"""Hydra's launchers, W&B sweeps and the search with Optuna (faults 21, 27, 28)."""

import copy
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import optuna
import pytest
import wandb
from wandb.sdk.launch.sweeps.utils import load_sweep_config
from wandb.wandb_agent import Agent

import runs
import train
from dropkey.config.check import check
from dropkey.config.compose import compose, launch
from dropkey.config.identity import run_directory
from dropkey.engine import tracking
from dropkey.records import RunDirectory
from scripts import search

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ Hydra's launchers

JOBS = """
    import os, signal
    from pathlib import Path
    from dropkey.config.compose import launch
    from dropkey.errors import Diverged, Interrupted

    def task(cfg):  # in place of a training, which takes ten seconds to import torch
        (Path(cfg.output) / str(cfg.seed)).write_text(os.environ.get("OMP_NUM_THREADS", ""))
        if cfg.seed == 1:
            raise Diverged("loss nan")
        if cfg.seed == 10:
            raise Interrupted("all saved", signal.SIGTERM)
        if cfg.seed == 100:
            raise ZeroDivisionError("division by zero")
        if cfg.seed == 1000:
            os.kill(os.getpid(), signal.SIGKILL)

    launch("train", task)
"""
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


@pytest.mark.parametrize(
    "launcher, seed, code, message",
    [
        ("joblib", 10, 143, "all saved"),
        ("submitit", 1, 4, "error: loss nan"),
        ("submitit", 100, 1, "error: ZeroDivisionError: division by zero"),
    ],
)
def test_a_failing_job_leaves_the_others_going_and_gives_the_exit_code(launcher, seed, code, message, tmp_path):
    found, error, begun = multirun(launcher, tmp_path, f"{seed},2,3")
    assert (found, set(begun)) == (code, {str(seed), "2", "3"})
    assert message in error
    if launcher == "joblib" and hasattr(os, "sched_getaffinity"):  # two jobs that took all cores would stall each other
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert all(1 <= int(threads) <= share for threads in begun.values())


def test_a_killed_worker_of_joblib_ends_in_one_line(tmp_path):
    code, error, _ = multirun("joblib", tmp_path, "1000,2")
    assert code == 1
    assert re.fullmatch(r"error: a job was lost \(.*\); the same command goes on with the rest\n", error)


def test_joblib_trains_side_by_side(tmp_path):
    words = ["-m", *runs.SMALL, "trainer.max_steps=2", "seed=0,1", f"output={tmp_path}", *LAUNCHERS["joblib"]]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [RunDirectory(path).finished for path in tmp_path.glob("vit_*")] == [True, True]


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
        train.main(runs.config(tmp_path / "trained", "trainer.max_steps=2", "logger=wandb"))
    finally:
        wandb.teardown()
    assert told == run.records() and finished == [run.summary()]


def test_sweeps_maximise_validation_and_never_test():
    assert len(SWEEPS) == 2
    for file in SWEEPS:
        assert load_sweep_config(str(file))["metric"] == {"name": "epoch/eval_top1", "goal": "maximize"}


# -------------------------------------------------------------------------------------------------- Optuna: trials

SPACE = ("optim.lr=log:1e-4..1e-2", "regularizer.ratio=0..0.5")


class Trainer:
    """In place of train.py: how each of its calls ends (0 by default), and with which words it was called."""

    def __init__(self, *codes: int):
        self.codes, self.calls = list(codes), []

    def __call__(self, words: list[str]) -> tuple[int, str]:
        self.calls.append(words)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            cfg = compose_quickly(words)
            run = RunDirectory(run_directory(cfg))
            run.path.mkdir(parents=True)
            top1 = 100 * cfg.regularizer.ratio + cfg.seed
            for epoch, value in enumerate((99.0, top1)):  # the first epoch is the best one
                run.append({"kind": "epoch", "step": epoch, "epoch": epoch, "eval_top1": value})
            run.write_summary({"best_split": "val", "top1": 100 - top1})
            run.set_status("done")
        return code, "as told" if code else ""


@functools.lru_cache(maxsize=None)
def composed(*words: str):
    return check(compose(list(words)))


def compose_quickly(words: list[str]):
    """A checked config, which takes half a second, with the numbers that trials differ in filled in afterwards."""
    numbers = {"optim.lr": float, "regularizer.ratio": float, "seed": int}
    pairs = [word.partition("=")[::2] for word in words]
    cfg = copy.deepcopy(composed(*(word for word in words if word.partition("=")[0] not in numbers)))
    for key, value in pairs:
        if key in numbers:
            *parents, last = key.split(".")
            setattr(functools.reduce(getattr, parents, cfg), last, numbers[key](value))
    return cfg


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(search, "compose", compose_quickly)
    monkeypatch.setattr(search, "check", lambda cfg: cfg)


def searching(monkeypatch, trainer: Trainer, directory: Path, *words: str, trials: int = 3) -> int:
    """Exit code of the search, run in `directory`."""
    directory.mkdir(exist_ok=True)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(search, "train", trainer)
    monkeypatch.setattr(search, "PATIENCE", 0)
    return search.main([*(words or SPACE), "--trials", str(trials)])


def trials_in(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{directory / 'runs' / 'search.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def outcomes(directory: Path) -> list[tuple]:
    return [(trial.state.name, trial.params, trial.values) for trial in trials_in(directory)]


def test_a_trial_is_a_run_of_train_py_and_is_judged_by_the_last_epoch_on_validation(quick, tmp_path, monkeypatch):
    trainer = Trainer()
    assert searching(monkeypatch, trainer, tmp_path) == 0
    for trial, words in zip(trials_in(tmp_path), trainer.calls, strict=True):
        assert words == [*(f"{key}={value}" for key, value in trial.params.items()), "seed=0"]
        assert 1e-4 <= trial.params["optim.lr"] <= 1e-2
        assert trial.value == pytest.approx(100 * trial.params["regularizer.ratio"])


def test_the_same_command_trains_nothing_again_and_more_trials_add(quick, tmp_path, monkeypatch):
    trainer = Trainer()
    for trials, calls in ((2, 2), (2, 2), (3, 3)):
        assert searching(monkeypatch, trainer, tmp_path, trials=trials) == 0
        assert len(trainer.calls) == calls


def test_an_interrupted_search_ends_up_with_the_trials_of_an_uninterrupted_one(quick, tmp_path, monkeypatch):
    searching(monkeypatch, Trainer(), tmp_path / "whole", trials=11)  # the last learns from the first ten
    trainer = Trainer(0, 143, *[0] * 9, 143)
    codes = [searching(monkeypatch, trainer, tmp_path / "cut", trials=11) for _ in range(3)]
    assert codes == [143, 143, 0]
    assert trainer.calls[1] == trainer.calls[2]  # the same run, which goes on
    assert outcomes(tmp_path / "cut") == outcomes(tmp_path / "whole")


def test_failed_and_diverged_trials_keep_their_reason_and_leave_the_others_going(quick, tmp_path, monkeypatch):
    assert searching(monkeypatch, Trainer(1, 4, -signal.SIGKILL), tmp_path, trials=4) == 1
    found = [(trial.state.name, trial.user_attrs.get("reason")) for trial in trials_in(tmp_path)]
    assert found == [("FAIL", "as told"), ("PRUNED", "as told"), ("FAIL", "killed by SIGKILL"), ("COMPLETE", None)]


@pytest.mark.parametrize("code", [3, 5])
def test_what_would_fail_every_trial_ends_the_search_and_costs_no_trial(quick, code, tmp_path, monkeypatch):
    trainer = Trainer(code)
    assert searching(monkeypatch, trainer, tmp_path, trials=2) == code
    assert searching(monkeypatch, trainer, tmp_path, trials=2) == 0
    assert [trial.state.name for trial in trials_in(tmp_path)] == ["COMPLETE"] * 2


def test_two_searches_at_once_share_the_work(quick, tmp_path, monkeypatch):
    class Both(Trainer):
        def __call__(self, words):
            if not self.calls:  # while the first trial is being trained, another process searches
                self.calls.append(words)
                assert searching(monkeypatch, other, tmp_path, trials=2) == 0
            return super().__call__(words)

    other = Trainer()
    assert searching(monkeypatch, Both(), tmp_path, trials=2) == 0
    assert [len(other.calls), len(trials_in(tmp_path))] == [1, 2]
    assert [trial.state.name for trial in trials_in(tmp_path)] == ["COMPLETE"] * 2


def test_a_run_that_another_process_trains_is_waited_for(quick, tmp_path, monkeypatch):
    trainer = Trainer(6, 6)
    assert searching(monkeypatch, trainer, tmp_path, trials=1) == 0
    assert len(trainer.calls) == 3


def test_seeds_are_averaged_not_searched(quick, tmp_path, monkeypatch):
    trainer = Trainer()
    searching(monkeypatch, trainer, tmp_path, "regularizer.ratio=0..0.5", "seed=0,2,4", trials=1)
    (trial,) = trials_in(tmp_path)
    assert [words[-1] for words in trainer.calls] == ["seed=0", "seed=2", "seed=4"]
    assert trial.value == pytest.approx(100 * trial.params["regularizer.ratio"] + 2)


def test_whole_numbers_and_choices_are_drawn_as_such(quick, tmp_path, monkeypatch):
    words = ("trainer.epochs=1..9", "regularizer=none,dropout", "regularizer.layers=[self]")
    trainer = Trainer()
    searching(monkeypatch, trainer, tmp_path, *words, trials=2)
    for kind, epochs, seed in ([word for word in call if "layers" not in word] for call in trainer.calls):
        assert re.fullmatch(r"trainer.epochs=[1-9]", epochs)
        assert kind in ("regularizer=none", "regularizer=dropout")
        assert seed == "seed=0"


def test_the_command_it_ends_with_trains_the_best_setting_with_fresh_seeds(quick, tmp_path, monkeypatch, capsys):
    searching(monkeypatch, Trainer(), tmp_path, *SPACE, "seed=3,4", trials=2)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:3] == ["python", "train.py", "-m"]
    assert words[-1] == "seed=5,6,7"
    best = max(trials_in(tmp_path), key=lambda trial: trial.value)
    assert words[3:-1] == [f"{key}={value}" for key, value in best.params.items()]


def test_a_search_is_its_words_in_any_order_without_those_that_change_no_result(quick, tmp_path, monkeypatch):
    trainer = Trainer()
    searching(monkeypatch, trainer, tmp_path, *SPACE, trials=1)
    searching(monkeypatch, trainer, tmp_path, *reversed(SPACE), "logger=none", trials=1)
    assert len(trials_in(tmp_path)) == len(trainer.calls) == 1


# ------------------------------------------------------------------------------------------------ Optuna: mistakes

WRONG = {
    "seed=0": "nothing to search",
    "optim.lr=1e-2..1e-4": "optim.lr=1e-2..1e-4",
    "optim.weight_decay=log:0..1": "optim.weight_decay=log:0..1",
    "lr=0..1": "did you mean optim.lr?",
    "regularizer.ratio=0..1": "outside [0, 1)",
    "regularizer=none,dropky": "did you mean dropkey?",
    "trainer.epochs=0.5..2": "could not be converted to Integer",
    "regularizer.ratio=0..0.5 key value": "words are key=value",
    "regularizer.ratio=0..0.5 seed=0..3": "seeds are whole numbers",
    "regularizer.ratio=0..0.5 overwrite=true": "leave it out",
    "regularizer.ratio=0..0.5 data.val_fraction=0": "search on the test split",
}


@pytest.mark.parametrize("words, message", WRONG.items(), ids=WRONG)
def test_a_mistake_ends_in_one_line_before_anything_is_trained(words, message, tmp_path, monkeypatch, capsys):
    trainer = Trainer()
    assert searching(monkeypatch, trainer, tmp_path, *words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert trainer.calls == []


# ------------------------------------------------------------------------------------------------ Optuna: processes


def test_a_search_stopped_by_a_signal_hands_it_to_the_training_and_says_how_to_go_on(tmp_path):
    """Real processes, but a training that only waits for its signal."""
    (tmp_path / "wait.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "open('began', 'w').close()\n"
        "time.sleep(60)\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import search; search.TRAIN = 'wait.py'\n"
        "sys.exit(search.main(['regularizer.ratio=0..0.5']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "the same command goes on" in error
    assert [trial.state.name for trial in trials_in(tmp_path)] == ["RUNNING"]


def test_the_exit_code_and_the_last_words_of_train_py_reach_the_trial(tmp_path, monkeypatch):
    """A real process, of a run that diverged before and says so without training."""
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(run_directory(check(compose(["regularizer.ratio=0.25"]))))
    run.path.mkdir(parents=True)
    run.set_status("diverged", reason="loss nan")
    assert search.main(["regularizer.ratio=0.25..0.25", "--trials", "1"]) == 0
    (trial,) = trials_in(tmp_path)
    assert trial.state.name == "PRUNED"
    assert "diverged before and would again: loss nan" in trial.user_attrs["reason"]


def test_a_search_over_real_trainings(tmp_path, monkeypatch):
    def train_here(words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as ended:
            launch("train", train.main)
        return ended.value.code, ""

    monkeypatch.setattr(search, "train", train_here)
    words = [*runs.SMALL, "trainer.max_steps=2", "regularizer.ratio=0..0.5", f"output={tmp_path / 'runs'}"]
    assert search.main([*words, "--trials", "2"]) == 0
    finished = {RunDirectory(path).records("epoch")[-1]["eval_top1"] for path in (tmp_path / "runs").glob("vit_*")}
    assert {trial.value for trial in trials_in(tmp_path)} == finished
