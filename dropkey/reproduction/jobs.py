"""The jobs of a table: trainings and evaluations, where their results are, and the state of each."""

import contextlib
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from dropkey import shapes
from dropkey.config import check, identity
from dropkey.config.compose import compose
from dropkey.config.schema import EvalConfig, TrainConfig
from dropkey.errors import ConfigError, StorageError
from dropkey.records import RunDirectory
from dropkey.reproduction.tables import Row, Table

DONE, RUNNING, INTERRUPTED = "done", "running", "interrupted"
FAILED, DIVERGED, MISSING = "failed", "diverged", "missing"
PLACE = ("init_from", "data.root", "seed")  # settings that differ between seeds or machines
EVALUATES = ("eval.monte_carlo", "eval.split", "eval.weights")  # the keys that an evaluation's file name tells apart


@dataclass(frozen=True)
class Job:
    """One process to start: a training, or the evaluation of a finished run."""

    script: str  # train.py or eval.py
    overrides: tuple[str, ...]
    run: Path  # run directory
    result: str  # file in the run directory with the metrics
    config: TrainConfig = field(compare=False)  # of the training
    evaluation: Optional[EvalConfig] = field(default=None, compare=False)  # None for a training
    needs: Optional["Job"] = None  # the training that it starts from
    cell: tuple[str, ...] = field(default=(), compare=False)  # row, column if there are several, seed: of its first use

    @property
    def name(self) -> str:
        return f"{self.run.name} {Path(self.result).stem}" if self.evaluation else self.run.name

    @property
    def label(self) -> str:
        """DropKey, decreasing · A · seed 3"""
        return " · ".join(self.cell) or self.name

    @property
    def log(self) -> Path:
        return self.run / f"process{'-' + Path(self.result).stem if self.evaluation else ''}.log"

    @property
    def claim(self) -> Path:
        """Locked by the launcher that runs the job; then holds the seconds that it took, if it was not interrupted."""
        return self.run / f".claim-{Path(self.result).stem}"

    @property
    def failure(self) -> Path:
        """Holds the reason why an evaluation failed. A training has its status.json."""
        return self.run / f".failed-{Path(self.result).stem}.json"


def jobs_of(table: Table, output: str) -> dict[tuple[str, str, int], Job]:
    """(row, column, seed) -> job, seed by seed. Cells that need the same result have equal jobs. Rows whose best
    candidate is not known yet have none.

    Raises:
        ConfigError: overrides that cannot work; the message names row and column.
    """
    found = {}
    for column, model in table.columns.items():
        for row in sorted(table.rows.values(), key=lambda row: row.of is not None):  # rows that others start from first
            chosen = row_overrides(table, table.rows[row.of] if row.of else row, column)
            with named_errors(f"table {table.name}, row '{row.label}', column '{column}'"):
                evaluation = composed_evaluation(row.evaluate) if row.evaluate else None
            if chosen is None:
                continue
            base = (*model, *chosen, *table.overrides)
            overrides = (*base, *row.overrides) if row.of else base
            with named_errors(f"table {table.name}, row '{row.label}', column '{column}'"):
                config = composed(overrides)
            for seed in table.seeds:
                needs = found.get((row.of, column, seed))
                job = (
                    evaluation_job(row.evaluate, evaluation, needs)
                    if evaluation
                    else training_job(overrides, config, seed, output, needs)
                )
                found[row.label, column, seed] = replace(job, cell=cell(table, row.label, column, seed))
    order = {label: number for number, label in enumerate(table.rows)}
    return dict(sorted(found.items(), key=lambda item: (item[0][2], order[item[0][0]])))


def cell(table: Table, row: str, column: str, seed: int) -> tuple[str, ...]:
    return (row, *([column] if len(table.columns) > 1 else []), f"seed {seed}")


def row_overrides(table: Table, row: Row, column: str) -> Optional[tuple[str, ...]]:
    """Of train.py for a row that is trained; None while its best candidate, or that of the row it is like, is not
    known."""
    if row.candidates:
        return table.chosen.get((row.label, column))
    if row.like is None:
        return row.overrides
    base = row_overrides(table, table.rows[row.like], column)
    return None if base is None else (*base, *row.overrides)


@contextlib.contextmanager
def named_errors(place: str):
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def training_job(overrides, config: TrainConfig, seed: int, output: str, needs: Optional[Job]) -> Job:
    config = replace(config, seed=seed, output=output, init_from=str(needs.run) if needs else config.init_from)
    start = (f"init_from={needs.run}",) if needs else ()
    overrides = (*overrides, *start, f"seed={seed}", f"output={output}")
    return Job("train.py", overrides, identity.run_directory(config), "summary.json", config, needs=needs)


def evaluation_job(overrides, evaluation: EvalConfig, needs: Job) -> Job:
    name = identity.evaluation_name(evaluation)
    return Job("eval.py", (f"run={needs.run}", *overrides), needs.run, name, needs.config, evaluation, needs)


@functools.lru_cache(maxsize=None)
def composed(overrides: tuple[str, ...]) -> TrainConfig:
    """Composing takes 0.1 s, and a table is composed to run it and again to report it."""
    return check.check(compose(list(overrides)))


@functools.lru_cache(maxsize=None)
def composed_evaluation(overrides: tuple[str, ...]) -> EvalConfig:
    for override in overrides:
        known = override.partition("=")[0] in EVALUATES
        check.require(known, f"a row may evaluate with {', '.join(EVALUATES)}, not with {override}")
    return check.check_evaluation(compose(["run=.", *overrides], "eval"))  # a directory that exists: runs do not yet


def settings(job: Job) -> dict[str, object]:
    """Every key of its config that changes the result and is the same for all seeds and on all machines, flat."""
    keys = {key: value for key, value in identity.canonical(job.config).items() if key not in PLACE}
    return keys | identity.evaluation_settings(job.evaluation) if job.evaluation else keys


def distinct(jobs: dict[tuple[str, str, int], Job]) -> list[Job]:
    """Every job once: cells may share one, such as a baseline."""
    return list(dict.fromkeys(jobs.values()))


def state(job: Job) -> tuple[str, str]:
    """(state, reason); the reason is empty unless the job failed or diverged. A job whose start has failed or diverged
    has failed too, and an evaluation is done only where its training is."""
    found, reason = own_state(job)
    if job.needs is not None and (found == MISSING or (found == DONE and job.evaluation)):
        start, _ = own_state(job.needs)
        if start in (FAILED, DIVERGED):
            return FAILED, f"it needs {job.needs.label}, which is {start}"
        if start != DONE:
            return MISSING, ""
    return found, reason


def own_state(job: Job) -> tuple[str, str]:
    """The same without a look at other jobs. A file that is damaged, or lacks what a table needs, is a failure."""
    run = RunDirectory(job.run)
    try:
        if job.evaluation:
            return evaluation_state(job, run)
        found, reason = run.state()
        if found == DONE:
            require_reported(run.summary(), run.path / job.result)
    except StorageError as error:
        return FAILED, str(error)
    return (FAILED if found == "damaged" else found), reason


def evaluation_state(job: Job, run: RunDirectory) -> tuple[str, str]:
    result = run.read_json(job.result)
    if result.get("settings") != identity.evaluation_settings(job.evaluation):
        failure = run.read_json(job.failure.name)
        return (FAILED, str(failure.get("reason", ""))) if failure else (MISSING, "")
    require_reported(result, run.path / job.result)
    wrong = shapes.not_a_number(result)
    return (FAILED, wrong) if wrong else (DONE, "")


def require_reported(result: dict, file: Path) -> None:
    wrong = shapes.problem(result, shapes.REPORTED)
    if wrong:
        raise StorageError(f"{file} cannot be compared: {wrong}")


def records_of(job: Job, kind: str = "epoch") -> list[dict]:
    """What a training has recorded of its epochs or steps; nothing where the file cannot be read."""
    with contextlib.suppress(StorageError):
        return RunDirectory(job.run).records(kind)
    return []


def share_left(job: Job) -> float:
    """Of a training's epochs."""
    epochs = [] if job.evaluation else records_of(job)
    return 1.0 - (min(epochs[-1]["epoch"] / job.config.trainer.epochs, 1.0) if epochs else 0.0)
