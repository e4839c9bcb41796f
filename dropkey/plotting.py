"""How the project's pictures look and are saved, and the curves of a run. Matplotlib is imported at the first use."""

import contextlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from dropkey.errors import ConfigError, StorageError
from dropkey.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "bright" and "muted" schemes, which any kind of colour vision tells apart.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#332288", "#dd7733", "#222222", "#44aa99")
GREY, SILVER, INK, PALE, WRONG = "#666666", "#cccccc", "#222222", "#dde5ee", "#cc3311"
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
CROWD = 4  # more lines than this are not told apart in one panel: draw `panels`
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
STYLE = {
    **{"font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.edgecolor": INK, "text.color": INK},
    **{"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25},
    **{"legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 150},
    **{"svg.hashsalt": "dropkey", "svg.fonttype": "none"},  # the same bytes from the same figures
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within, figures have the project's style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def subplots(rows: int, columns: int, size: tuple[float, float], **options) -> tuple["Figure", "Sequence"]:
    """A figure of `size` inches and its axes (an array, rows x columns)."""
    figure = new_figure(size)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def new_figure(size: tuple[float, float]) -> "Figure":
    """Free of pyplot: nothing needs to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def looks(count: int) -> list[dict]:
    """For each of `count` lines a colour, a marker and dashes. No colour is repeated: beyond those of `COLORS` they are
    taken from a colour map."""
    from matplotlib import colormaps

    colors = COLORS[:count]
    if count > len(COLORS):
        colors = [colormaps["turbo"](0.04 + 0.92 * i / (count - 1)) for i in range(count)]
    return [
        {
            "color": color,
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES) if count > CROWD else 0],
        }
        for i, color in enumerate(colors)
    ]


def panels(figure: "Figure", count: int, columns: int = 4) -> list["Axes"]:
    """Small multiples: `count` axes of one scale, `columns` in a line."""
    lines = math.ceil(count / columns)
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[max(0, count - columns) : count]:  # the lowest of its column
        axis.tick_params(labelbottom=True)
    return axes[:count]


def legend_below(figure: "Figure", axes: Iterable["Axes"]) -> None:
    """A legend of everything named in `axes`, under the figure's axes, in as many columns as its width holds. Labels
    too long for a line are wrapped, and the figure grows by the legend's height."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not named:
        return
    labels = list(named)
    room = figure.get_figwidth() * figure.dpi * 0.98
    longest = max(map(len, labels))
    choices = [(columns, longest) for columns in range(len(labels), 0, -1)]
    choices += [(1, length) for length in range(longest - 5, 10, -5)]
    for columns, length in choices:
        shown = [wrapped(label, max(length, 10)) for label in labels]
        legend = figure.legend(list(named.values()), shown, loc="outside lower center", ncols=columns)
        extent = legend.get_window_extent()
        if extent.width <= room:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, where words allow it; its own lines stay."""
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width))


def save(figure: "Figure", path: Optional[Path] = None) -> Optional[str]:
    """Writes the picture to `path` in the format of its suffix, whole or not at all; without a path, returns SVG.

    Raises:
        ConfigError: a suffix that is not in `SUFFIXES`.
        StorageError: the file cannot be written.
    """
    if path is None:
        text = io.StringIO()
        with style():  # the salt of SVG's identifiers
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return numbered(text.getvalue())
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output={path}: the file name of a picture ends in {', '.join(SUFFIXES)}")
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(temporary, format=path.suffix[1:])
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; choose another place with output=...") from None


def numbered(svg: str) -> str:
    """The text with its parts numbered in order. Matplotlib names them by hashes of places, whose last digits, which
    the text does not show, differ from process to process."""
    names: dict[str, str] = {}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: names.setdefault(found[0], f"part{len(names)}"), svg)


def image_axis(axis: "Axes") -> None:
    """No ticks and no frame, for an axis that shows an image."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def curves(records: list[dict], title: str, path: Path, split: str, metric: Metric) -> None:
    """The picture of a run: loss (left) and `metric` on `split` (right) over epochs.

    Args:
        records: lines of metrics.jsonl; those of epochs hold `train_loss` and, after an evaluation, `eval_<key>` and
            perhaps `eval_loss`.
    """
    with style():
        figure, ((left, right),) = subplots(1, 2, (9, 3.4))
        draw_loss(left, records, split)
        draw_metric(right, records, split, metric)
        left.set_title(title)
        save(figure, path)


def draw_loss(axis: "Axes", records: list[dict], split: str) -> None:
    for key, color, label in (("train_loss", COLORS[0], "training"), ("eval_loss", COLORS[1], split)):
        if points := over_epochs(records, key):
            axis.plot(*zip(*points, strict=True), "o-" if len(points) == 1 else "-", color=color, label=label)
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend()
    axis.grid()


def draw_metric(axis: "Axes", records: list[dict], split: str, metric: Metric) -> None:
    """With a dot at the best epoch."""
    if points := over_epochs(records, f"eval_{metric.key}"):
        epoch, best = (max if metric.higher_is_better else min)(points, key=lambda point: point[1])
        axis.plot(*zip(*points, strict=True), color=COLORS[1])
        axis.plot(epoch, best, "o", color=COLORS[1], markersize=4)
        axis.set_title(f"last {metric.format(points[-1][1])}, best {metric.format(best)} (epoch {epoch})")
    unit = f" ({metric.unit})" if metric.unit else ""
    axis.set(xlabel="epoch", ylabel=f"{metric.label} on the {split} split{unit}")
    axis.grid()


def over_epochs(records: list[dict], key: str) -> list[tuple[int, float]]:
    known = (record for record in records if record["kind"] == "epoch" and record.get(key) is not None)
    return [(record["epoch"], record[key]) for record in known]


def lines_of(layers: list[dict]) -> list[list[tuple[int, int]]]:
    """What a line goes through: place on the axis, from 1, and number of each layer. All layers in forward order; with
    an encoder and a decoder, those of a kind and stack together."""
    parts: dict[tuple, list[int]] = {}
    for number, layer in enumerate(layers):
        parts.setdefault((layer["stack"], layer["kind"]) if "stack" in layer else (), []).append(number)
    places = itertools.count(1)
    return [[(next(places), number) for number in part] for part in parts.values()]


def ticks_of(layers: list[dict]) -> list[str]:
    if "stack" not in layers[0]:
        return layer_ticks([layer["kind"] for layer in layers])
    ticks = []
    for part in lines_of(layers):
        own = [str(number + 1) for number in range(len(part))]
        first = layers[part[0][1]]
        own[(len(own) - 1) // 2] += f"\n{first['stack']}\n{first['kind']}"
        ticks += own
    return ticks


def layer_ticks(kinds: list[str]) -> list[str]:
    """Numbers of layers from 1, of more than 16 not all; where kinds differ, each run of one kind has its name below
    the middle number."""
    step = 1 + (len(kinds) - 1) // 16
    ticks = ["" if number % step else str(number + 1) for number in range(len(kinds))]
    end = 0
    for kind, run in itertools.groupby(kinds) if len(set(kinds)) > 1 else ():
        begin, end = end, end + len(list(run))
        ticks[(begin + end - 1) // 2] += f"\n{kind}"
    return ticks
