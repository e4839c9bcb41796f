"""Tries one case: in a fresh place, with the training replaced by a check that the config can be kept."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from dropkey import evaluation, session, tasks
from dropkey.commands import train
from dropkey.config import compose, identity
from hostile import damages, judge
from hostile.damages import Damaged, World
from hostile.judge import Case


def world(path: Path) -> World:
    """The place in which all cases happen, made in that directory."""
    from sklearn.datasets import load_digits
    from torchvision.utils import save_image

    path.mkdir(parents=True)
    with inside(path), judge.captured():
        import torch

        save_image(torch.tensor(load_digits().images[0]) / 16, "image.png")
        made = damages.make(path)
        ended = [judge.run(*words) for words in finished(made)]
    assert not any(one.code for one in ended), ended
    return made


def finished(made: World) -> list[tuple]:
    evaluations = [("eval", (f"run={made.run}", "eval.split=val"))]
    return [*evaluations, ("reproduce", ("report", "table=tiny.yaml", "scale=tiny"))]


@contextlib.contextmanager
def inside(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def would_train(cfg, run) -> dict:
    """In place of `session.train`: the config must survive being saved, and have a name."""
    tasks.build(cfg)
    with tempfile.TemporaryDirectory() as folder:
        compose.save(cfg, Path(folder) / "config.yaml")
        assert not identity.differences(compose.load(Path(folder) / "config.yaml"), cfg)
    return {"objective": 0.0}


def would_evaluate(cfg, trained, directory) -> None:
    sys.exit(0)


def tried(case: Case | Damaged, world: World, place: Path, seed: int = 0) -> list[str]:
    """What is wrong with how it ended. `place` is a directory of this process's own."""
    if isinstance(case, Damaged):
        before = damages.damage(case, world, place, seed)
        with inside(place):
            ended = judge.run(case.case.command, case.case.words)
        return judge.faults(case.case, ended) + damages.lost(case, before, place)
    if not place.exists():
        shutil.copytree(world.path, place)
    with inside(place):
        if case.real:
            return judge.faults(case, judge.run(case.command, case.words))
        with (
            mock.patch.object(session, "train", would_train),
            mock.patch.object(train, "print_result"),
            mock.patch.object(evaluation, "evaluate_run", would_evaluate),
        ):
            return judge.faults(case, judge.run(case.command, case.words))
