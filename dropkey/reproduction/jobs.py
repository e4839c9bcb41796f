"""What a table needs done: trainings and evaluations, where each leaves its result, and how each stands."""

import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Optional

from dropkey.config import check, compose, identity
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory, write_json
from dropkey.reproduction.tables import Table

DONE, RUNNING, INTERRUPTED = "done", "running", "interrupted"
FAILED, DIVERGED, MISSING = "failed", "diverged", "missing"
CHECKED = Path(__file__).parents[1] / "config"  # the source that turns overrides into a config


@dataclass(frozen=True)
class Composed:
    """What a table must know of a composed config, except for its seed and `init_from`."""

    label: str  # <model>-<regularizer>-<data>
    keys: dict  # identity.canonical
    model: str
    data: str
    image_size: int  # pixels
    max_train_samples: Optional[int]
    epochs: int
    max_steps: Optional[int]
    batch_size: int
    eval_every: int

    def run_name(self, seed: int, init_from: Optional[str] = None) -> str:
        start = {} if init_from is None else {"init_from": init_from}
        return f"{self.label}-s{seed}-{identity.digest({**self.keys, **start, 'seed': seed})}"

    @property
    def facts(self) -> str:
        """Data, resolution and length of the training, for captions."""
        images = f", {self.max_train_samples:,} training images" if self.max_train_samples else ""
        steps = f", {self.max_steps} steps at most" if self.max_steps else ""
        return f"{self.data}, {self.image_size} px{images}, {self.epochs} epochs{steps}"


@dataclass(frozen=True)
class Job:
    """One process to run: a training, or the evaluation of a finished run."""

    script: str  # train.py or eval.py
    words: tuple[str, ...]
    run: Path  # the run directory
    result: str  # file in it that holds the figures
    composed: Composed = field(compare=False)
    needs: Optional["Job"] = None  # whose run it starts from

    @property
    def name(self) -> str:
        return self.run.name if self.script == "train.py" else f"{self.run.name} {self.result.removesuffix('.json')}"

    @property
    def log(self) -> Path:
        return self.run / f"process{'' if self.script == 'train.py' else '-' + Path(self.result).stem}.log"

    @property
    def failure(self) -> Path:
        """Where the reason of an evaluation that failed is kept; a training has its status.json."""
        return self.run / f".failed-{Path(self.result).stem}.json"


def jobs_of(table: Table, output: str) -> dict[tuple[str, str, int], Job]:
    """(row, column, seed) -> job. Cells that mean the same share one: compare jobs to see it.

    Raises:
        ConfigError: overrides that cannot work, naming row and column.
    """
    cache = Compositions(Path(output))
    found = {}
    for column, model in table.columns.items():
        for row in sorted(table.rows.values(), key=lambda row: row.of is not None):  # those others start from first
            base = table.rows[row.of] if row.of else row
            words = (*model, *base.words, *table.extra)
            try:
                composed = cache.get(words if row.of is None or row.evaluate else (*words, *row.words))
                result = evaluation_file(row.evaluate) if row.evaluate else "summary.json"
            except ConfigError as error:
                raise ConfigError(f"table {table.name}, row '{row.label}', column '{column}': {error}") from None
            for seed in table.seeds:
                place = f"output={output}"
                before = found.get((row.of, column, seed))
                if before is None:
                    run = Path(output) / composed.run_name(seed)
                    job = Job("train.py", (*words, f"seed={seed}", place), run, result, composed)
                elif row.evaluate:
                    whole = (f"run={before.run}", *row.evaluate)
                    job = Job("eval.py", whole, before.run, result, composed, before)
                else:
                    run = Path(output) / composed.run_name(seed, before.run.name)
                    start = (f"init_from={before.run}", f"seed={seed}", place)
                    job = Job("train.py", (*words, *row.words, *start), run, result, composed, before)
                found[row.label, column, seed] = job
    cache.save()
    order = {label: number for number, label in enumerate(table.rows)}
    return dict(sorted(found.items(), key=lambda item: (item[0][2], order[item[0][0]])))  # seed by seed


def evaluation_file(words: tuple[str, ...]) -> str:
    """The file that eval.py writes for these overrides, as evaluation.evaluation_name says (which imports torch)."""
    values = dict(word.split("=", 1) for word in words)
    passes = values.pop("eval.monte_carlo", "0")
    if values.keys() - {"eval.split", "eval.weights"}:
        raise ConfigError(
            f"a row may evaluate with eval.monte_carlo, eval.split and eval.weights, not {' '.join(words)}"
        )
    parts = ["eval", values.get("eval.split", "test")]
    parts += [values["eval.weights"]] if values.get("eval.weights", "last") != "last" else []
    return "-".join(parts + ([f"mc{passes}"] if passes != "0" else [])) + ".json"


class Compositions:
    """Composing takes Hydra 0.3 s a time, so what came out is kept beside the runs, until a config file or the code
    that reads it changes."""

    def __init__(self, output: Path):
        self.file = output / ".composed.json"
        self.version = sources()
        content = RunDirectory(output).read_json(self.file.name)
        self.known = content.get("known", {}) if content.get("version") == self.version else {}
        self.changed = False

    def get(self, words: tuple[str, ...]) -> Composed:
        key = json.dumps([os.getcwd(), *words])  # a relative path in the words depends on where we are
        if key not in self.known:
            self.known[key] = asdict(summarise(words))
            self.changed = True
        return Composed(**self.known[key])

    def save(self) -> None:
        if self.changed:
            write_json(self.file, {"version": self.version, "known": self.known})


def summarise(words: tuple[str, ...]) -> Composed:
    cfg = check.check(compose.compose(list(words)))
    keys = identity.canonical(cfg)
    return Composed(
        label=f"{identity.model_label(cfg)}-{cfg.regularizer.name}-{identity.data_label(cfg)}",
        keys={key: value for key, value in keys.items() if key != "seed"},
        model=identity.model_label(cfg),
        data=identity.data_label(cfg),
        image_size=cfg.data.image_size,
        max_train_samples=cfg.data.max_train_samples,
        epochs=cfg.trainer.epochs,
        max_steps=cfg.trainer.max_steps,
        batch_size=cfg.trainer.batch_size,
        eval_every=cfg.trainer.eval_every,
    )


@lru_cache(maxsize=1)
def sources() -> str:
    digest = hashlib.sha256()
    for file in sorted([*compose.CONFIGS.rglob("*.yaml"), *CHECKED.glob("*.py")]):
        if file.parent.name != "table":
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def state(job: Job) -> tuple[str, str]:
    """How a job stands, and where it failed or diverged, why."""
    run = RunDirectory(job.run)
    if job.script == "eval.py":
        if run.read_json(job.result):
            return DONE, ""
        failure = run.read_json(job.failure.name)
        return (FAILED, failure["reason"]) if failure else (MISSING, "")
    status = run.status()
    if run.finished:
        return DONE, ""
    found = status.get("state", MISSING)
    if found == RUNNING:
        return (RUNNING if alive(status, job.run) else INTERRUPTED), ""
    return (INTERRUPTED if found == DONE else found), status.get("reason", "")


def alive(status: dict, run: Path) -> bool:
    """Whether the process that wrote a status still runs; on another machine, whether the run was written to within
    the last hour (there is a checkpoint every ten minutes)."""
    if status.get("host") != socket.gethostname():
        return time.time() - max(file.stat().st_mtime for file in run.iterdir()) < 3600
    try:
        return b"train.py" in Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    except OSError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(status["pid"], 0)
    except OSError:
        return False
    return True
