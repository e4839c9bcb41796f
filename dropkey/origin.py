"""What a run was made of: its config, its data, the weights it started from. They are kept in its model.json and
compared whenever the run is resumed or used, because other data or weights under the same name would go unnoticed.
Imports no torch."""

import hashlib
from pathlib import Path
from typing import Any, Optional

from dropkey.config import compose, identity
from dropkey.config.schema import TrainConfig
from dropkey.errors import ConfigError, DataError
from dropkey.records import RunDirectory

FILE, KEY = "model.json", "origin"
MOVES = ("data.root", "data.token_labels", "init_from", "regularizer.impl")  # may be others where the run is used
SPLITS = ("train", "val", "test")
SHOWN = 3  # classes that a message lists


def origin_of(cfg: TrainConfig, data: Any) -> dict:
    """What to keep of a run that begins."""
    return {"config": config_digest(cfg), "data": data_facts(data), "start": start_facts(cfg.init_from)}


def known(run: RunDirectory) -> dict:
    """What was kept; of a run made before there was this, the fingerprint of its data."""
    kept = run.read_json(FILE).get(KEY)
    if kept is None:
        fingerprint = run.summary().get("data")
        kept = {"data": {"fingerprint": fingerprint}} if fingerprint else {}
    return kept


# --------------------------------------------------------------------------------------------------------- config


def config_digest(cfg: TrainConfig) -> str:
    return identity.digest({key: value for key, value in identity.canonical(cfg).items() if key not in MOVES})


def require_same_config(run: RunDirectory, cfg: TrainConfig) -> None:
    """`cfg` is what config.yaml says now.

    Raises:
        ConfigError: it was edited.
    """
    kept = known(run).get("config")
    if kept is not None and kept != config_digest(cfg):
        raise ConfigError(f"{run.config} was edited after the training began; restore it, or train the run again")


def other_root(run: RunDirectory, cfg: TrainConfig) -> Optional[str]:
    """Where the run's data were, if that is another place than `cfg` says."""
    if not run.config.is_file():
        return None
    root = compose.read(run.config).data.root
    return root if Path(root).resolve() != Path(cfg.data.root).resolve() else None


# ----------------------------------------------------------------------------------------------------------- data


def data_facts(data: Any) -> dict:
    sizes = {name: len(split) for name in SPLITS if hasattr(split := getattr(data, name, None), "__len__")}
    return {"fingerprint": data.fingerprint(), **sizes, "classes": getattr(data, "classes", None)}


def require_same_data(run: RunDirectory, data: Any, remedy: str, sizes: bool = True) -> None:
    """
    Args:
        remedy: how to go on without the data of before.
        sizes: whether the splits are cut as in training.
    Raises:
        DataError: the data are not those of before; with what differs.
    """
    then, now = known(run).get("data", {}), data_facts(data)
    found = [
        f"{then[name]:,} {name} samples then, {now.get(name, 0):,} now"
        for name in SPLITS
        if sizes and then.get(name) is not None and then[name] != now.get(name)
    ]
    found += renamed(then.get("classes"), now["classes"])
    if then and then["fingerprint"] != now["fingerprint"] and not found:
        found = ["files or labels are others"]
    if found:
        raise DataError(f"the data are not those that {run.path} was trained on: {'; '.join(found)}. {remedy}")


def renamed(then: Optional[list], now: Optional[list]) -> list[str]:
    if then is None or now is None or list(then) == list(now):
        return []
    gone, new = [[str(name) for name in a if name not in b][:SHOWN] for a, b in ((then, now), (now, then))]
    return [f"classes {', '.join(gone) or '(none)'} have become {', '.join(new) or '(none)'}"]


# ---------------------------------------------------------------------------------------------------------- start


def start_facts(init_from: Optional[str]) -> Optional[dict]:
    """The file that a run starts from, its content, and how far its own run was; None without one."""
    file = init_from and start_file(init_from)
    if not file or not file.is_file():
        return None
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"file": str(file), "sha256": digest, "progress": progress_of(init_from)}


def start_file(init_from: str) -> Path:
    path = Path(init_from)
    return path / "checkpoints" / "last.pt" if path.is_dir() else path


def progress_of(init_from: str) -> str:
    """ "" for a file or a finished run; otherwise its state."""
    run = RunDirectory(Path(init_from))
    if not run.config.is_file() or run.finished:
        return ""
    epochs = run.records("epoch")
    return f"{run.state()[0]} after {epochs[-1]['epoch'] if epochs else 0} epochs"


def require_same_start(run: RunDirectory, cfg: TrainConfig) -> None:
    """
    Raises:
        ConfigError: `init_from` has other weights now than those the run started from.
    """
    kept, now = known(run).get("start"), start_facts(cfg.init_from)
    if kept and now and kept["sha256"] != now["sha256"]:
        was = f" ({kept['progress']})" if kept["progress"] else ""
        raise ConfigError(
            f"{run.path} started from {kept['file']}{was}, which has other weights now; "
            "overwrite=true trains it again from these"
        )
