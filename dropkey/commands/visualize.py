"""Pictures of what a regularizer does: dropkey visualize ACTION [key=value ...]

compare    attention maps of runs, side by side on the same images, and their entropy: run=<run>,<another>
maps       attention maps of runs, for a layer's heads or over all layers: run=<run>[,<run> ...]
boxes      detections of runs, side by side on the same images: run=<run>[,<run> ...]
meshes     the same for runs that find meshes, each also seen from the side, with the truth
entropy    entropy of attention over depth, as table, record and plot: run=<run>[,<run> ...]
gallery    one HTML page about a run: curves, entropy, maps, worst mistakes; into the run's directory
masks      keys dropped by DropKey, DropKey-Block and DropKey-Cross
schedules  drop ratio over depth

For runs that find boxes, compare and maps show what the query of an object attends to, or with point=x,y what that
point attends to; for runs that find meshes, what joints attend to. A run is a path, name or hash, the beginning of one,
or a pattern: run='*-cifar10-*'. Exit codes as in train.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from dropkey.config import identity
from dropkey.config.check import in_range, require
from dropkey.config.run_lookup import find_runs
from dropkey.config.script_args import arg, parse, run_script
from dropkey.metrics import Metric
from dropkey.records import RunDirectory

HEADS = ("rollout", "mean", "all")
MOST = 8  # columns of compare
ACTIONS = ("compare", "maps", "boxes", "meshes", "entropy", "gallery", "masks", "schedules")
OF_RUNS = ACTIONS[:6]


@dataclass
class Args:
    action: str = arg("", "what to draw", choices=ACTIONS)
    run: List[str] = arg([], f"{', '.join(OF_RUNS)}: runs or patterns, with commas")
    images: List[int] = arg([], "compare, maps, boxes, meshes: positions in the test split, 0,5,7; empty: evenly")
    head: str = arg(
        "",
        "rollout (over layers), or for one layer mean, all (maps), a head's number; empty: the first that works",
    )
    layer: Optional[int] = arg(
        None, "compare, maps: layer of the heads, from 0; negative: from the end; null: the last"
    )
    point: List[float] = arg([], "compare, maps of runs that find boxes: x,y in pixels, the point that attends")
    joint: List[int] = arg([], "compare, maps of runs that find meshes: joints that attend; empty: one per image")
    threshold: float = arg(0.5, "boxes: the lowest score shown")
    root: Optional[str] = arg(None, "directory of the runs' images, if it has moved")
    ratio: float = arg(0.3, "masks, schedules: drop ratio")
    grid: int = arg(14, "masks: side of the grid of keys")
    layers: int = arg(12, "schedules: number of attention layers")
    output: str = arg(
        "",
        "file .png, .jpg, .pdf or .svg (gallery: .html); empty: in the run's directory, for several in pictures/",
    )


def maps(args: Args) -> Path:
    from dropkey.analysis import map_figures
    from dropkey.analysis.labels import labels

    pictures, titles, found = look(args, args.run, labels(configs_of(args.run), seeds=True), 6)
    path = path_of(args, f"maps-{kind_of(args, found[0].maps)}")
    map_figures.plot_maps(pictures, titles, found, path)
    return path


def compare(args: Args) -> Path:
    from dropkey.analysis import map_figures
    from dropkey.analysis.labels import labels

    groups = by_seed(args)
    require(len(groups) <= MOST, f"compare draws {MOST} runs at most, not {len(groups)} (seeds share a column)")
    first = [runs[0] for runs in groups]
    require(args.head != "all", "head=all: compare draws one map of each run; choose rollout, mean or a number")
    records = [[entropy_of(run, args.root) for run in runs] for runs in groups]
    pictures, _, found = look(args, first, labels(configs_of(first), seeds=False), 4)
    for seen, runs in zip(found, groups, strict=True):
        seen.result = result_of(runs)
    path = path_of(args, f"compare-{kind_of(args, found[0].maps)}")
    map_figures.plot_comparison(pictures, found, records, path)
    return path


def boxes(args: Args) -> Path:
    from dropkey.analysis import box_figures
    from dropkey.analysis import boxes as finding

    require(0 <= args.threshold <= 1, f"threshold={args.threshold} must be in [0, 1]")
    opened, ids, names = side_by_side(args, 5)
    found = [finding.found(one, ids, args.threshold) for one in opened]
    path = path_of(args, "boxes" + (f"-above{args.threshold:g}" if args.threshold != 0.5 else ""))
    box_figures.plot_boxes(opened[0].pictures(ids), opened[0].names(ids), found, names, path)
    return path


def meshes(args: Args) -> Path:
    from dropkey.analysis import mesh_figures
    from dropkey.analysis import meshes as finding

    opened, ids, names = side_by_side(args, 4)
    found = [finding.found(one, ids) for one in opened]
    path = path_of(args, "meshes")
    mesh_figures.plot_meshes(opened[0].pictures(ids), opened[0].names(ids), found, names, path)
    return path


def side_by_side(args: Args, count: int) -> tuple:
    """The first run of each group of seeds, the positions of test images, and what each group is, with its result."""
    from dropkey.analysis.labels import labels

    groups, action = by_seed(args), args.action
    require(len(groups) <= MOST, f"{action} draws {MOST} runs at most, not {len(groups)} (seeds share a column)")
    first = [runs[0] for runs in groups]
    opened, ids = open_all(args, first, count)
    require(opened[0].task.shows == action, f"run={first[0]} finds no {action}; choose maps or compare")
    names = [
        f"{name}\n{result_of(runs)}".strip()
        for name, runs in zip(labels(configs_of(first), seeds=False), groups, strict=True)
    ]
    return opened, ids, names


def entropy(args: Args) -> Path:
    from dropkey.analysis import figures
    from dropkey.analysis.labels import labels

    groups = by_seed(args)
    print(f"{'entropy of attention':<56} {'epoch':>5} {'nats':>7} {'of log K':>9}")
    records = {}
    for run in args.run:
        records[run] = result = entropy_of(run, args.root)
        print(f"{run:<56} {result['epoch']:>5} {result['mean_nats']:>7.3f} {result['mean']:>9.4f}", flush=True)
    path = path_of(args, "entropy")
    names = labels(configs_of([runs[0] for runs in groups]), seeds=False)
    figures.plot_entropy([[records[run] for run in runs] for runs in groups], names, path)
    return path


def open_all(args: Args, runs: list[str], count: int) -> tuple:
    """The runs, and the positions of their test images to look at. Raises ConfigError where they see others."""
    import torch

    from dropkey.analysis import trained

    tasks = dict.fromkeys(cfg.task.name for cfg in configs_of(runs))
    require(
        len(tasks) == 1, f"these runs have different tasks ({', '.join(tasks)}): draw them in pictures of their own"
    )
    opened = [trained.open_run(run, args.root) for run in runs]
    ids = opened[0].positions(tuple(args.images)) if args.images else opened[0].spread(count)
    shown = [one.pictures(ids) for one in opened]
    for run, pictures in zip(runs, shown, strict=True):
        same = len(pictures) == len(shown[0]) and all(map(torch.equal, pictures, shown[0]))
        require(same, f"run={run} has other images than {runs[0]}")
    return opened, ids


def look(args: Args, runs: list[str], names: list[str], count: int) -> tuple:
    """The same images for every run: as people see them, their names, and what each run sees in them."""
    from dropkey.analysis.answers import answers
    from dropkey.analysis.map_figures import Seen
    from dropkey.analysis.maps import attention_maps

    known = not args.head or args.head in HEADS or args.head.isdigit()
    require(known, f"head={args.head}: choose {', '.join(HEADS)} or a number")
    opened, ids = open_all(args, runs, count)
    shows = opened[0].task.shows
    require(shows == "boxes" or not args.point, "point= is for runs that find boxes")
    require(shows == "meshes" or not args.joint, "joint= is for runs that find meshes")
    if shows != "classes":
        return (look_of_queries if shows == "boxes" else look_of_joints)(args, opened, ids, names)
    args.head, layer = args.head or HEADS[0], -1 if args.layer is None else args.layer
    found = [
        Seen(name, attention_maps(one.model, one.images(ids)[0], args.head, layer), answers(one, ids))
        for name, one in zip(names, opened, strict=True)
    ]
    return opened[0].pictures(ids), opened[0].names(ids), found


def look_of_queries(args: Args, opened: list, ids, names: list[str]) -> tuple:
    """`look` at objects instead of images, each with the query that is surest of it; or from a point."""
    from dropkey.analysis import boxes as finding
    from dropkey.analysis.map_figures import Seen

    require(args.head != "rollout", "head=rollout: queries have no rollout; choose mean, all or a number")
    args.head = args.head or "mean"
    pictures, titles = opened[0].pictures(ids), opened[0].names(ids)
    if args.point:
        require(len(args.point) == 2, f"point={','.join(map(str, args.point))} must be x,y")
        found = []
        for name, one in zip(names, opened, strict=True):
            maps, points = finding.point_maps(one, ids.tolist(), tuple(args.point), args.head, args.layer)
            found.append(Seen(name, maps, [], points=points))
        return pictures, titles, found
    chosen = finding.objects(finding.found(opened[0], ids, 1.0))
    found = []
    for name, one in zip(names, opened, strict=True):
        maps, said, marks = finding.look_at(one, ids, chosen, args.head, args.layer)
        found.append(Seen(name, maps, said, marks=marks))
    places = [ids.tolist().index(seen.position) for seen, _ in chosen]
    titles = [f"{titles[place]}: {true.label}" for place, (_, true) in zip(places, chosen, strict=True)]
    return [pictures[place] for place in places], titles, found


def look_of_joints(args: Args, opened: list, ids, names: list[str]) -> tuple:
    """`look` at joints: at those asked for in each image, or at one in each."""
    from dropkey.analysis import meshes as finding
    from dropkey.analysis.map_figures import Seen

    require(args.head != "rollout", "head=rollout: joints have no rollout; choose mean, all or a number")
    args.head, found, rows = args.head or "mean", [], finding.joints_of(opened[0], ids, args.joint)
    for name, one in zip(names, opened, strict=True):
        maps, points, meshes = finding.look_at(one, rows, args.head, args.layer)
        found.append(Seen(name, maps, [], points=points, meshes=meshes))
    ids = ids.new_tensor([position for position, _ in rows])
    titles = [f"{name}: joint {joint}" for name, (_, joint) in zip(opened[0].names(ids), rows, strict=True)]
    return opened[0].pictures(ids), titles, found


def kind_of(args: Args, maps) -> str:
    """rollout, layer3-mean, layer3-heads or layer3-head1, for the name of a file."""
    if maps.layer is None:
        return args.head
    at = f"-point{args.point[0]:g}+{args.point[1]:g}" if args.point else ""
    at += f"-joint{'+'.join(map(str, args.joint))}" if args.joint else ""
    return f"layer{maps.layer}-" + {"mean": "mean", "all": "heads"}.get(args.head, f"head{args.head}") + at


def result_of(runs: list[str]) -> str:
    """The first metric on the test split, mean over runs; nothing if one is not finished."""
    found = [RunDirectory(Path(run)).summary() for run in runs]
    if not all(found):
        return ""
    metric = Metric(**found[0]["metrics"][0])
    return metric.format(sum(one[metric.key] for one in found) / len(found))


def by_seed(args: Args) -> list[list[str]]:
    """The runs in groups that differ in the seed alone, seeds in order; first those without a regularizer, with which
    others are compared."""
    groups = defaultdict(list)
    found = sorted(zip(configs_of(args.run), args.run, strict=True), key=lambda one: one[0].regularizer.name != "none")
    for cfg, run in found:
        groups[identity.group_hash(cfg)].append((cfg.seed, run))
    return [[run for _, run in sorted(group)] for group in groups.values()]


def configs_of(runs: list[str]) -> list:
    from dropkey.analysis.trained import config_of

    return [config_of(run) for run in runs]


def entropy_of(run: str, root: Optional[str]) -> dict:
    from dropkey.analysis.entropy import record_entropy

    return record_entropy(run, root)[0]


def path_of(args: Args, name: str) -> Path:
    """Where a picture goes. Its name says what is drawn, so that no picture takes the place of another."""
    from dropkey.analysis.labels import file_stem

    if args.output:
        return Path(args.output)
    if args.images:
        name += "-images" + "+".join(map(str, args.images))
    if len(args.run) == 1:
        return Path(args.run[0]) / f"{name}.png"
    return Path("pictures") / f"{name}-{file_stem(configs_of(args.run))}.png"


def gallery(args: Args) -> None:
    from dropkey.analysis.gallery import write_gallery

    require(len(args.run) == 1 or not args.output, "gallery writes a page into each run; output= takes a single run")
    require(args.output.endswith(".html") or not args.output, f"output={args.output}: the name of a page ends in .html")
    for run in args.run:
        path = Path(args.output) if args.output else Path(run) / "gallery.html"
        write_gallery(run, path, args.root)
        print(f"page {path}", flush=True)


def masks(args: Args) -> Path:
    from dropkey.analysis import figures

    in_range("ratio", args.ratio, "in [0, 1)")
    require(2 <= args.grid <= 64, f"grid={args.grid} must be in [2, 64]")
    path = Path(args.output or f"pictures/masks-ratio{args.ratio:g}-grid{args.grid}.png")
    figures.plot_masks(args.ratio, args.grid, path)
    return path


def schedules(args: Args) -> Path:
    from dropkey.analysis import figures

    in_range("ratio", args.ratio, "in [0, 1)")
    in_range("layers", args.layers, "above 0")
    path = Path(args.output or f"pictures/schedules-ratio{args.ratio:g}-layers{args.layers}.png")
    figures.plot_schedules(args.ratio, args.layers, path)
    return path


def main(words: list[str]) -> None:
    args = parse(Args, words, __doc__)
    if args.action in OF_RUNS:
        require(bool(args.run), f"{args.action} takes run=<run directory>[,<another>]")
        args.run = [str(run) for run in find_runs(",".join(args.run)) if (run / "checkpoints" / "last.pt").exists()]
        require(bool(args.run), "none of these runs has trained")
    actions = (compare, maps, boxes, meshes, entropy, gallery, masks, schedules)
    path = {action.__name__: action for action in actions}[args.action](args)
    if path:
        print(f"picture {path}")


def start() -> None:
    run_script(main)
