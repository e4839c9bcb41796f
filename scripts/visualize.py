"""Pictures of what a regularizer does, drawn from runs or from the regularizers themselves.

    python scripts/visualize.py maps run=<run>[,<run> ...]        where models look, side by side on the same images
    python scripts/visualize.py entropy run=<run>[,<run> ...]     entropy of attention over depth: table, record, plot
    python scripts/visualize.py masks                             keys dropped by DropKey, Block and Cross
    python scripts/visualize.py schedules                         drop ratio over depth

maps      images=0,5,7 (positions in the test split), head=rollout|mean|all|<number>, layer=-1 (of a head)
masks     ratio=0.3 grid=14
schedules ratio=0.3 layers=12
maps, entropy: root=<directory> where the runs' images lie now; a run may be a pattern, run='runs/*-cifar10-*'
all       output=<file.png, .jpg, .pdf or .svg>; else the directory of the one run, or pictures/

Exit codes as in train.py.
"""

import dataclasses
import glob
import sys
from collections import defaultdict
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dropkey.config import identity
from dropkey.config.check import in_range, nearest, one_of, require
from dropkey.errors import ConfigError, RunError

HEADS = ("rollout", "mean", "all")
NUMBERS = {"layer": int, "grid": int, "layers": int, "ratio": float}


@dataclasses.dataclass
class Options:
    """Of all commands; `COMMANDS` says which takes which."""

    run: tuple[str, ...] = ()
    images: Optional[tuple[int, ...]] = None  # None: six, evenly over the test split
    head: str = "rollout"
    layer: int = -1
    root: Optional[str] = None
    ratio: float = 0.3
    grid: int = 14
    layers: int = 12
    output: Optional[Path] = None


def maps(options: Options) -> Path:
    import torch

    from dropkey.analysis import figures, trained
    from dropkey.analysis.maps import look

    labels = trained.labels([trained.config_of(run) for run in options.run], seeds=True)
    found, pictures = [], []
    for run in options.run:
        opened = trained.open_run(run, options.root)
        ids = opened.spread(6) if options.images is None else opened.positions(options.images)
        images = opened.images(ids)
        found.append(look(opened.model, images, options.head, options.layer))
        pictures.append(opened.pictures(images))
        require(torch.equal(pictures[0], pictures[-1]), f"{run} was trained for other images than {options.run[0]}")
    path = where(options, "maps")
    figures.maps(pictures[0], opened.names(ids), found, labels, path)
    return path


def entropy(options: Options) -> Path:
    from dropkey.analysis import figures, trained
    from dropkey.analysis.entropy import record

    configs = [trained.config_of(run) for run in options.run]
    groups, legend = defaultdict(list), {}
    print(f"{'entropy of attention':<56} {'epoch':>5} {'nats':>7} {'of log K':>9}")
    for run, cfg, label in zip(options.run, configs, trained.labels(configs, seeds=False), strict=True):
        result, _ = record(run, options.root)
        print(f"{run:<56} {result['epoch']:>5} {result['mean_nats']:>7.3f} {result['mean']:>9.4f}", flush=True)
        groups[identity.group_hash(cfg)].append(result)
        legend[identity.group_hash(cfg)] = label
    path = where(options, "entropy")
    figures.entropy(list(groups.values()), list(legend.values()), path)
    return path


def masks(options: Options) -> Path:
    from dropkey.analysis import figures

    in_range("ratio", options.ratio, "in [0, 1)")
    require(2 <= options.grid <= 64, f"grid={options.grid} must be in [2, 64]")
    path = where(options, "masks")
    figures.masks(options.ratio, options.grid, path)
    return path


def schedules(options: Options) -> Path:
    from dropkey.analysis import figures

    in_range("ratio", options.ratio, "in [0, 1)")
    in_range("layers", options.layers, "above 0")
    path = where(options, "schedules")
    figures.schedule(options.ratio, options.layers, path)
    return path


COMMANDS = {
    "maps": (maps, ("run", "images", "head", "layer", "root", "output")),
    "entropy": (entropy, ("run", "root", "output")),
    "masks": (masks, ("ratio", "grid", "output")),
    "schedules": (schedules, ("ratio", "layers", "output")),
}


def where(options: Options, name: str) -> Path:
    """The picture's file."""
    if options.output is not None:
        return options.output
    return (Path(options.run[0]) if len(options.run) == 1 else Path("pictures")) / f"{name}.png"


# ------------------------------------------------------------------------------------------------------ the words


def parse(words: list[str]) -> tuple[str, Options]:
    """The command and its options; ConfigError for what is none."""
    require(bool(words), f"which picture? {', '.join(COMMANDS)}; --help tells more")
    command, *rest = words
    one_of("the picture", command, COMMANDS)
    keys, given = COMMANDS[command][1], {}
    for word in rest:
        key, sign, value = word.partition("=")
        require(bool(sign and value), f"cannot read '{word}'; options look like key=value")
        require(key in keys, f"{key} is no option of {command}{nearest(key, keys)}")
        given[key] = converted(key, value)
    require("run" not in keys or bool(given.get("run")), f"{command} takes run=<run directory>[,<another>]")
    return command, Options(**given)


def converted(key: str, value: str):
    """The value as the type of its field."""
    if key == "run":
        return tuple(run for part in value.split(",") for run in matching(part))
    if key == "head":
        require(value in HEADS or value.isdigit(), f"head={value} is neither {', '.join(HEADS)} nor a head's number")
    try:
        if key == "images":
            return tuple(int(part) for part in value.split(","))
        return NUMBERS[key](value) if key in NUMBERS else Path(value) if key == "output" else value
    except ValueError:
        wanted = {"images": "whole numbers, such as 0,5,7", "ratio": "a number"}.get(key, "a whole number")
        raise ConfigError(f"{key}={value}: {key} takes {wanted}") from None


def matching(run: str) -> list[str]:
    """Run directories that a pattern means, or the one named."""
    if not glob.has_magic(run):
        return [run]
    found = sorted(path for path in glob.glob(run) if (Path(path) / "checkpoints" / "last.pt").exists())
    require(bool(found), f"run={run} matches no run that has trained")
    return found


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    try:
        command, options = parse(words)
        print(f"picture {COMMANDS[command][0](options)}")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
