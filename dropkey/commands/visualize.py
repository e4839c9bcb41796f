"""Pictures of what a regularizer does: dropkey visualize maps|entropy|masks|schedules [key=value ...]

maps       where models attend, side by side on the same images: run=<run>[,<run> ...]
entropy    entropy of attention over depth, as table, record and plot: run=<run>[,<run> ...]
masks      keys dropped by DropKey, DropKey-Block and DropKey-Cross
schedules  drop ratio over depth

A run is a path, name, hash, the beginning of one, or a pattern: run='*-cifar10-*'. Exit codes as in train.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from dropkey.config import identity
from dropkey.config.check import in_range, require
from dropkey.config.run_lookup import find_runs
from dropkey.config.script_args import arg, parse, run_script

HEADS = ("rollout", "mean", "all")


@dataclass
class Args:
    action: str = arg("", "what to draw", choices=("maps", "entropy", "masks", "schedules"))
    run: List[str] = arg([], "maps, entropy: runs or patterns, with commas")
    images: List[int] = arg([], "maps: positions in the test split, such as 0,5,7; empty: six, evenly over it")
    head: str = arg("rollout", "maps: rollout over layers; or of one layer mean, all, or a head's number")
    layer: int = arg(-1, "maps: the layer of a head, negative from the end")
    root: Optional[str] = arg(None, "maps, entropy: directory of the runs' images, if it has moved")
    ratio: float = arg(0.3, "masks, schedules: drop ratio")
    grid: int = arg(14, "masks: side of the grid of keys")
    layers: int = arg(12, "schedules: number of attention layers")
    output: str = arg("", "file .png, .jpg, .pdf or .svg; empty: in the directory of the one run, or in pictures/")


def maps(args: Args, path: Path) -> None:
    import torch

    from dropkey.analysis import figures, trained
    from dropkey.analysis.maps import attention_maps

    require(args.head in HEADS or args.head.isdigit(), f"head={args.head}: choose {', '.join(HEADS)} or a number")
    labels = trained.labels([trained.config_of(run) for run in args.run], seeds=True)
    found, shown = [], []
    for run in args.run:
        opened = trained.open_run(run, args.root)
        ids = opened.positions(tuple(args.images)) if args.images else opened.spread(6)
        images, pictures = opened.images(ids)
        found.append(attention_maps(opened.model, images, args.head, args.layer))
        shown.append(pictures)
        require(torch.equal(shown[0], shown[-1]), f"run={run} has other images than {args.run[0]}")
    figures.plot_maps(shown[0], opened.names(ids), found, labels, path)


def entropy(args: Args, path: Path) -> None:
    from dropkey.analysis import figures, trained
    from dropkey.analysis.entropy import record_entropy

    configs = [trained.config_of(run) for run in args.run]
    groups, legend = defaultdict(list), {}
    print(f"{'entropy of attention':<56} {'epoch':>5} {'nats':>7} {'of log K':>9}")
    for run, cfg, label in zip(args.run, configs, trained.labels(configs, seeds=False), strict=True):
        result, _ = record_entropy(run, args.root)
        print(f"{run:<56} {result['epoch']:>5} {result['mean_nats']:>7.3f} {result['mean']:>9.4f}", flush=True)
        groups[identity.group_hash(cfg)].append(result)
        legend[identity.group_hash(cfg)] = label
    figures.plot_entropy(list(groups.values()), list(legend.values()), path)


def masks(args: Args, path: Path) -> None:
    from dropkey.analysis import figures

    in_range("ratio", args.ratio, "in [0, 1)")
    require(2 <= args.grid <= 64, f"grid={args.grid} must be in [2, 64]")
    figures.plot_masks(args.ratio, args.grid, path)


def schedules(args: Args, path: Path) -> None:
    from dropkey.analysis import figures

    in_range("ratio", args.ratio, "in [0, 1)")
    in_range("layers", args.layers, "above 0")
    figures.plot_schedules(args.ratio, args.layers, path)


def main(words: list[str]) -> None:
    args = parse(Args, words, __doc__)
    if args.action in ("maps", "entropy"):
        require(bool(args.run), f"{args.action} takes run=<run directory>[,<another>]")
        args.run = [str(run) for run in find_runs(",".join(args.run)) if (run / "checkpoints" / "last.pt").exists()]
        require(bool(args.run), "none of these runs has trained")
    directory = Path(args.run[0]) if len(args.run) == 1 else Path("pictures")
    path = Path(args.output) if args.output else directory / f"{args.action}.png"
    {"maps": maps, "entropy": entropy, "masks": masks, "schedules": schedules}[args.action](args, path)
    print(f"picture {path}")


def start() -> None:
    run_script(main)
