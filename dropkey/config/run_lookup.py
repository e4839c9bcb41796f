"""Which run is meant: a path, a name, a hash, the beginning of either, or a pattern. Imports no torch."""

import fnmatch
import glob
import os
from pathlib import Path

from dropkey.config import compose, identity
from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory

SHOWN = 5  # runs that a message lists
LATEST, FEW = 50, 3  # runs that `sibling` looks at, and keys that may differ


def all_runs(root: str | Path) -> list[Path]:
    """The run directories in `root`, the latest last."""
    found = [Path(entry.path) for entry in os.scandir(root)] if Path(root).is_dir() else []
    found = [path for path in found if (path / "config.yaml").is_file()]
    return sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime_ns, path.name))


def find_runs(words: str, root: str | Path | None = None, key: str = "run") -> list[Path]:
    """The run directories that `words` means; several words are separated by commas.

    Args:
        words: `runs/<name>`, `<name>`, `<hash>`, the beginning of a name or of a hash (4 characters or more), or a
            pattern such as `'*-dropkey-*'`; a directory before it (`/scratch/runs/3f2a`) is where to look.
        root: where to look for a word without a directory; None: the config's `output`.
        key: what messages call it.
    Raises:
        ConfigError: a word that means no run.
    """
    found = []
    for word in filter(None, words.split(",")):
        found += [path for path in one_word(word, root, key) if path not in found]
    return found


def find_run(word: str, root: str | Path | None = None, key: str = "run") -> Path:
    """The one run directory that `word` means; see `find_runs`.

    Raises:
        ConfigError: none, or several.
    """
    found = find_runs(word, root, key)
    listed = ", ".join(path.name for path in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    require(len(found) == 1, f"{key}={word} means {len(found)} runs: {listed}; write more of the name")
    return found[0]


def one_word(word: str, root: str | Path | None, key: str) -> list[Path]:
    path = Path(word)
    require(len(os.fsencode(path.name)) < 256 and "\0" not in word, f"{key}={word} cannot be the name of a run")
    if (path / "config.yaml").is_file():
        return [path]
    require(not path.exists() or not path.is_file(), f"{key}={word} is a file; a run is a directory with a config.yaml")
    require(bool(path.name.strip(".")), f"{key}={word} is no run, which is a directory with a config.yaml")
    inside = os.sep in word.rstrip(os.sep)
    if inside and glob.has_magic(word):
        found = [one for one in map(Path, sorted(glob.glob(word))) if (one / "config.yaml").is_file()]
        require(bool(found), f"{key}={word} matches no run")
        return found
    root = path.parent if inside else Path(root if root is not None else default_root())
    name, runs = path.name, all_runs(root)
    if glob.has_magic(name):
        found = [one for one in runs if fnmatch.fnmatch(one.name, name)]
    else:
        found = [one for one in runs if name in (one.name, one.name.rpartition("-")[2])]
        found = found or [one for one in runs if begins(one.name, name)]
    if not found:
        where = f"there are no runs in {root}" if not runs else nearest(name, [one.name for one in runs[-200:]])[2:]
        meant = "no run, and is no file" if key == "init_from" else "no run"
        raise ConfigError(f"{key}={word} means {meant}; {where}")
    return found


def begins(run: str, word: str) -> bool:
    return run.startswith(word) or (len(word) >= 4 and run.rpartition("-")[2].startswith(word))


def default_root() -> str:
    return compose.compose().output


def sibling(cfg: TrainConfig) -> str:
    """For a run that has not begun: the run with the same name that it might be taken for, and what differs; or ""."""
    path = identity.run_directory(cfg)
    known = [] if path.exists() else [one for one in all_runs(cfg.output) if alike(one, path)][-LATEST:]
    found = [(identity.differences(compose.read(one / "config.yaml"), cfg), one) for one in known]
    near, other = min(found, key=lambda one: len(one[0]), default=([], None))
    if not 1 <= len(near) <= FEW:
        return ""
    return f"new run; {other.name} ({RunDirectory(other).state()[0]}) differs in {'; '.join(near)}"


def alike(one: Path, other: Path) -> bool:
    return one.name.rpartition("-")[0] == other.name.rpartition("-")[0]
