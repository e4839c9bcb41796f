"""Searches for settings with Optuna. Every trial is a run of train.py, or several that differ in their seeds.

    python scripts/search.py optim.lr=log:1e-4..1e-2 regularizer.ratio=0..0.5
    python scripts/search.py regularizer=none,dropout,dropkey regularizer.ratio=0..0.5 seed=0,1,2 --trials 60

`low..high` is a range, with log: before it on a logarithmic scale; `a,b,c` is a choice; every other word goes to
train.py as it is. Several seeds are averaged, not searched. What is maximised is the top-1 of the validation split
after the last epoch: the best epoch would reward luck, and the test split is not for choosing.

The same command goes on with a search that was cut short, inside the run that was cut short; run at the same time, as
on another GPU, it shares the work. One after the other, the trials are the same however often the search was stopped.
A trial that diverges counts as worst; one that fails is left out, with its reason; neither stops the others. No trial
is stopped early, because a regularizer that helps in the end makes the first epochs worse.
"""

import argparse
import contextlib
import dataclasses
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Iterator, Optional

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from dropkey.config.check import check, require
from dropkey.config.compose import compose, one_line
from dropkey.config.identity import digest, flatten, has_no_effect, run_directory
from dropkey.config.schema import TrainConfig
from dropkey.errors import Busy, ConfigError, DataError, Diverged, Interrupted, RunError, StorageError
from dropkey.records import RunDirectory

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 30  # seconds between looks at a run that another process is training
OUTCOMES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "diverged", TrialState.FAIL: "failed"}


# ----------------------------------------------------------------------------------------------------------- space


@dataclasses.dataclass
class Space:
    """What is searched, what is averaged, and what all trials have in common."""

    searched: dict[str, BaseDistribution]
    fixed: list[str]
    seeds: list[int]
    output: Path = Path()

    def words(self, values: dict[str, object]) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]

    def configs(self, values: dict[str, object]) -> list[TrainConfig]:
        """The checked config of each run of a trial."""
        cfg = checked(self.words(values))
        return [dataclasses.replace(cfg, seed=seed) for seed in self.seeds or [cfg.seed]]


def checked(words: list[str]) -> TrainConfig:
    cfg = check(compose(words))
    require(not cfg.overwrite, "overwrite=true would train anew what a search resumes; leave it out")
    require(cfg.data.val_fraction > 0, "data.val_fraction=0 would search on the test split; take 0.1")
    return cfg


def read(words: list[str]) -> Space:
    """The space that the command line asks for; every end and every choice has passed the checks of train.py."""
    ranges, choices, fixed = {}, {}, []
    for word in words:
        key, _, value = word.partition("=")
        if found := RANGE.fullmatch(value):
            ranges[key] = found.groups()
            continue
        try:
            override = OverridesParser.create().parse_override(word)
            if override.is_sweep_override():
                choices[key] = list(override.sweep_string_iterator())
            else:
                fixed.append(word)
        except HydraException:
            raise ConfigError(f"cannot read '{word}'; words are key=value, key=low..high or key=a,b,c") from None
    seeds = choices.pop("seed", [])
    require("seed" not in ranges and all(seed.isdigit() for seed in seeds), "seeds are whole numbers: seed=0,1,2")
    require(bool(ranges or choices), "nothing to search; name a range, as optim.lr=log:1e-4..1e-2, or a choice")

    space = Space({}, fixed, [int(seed) for seed in seeds])
    first = {key: low for key, (_, low, _) in ranges.items()} | {key: values[0] for key, values in choices.items()}
    cfg = checked(space.words(first))
    space.output, types = Path(cfg.output), flatten(dataclasses.asdict(cfg))
    for key, (log, low, high) in ranges.items():
        whole = isinstance(types.get(key.lstrip("+")), int)
        make, number = (IntDistribution, int) if whole else (FloatDistribution, float)
        try:
            space.searched[key] = make(number(low), number(high), log=bool(log))
        except ValueError as error:
            raise ConfigError(f"{key}={log or ''}{low}..{high}: {one_line(error)}") from None
    space.searched |= {key: CategoricalDistribution(values) for key, values in choices.items()}
    space.searched = dict(sorted(space.searched.items()))  # drawn in one order, however the words are ordered
    others = {key: [high] for key, (_, _, high) in ranges.items()} | {key: more[1:] for key, more in choices.items()}
    for key, values in others.items():
        for value in values:
            checked(space.words(first | {key: value}))
    return space


# ---------------------------------------------------------------------------------------------------------- trials


class Search:
    """A study in <output>/search.db, and which of its trials are in the hands of a living process."""

    def __init__(self, words: list[str], space: Space):
        self.space = space
        self.locks = space.output / ".search"
        self.locks.mkdir(parents=True, exist_ok=True)
        keys = {word: word.partition("=")[0] for word in sorted(words)}  # a folder's path is part of its identity
        self.name = digest(
            {"words": [word for word, key in keys.items() if key == "data.root" or not has_no_effect(key)]}
        )
        self.turn = FileLock(self.locks / "turn.lock")  # one process at a time draws, and files what came of it
        with self.turn:
            url = f"sqlite:///{space.output.resolve() / 'search.db'}"
            storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
            self.study = optuna.create_study(
                storage=storage, study_name=self.name, direction="maximize", load_if_exists=True
            )
            self.study.set_user_attr("words", words)

    @contextlib.contextmanager
    def next(self, limit: int) -> Iterator[Optional[Trial]]:
        """A trial that a dead process left behind, else a new one, else None; no other process has it meanwhile."""
        with contextlib.ExitStack() as held:
            with self.turn:
                trial = self.left_behind(held)
                if trial is None and len(self.study.get_trials(deepcopy=False)) < limit:
                    trial = self.study.ask()
                    held.enter_context(self.lock(trial.number))
                if trial is not None:
                    # its own seed for each trial: what is drawn depends on the results so far, not on interruptions
                    self.study.sampler = optuna.samplers.TPESampler(seed=trial.number)
                    for key, distribution in self.space.searched.items():
                        suggest(trial, key, distribution)
            yield trial

    def left_behind(self, held: contextlib.ExitStack) -> Optional[Trial]:
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with contextlib.suppress(Timeout):
                held.enter_context(self.lock(frozen.number))
                return Trial(self.study, frozen._trial_id)  # what ask() returns; values drawn already stay
        return None

    def lock(self, number: int) -> FileLock:
        """The system lets go of it however its process ends."""
        return FileLock(self.locks / f"{self.name}-{number}.lock", timeout=0)

    def file(self, trial: Trial, **outcome) -> None:
        with self.turn:
            self.study.tell(trial, **outcome)


def suggest(trial: Trial, key: str, distribution: BaseDistribution) -> object:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    draw = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return draw(key, distribution.low, distribution.high, log=distribution.log)


def attempt(search: Search, trial: Trial) -> None:
    """Trains a trial and files its outcome. What would fail every other trial too, or interrupts, is raised."""
    try:
        outcome = {"values": score(trial, search.space)}
        said = f"validation top-1 {outcome['values']:.2f} %"
    except (Interrupted, DataError, StorageError):
        raise
    except RunError as error:
        outcome = {"state": TrialState.PRUNED if isinstance(error, Diverged) else TrialState.FAIL}
        said = f"{OUTCOMES[outcome['state']]}: {error}"
        trial.set_user_attr("reason", str(error))
    search.file(trial, **outcome)
    print(f"trial {trial.number:>3}  {said}", flush=True)


def score(trial: Trial, space: Space) -> float:
    """The mean validation top-1 of the trial's runs, trained as far as they are not."""
    values = []
    for cfg in space.configs(trial.params):
        run = RunDirectory(run_directory(cfg))
        print(f"trial {trial.number:>3}  {shown(trial.params)}  {run.path}/log.txt", flush=True)
        train_to_the_end(run, [*space.words(trial.params), f"seed={cfg.seed}"])
        require(run.summary()["best_split"] == "val", f"{run.path} watched the test split; nothing to search on")
        values.append(run.records("epoch")[-1]["eval_top1"])
    return statistics.mean(values)


def train_to_the_end(run: RunDirectory, words: list[str]) -> None:
    """Raises RunError, of the class that the exit code of train.py means."""
    while not run.finished:
        code, reason = train(words)
        if code == Busy.exit_code:  # two trials may be one run: any ratio is the same with regularizer=none
            time.sleep(PATIENCE)
        elif code - 128 in SIGNALS or -code in SIGNALS:
            raise Interrupted(reason, code - 128 if code > 0 else -code)
        elif code < 0:
            raise RunError(f"killed by {signal.Signals(-code).name}")
        elif code or not run.finished:
            classes = {error.exit_code: error for error in (DataError, Diverged, StorageError)}
            raise classes.get(code, RunError)(reason or f"train.py left no result in {run.path}")


def train(words: list[str]) -> tuple[int, str]:
    """Exit code of train.py and the last line of its errors. Signals that come meanwhile are its business: it saves."""
    command = [sys.executable, str(TRAIN), *words]
    process = subprocess.Popen(  # in a group of its own, so that Ctrl-C reaches it once
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in SIGNALS}
    try:
        lines = process.communicate()[1].strip().splitlines()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, lines[-1].removeprefix("error: ") if lines else ""


# --------------------------------------------------------------------------------------------------------- command


def shown(values: dict[str, object]) -> str:
    short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())


def conclude(search: Search) -> None:
    trials = search.study.get_trials(deepcopy=False)
    counts = Counter(OUTCOMES.get(trial.state, "running") for trial in trials)
    print(f"{len(trials)} trials: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
    if counts["done"]:
        best, space = search.study.best_trial, search.space
        seeds = space.seeds or [0]
        fresh = ",".join(str(max(seeds) + i) for i in (1, 2, 3))
        print(f"best   trial {best.number}, validation top-1 {best.value:.2f} %, {shown(best.params)}")
        print("next   with seeds that had no part in the choice:")
        print(f"       python train.py -m {shlex.join([*space.words(best.params), f'seed={fresh}'])}")


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="key=value")
    parser.add_argument("--trials", type=int, default=20, help="how many in all, those of earlier calls included")
    options = parser.parse_intermixed_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        space = read(options.words)
        search = Search(options.words, space)
        while True:
            with search.next(options.trials) as trial:
                if trial is None:
                    break
                attempt(search, trial)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Interrupted as stopped:
        print(f"{stopped}\nthe same command goes on with the search", file=sys.stderr)
        return stopped.exit_code
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    conclude(search)
    return int(any(trial.state == TrialState.FAIL for trial in search.study.get_trials(deepcopy=False)))


if __name__ == "__main__":
    sys.exit(main())
