"""Searches for settings with Optuna: each trial is a run, or one run per seed.

    dropkey search optim.lr=log:1e-4..1e-2 regularizer.ratio=0..0.5
    dropkey search regularizer=none,dropout,dropkey regularizer.ratio=0..0.5 seed=0,1,2 trials=60

`low..high` is a range, with log: before it on a logarithmic scale; `a,b,c` is a choice; every other word is an override
for all trials. Several seeds are averaged, not searched. The search optimises the task's first metric after the last
epoch, on the validation split. A trial that diverges or cannot be trained is pruned.

The same command resumes an interrupted search, and the interrupted run in it, up to trials=20 in all; started several
times, as on several GPUs, it shares the work. Trials are not stopped early: a regularizer that helps in the end makes
the first epochs worse.
"""

import dataclasses
import re
import shlex
import statistics
import sys
import warnings
from pathlib import Path

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from dropkey import cli, tasks
from dropkey.commands import train
from dropkey.config.check import check, require
from dropkey.config.compose import compose
from dropkey.config.device import check_device
from dropkey.config.identity import flatten, group_hash, has_no_effect
from dropkey.config.schema import TrainConfig
from dropkey.errors import Busy, DataError, Interrupted, RunError, StorageError
from dropkey.invocation import as_started, invocation

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})")
HEARTBEAT = 60  # seconds between signs of life; a trial without one for twice as long is trained again
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class Space:
    """What the words ask for: the distribution of each searched key, the words of all trials, the seeds, a name."""

    def __init__(self, words: list[str]):
        self.searched: dict[str, BaseDistribution] = {}
        self.fixed, self.seeds, values, logarithmic = [], ["0"], {}, set()
        for override in OverridesParser.create().parse_overrides(words):
            key, _, value = override.input_line.partition("=")
            require(bool(key), f"cannot read '{override.input_line}'; overrides are key=value or group=option")
            choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [value]
            found = RANGE.fullmatch(value)
            if key == "seed":
                require(not found, f"seed={value}: several seeds are averaged, not searched; list them: seed=0,1,2")
                self.seeds = choices
            elif found:
                require(float(found[2]) < float(found[3]), f"{key}={value} is no range: the lower end comes first")
                values[key] = found.groups()[1:]
                logarithmic |= {key} if found.group(1) else set()
            elif len(choices) > 1:
                values[key] = choices
                self.searched[key] = CategoricalDistribution(choices)
            else:
                self.fixed.append(override.input_line)
        require(bool(values), "nothing to search; give a range, as in optim.lr=log:1e-4..1e-2, or a choice")
        for number in range(max(map(len, values.values()))):  # every end and every choice must pass the checks
            drawn = {key: ends[min(number, len(ends) - 1)] for key, ends in values.items()}
            configs = [self.config(drawn, seed) for seed in self.seeds]
        whole = {key for key, value in flatten(dataclasses.asdict(configs[0])).items() if isinstance(value, int)}
        for key in values.keys() - self.searched.keys():
            make, number = (IntDistribution, int) if key in whole else (FloatDistribution, float)
            self.searched[key] = make(*map(number, values[key]), log=key in logarithmic)
        check_device("trainer.device", configs[0].trainer.device)
        self.output = Path(configs[0].output)
        self.direction = "maximize" if tasks.build(configs[0]).metrics[0].higher_is_better else "minimize"
        named = sorted(word for word in words if not has_no_effect(word.partition("=")[0]))
        self.name = " ".join([*named, group_hash(configs[0])])  # a changed default begins another search

    def words(self, values: dict[str, object]) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]

    def config(self, values: dict[str, object], seed: str) -> TrainConfig:
        cfg = check(compose([*self.words(values), f"seed={seed}"]))
        require(not cfg.overwrite, "overwrite=true would repeat what a search resumes; leave it out")
        require(cfg.data.val_fraction > 0, "data.val_fraction=0 would search on the test split; take 0.1")
        return cfg

    def score(self, trial: Trial) -> float:
        """The mean of what `train` returns for each seed."""
        for key, kind in sorted(self.searched.items()):
            if isinstance(kind, CategoricalDistribution):
                trial.suggest_categorical(key, kind.choices)
            else:
                draw = trial.suggest_int if isinstance(kind, IntDistribution) else trial.suggest_float
                draw(key, kind.low, kind.high, log=kind.log)
        name = f"trial {trial.number}  {' '.join(self.words(trial.params)[len(self.fixed) :])}"
        print(name)
        try:
            value = statistics.mean(train.train(self.config(trial.params, seed)) for seed in self.seeds)
        except (Interrupted, KeyboardInterrupt, Busy, DataError, StorageError):  # not the fault of these settings
            trial.study.enqueue_trial(trial.params)
            raise
        except RunError as error:
            print(f"{name}: pruned, {error}")
            raise optuna.TrialPruned(str(error)) from None
        print(f"{name}: {value:.4g}")
        return value


def search(words: list[str]) -> None:
    trials = next((word.removeprefix("trials=") for word in words if word.startswith("trials=")), "20")
    require(bool(re.fullmatch(r"[1-9]\d{0,8}", trials, re.ASCII)), f"trials={trials} must be a whole number from 1")
    space = Space([word for word in words if not word.startswith("trials=")])
    space.output.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{space.output.resolve() / 'search.db'}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=HEARTBEAT,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.create_study(storage=storage, study_name=space.name, direction=space.direction, load_if_exists=True)
    missing = int(trials) - len(study.get_trials(deepcopy=False, states=ENDED))
    if missing > 0:
        enough = optuna.study.MaxTrialsCallback(int(trials), states=ENDED)  # counts those of other processes
        study.optimize(space.score, n_trials=missing, callbacks=[enough])
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        fresh = ",".join(str(max(map(int, space.seeds)) + number) for number in (1, 2, 3))
        print(f"best   trial {study.best_trial.number}: {study.best_value:.4g}")
        print("next   with seeds that had no part in the choice:")
        print(f"       {invocation('train')} -m {shlex.join([*space.words(study.best_params), f'seed={fresh}'])}")


def start() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with cli.command(), train.way_on():
        print(as_started(__doc__)) if {"-h", "--help"} & set(sys.argv) else search(sys.argv[1:])
