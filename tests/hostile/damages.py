"""Files of a finished run and of a table's results, damaged in every way, and the commands that then meet them."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dropkey import session
from dropkey.analysis.entropy import record_entropy
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.records import RunDirectory
from dropkey.reproduction import jobs, tables
from hostile.judge import Case

TABLE = """
title: Two rows
baseline: none
rows: { none: regularizer=none, dropkey: regularizer=dropkey regularizer.ratio=0.3 }
claims: [dropkey > none]
scales:
  tiny:
    about: seconds
    seeds: 1
    columns:
      A: >-
        model.depth=2 model.embed_dim=32 model.num_heads=2 data.max_train_samples=48 data.test_fraction=0.05
        trainer.batch_size=16 trainer.epochs=1 trainer.log_every=1 optim.warmup_epochs=0 logger=none
"""
OF_RUN = (
    *("config.yaml", "status.json", "summary.json", "summary.bits", "metrics.jsonl", "model.json", "entropy.json"),
    *("checkpoints/last.pt", "checkpoints/best.pt", "eval-val.json"),
)
RECORDS = "results/tiny-tiny/records.jsonl"
OF_TABLE = (RECORDS, "tiny.yaml")
TEXT = (".yaml", ".json", ".jsonl")
REWRITTEN = {  # what a command writes anew, besides log, picture and state
    "train": ("model.json", "status.json", "curves.png", "log.txt", "curves.svg"),
    "eval": ("eval-",),
    "visualize": ("entropy", "pictures"),
    "reproduce": ("results/", "entropy.json"),
}
ALWAYS = (".lock", ".composed", "cache", ".claim", "__pycache__")


@dataclass
class World:
    """A directory with four finished runs, an evaluation, a table and its report."""

    path: Path
    run: str = ""  # relative to it
    words: tuple[str, ...] = ()  # that trained the run


def make(path: Path) -> World:
    """Trains the runs, in the current directory, which must be `path`."""
    Path("tiny.yaml").write_text(TABLE)
    found = jobs.jobs_of(tables.load("tiny.yaml", "tiny"), "runs")
    for job in jobs.distinct(found):
        session.train(check(compose(list(job.overrides))), RunDirectory(job.run))
        record_entropy(job.run)
    job = found["dropkey", "A", 0]
    return World(path, str(job.run), tuple(job.overrides))


# ------------------------------------------------------------------------------------------------------------ damages


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, len(content))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def of_text(text: str | bytes):
    def write(path: Path, rng: random.Random) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def lose_keys(path: Path, rng: random.Random) -> None:
    """Half of the keys of each object are gone."""
    change(path, lambda tree: {key: tree[key] for key in sorted(tree)[::2]} if isinstance(tree, dict) else tree)


def other_types(path: Path, rng: random.Random) -> None:
    """Each value is of another type."""
    change(path, lambda tree: {k: "x" if isinstance(v, (int, float, type(None))) else 7 for k, v in tree.items()})


def nothing_known(path: Path, rng: random.Random) -> None:
    """Each number is NaN."""
    change(path, lambda tree: {k: float("nan") if type(v) in (int, float) else v for k, v in tree.items()})


def nulls(path: Path, rng: random.Random) -> None:
    change(path, lambda tree: dict.fromkeys(tree))


def change(path: Path, of) -> None:
    import yaml

    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(of(yaml.safe_load(path.read_text()))))
    else:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("\n".join(json.dumps(of(json.loads(line))) for line in lines) + "\n")


def directory(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: Path, rng: random.Random) -> None:
    path.chmod(0)


def bare_tensor(path: Path, rng: random.Random) -> None:
    import torch

    torch.save(torch.zeros(3), path)


def other_state(path: Path, rng: random.Random) -> None:
    import torch

    torch.save({"model": {"x": torch.zeros(3)}, "position": 7}, path)


ANY = {
    **{f"truncated {n}": truncate for n in range(3)},
    **{f"bits flipped {n}": flip for n in range(3)},
    "empty": of_text(""),
    "binary": of_text(bytes(range(256)) * 4),
    "a directory": directory,
    "missing": missing,
    "a symlink to itself": loop,
}
OF_TEXT = {
    "a list": of_text("[]\n"),
    "a string": of_text('"text"\n'),
    "a number": of_text("7\n"),
    "null": of_text("null\n"),
    "no keys": of_text("{}\n"),
    "half of the keys": lose_keys,
    "other types": other_types,
    "NaN": nothing_known,
    "nulls": nulls,
    "Latin 1": of_text("é: ü\n".encode("latin1")),
    "a billion laughs": of_text("a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b]\n"),
    "a YAML tag": of_text("!!python/object/apply:os.system ['touch pwned']\n"),
    "deeply nested": of_text("[" * 5000),
}
OF_WEIGHTS = {"a bare tensor": bare_tensor, "another state": other_state}


@dataclass(frozen=True)
class Damaged:
    """A file, what happens to it, and the command that is typed then."""

    file: str  # relative to the run for OF_RUN, to the world for OF_TABLE
    damage: str
    case: Case

    def __str__(self) -> str:
        return f"{self.file}: {self.damage}: {self.case.command} {' '.join(self.case.words)[:120]}"


def commands(world: World) -> dict[str, tuple[str, tuple[str, ...]]]:
    run, table = f"run={world.run}", ("table=tiny.yaml", "scale=tiny")
    return {
        "train": ("train", world.words),
        "eval": ("eval", (run,)),
        "runs list": ("runs", ("list",)),
        "runs group": ("runs", ("group",)),
        "predict": ("predict", (run, "image.png")),
        "visualize entropy": ("visualize", ("entropy", run)),
        "reproduce plan": ("reproduce", ("plan", *table)),
        "reproduce report": ("reproduce", ("report", *table)),
    }


def damages_of(file: str) -> dict:
    kind = OF_TEXT if file.endswith(TEXT) else OF_WEIGHTS if file.endswith(".pt") else {}
    return {**ANY, **kind, **({} if os.geteuid() == 0 else {"no permission": unreadable})}


def all_cases(world: World) -> Iterator[Damaged]:
    """Half of the commands meet each damage of a run, in turns; plan, report and report from records those of a
    table."""
    named = commands(world)
    for file in OF_RUN:
        for number, damage in enumerate(damages_of(file)):
            for place, (command, words) in enumerate(named.values()):
                if (number + place) % 2 == 0:
                    yield Damaged(file, damage, Case(f"{Path(file).name}", command, words))
    of_records = ("reproduce", ("report", *named["reproduce report"][1][1:], f"records={RECORDS}"))
    for file in OF_TABLE:
        for damage in damages_of(file):
            for command, words in (named["reproduce plan"], named["reproduce report"], of_records):
                yield Damaged(file, damage, Case(Path(file).name, command, words))


# ------------------------------------------------------------------------------------------------------ what was lost


def snapshot(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def damage(case: Damaged, world: World, copy: Path, seed: int) -> dict[str, str]:
    """Damages a file in a fresh copy of the world; what the other files are."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world.path, copy)
    path = copy / (case.file if case.file in OF_TABLE else f"{world.run}/{case.file}")
    {**ANY, **OF_TEXT, **OF_WEIGHTS, "no permission": unreadable}[case.damage](
        path, random.Random(f"{seed} {case.file} {case.damage}")
    )
    return {name: digest for name, digest in snapshot(copy).items() if copy / name != path}


def lost(case: Damaged, before: dict[str, str], copy: Path) -> list[str]:
    """Files of before that are gone or changed, and not such as the command writes."""
    after = snapshot(copy)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    allowed = (*REWRITTEN.get(case.case.command, ()), *ALWAYS)
    changed = [name for name in changed if not any(one in name for one in allowed)]
    pwned = ["a tag was executed"] if (copy / "pwned").exists() else []
    return [f"lost {', '.join(Path(name).name for name in changed)}"] * bool(changed) + pwned
