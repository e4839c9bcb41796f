"""How the project's pictures look and are saved, and the curves of a run. Matplotlib is imported at the first use."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from dropkey.errors import ConfigError, StorageError
from dropkey.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "bright" and "muted" schemes, which any kind of colour vision tells apart.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#332288", "#dd7733", "#222222", "#44aa99")
GREY, INK, PALE = "#666666", "#222222", "#dde5ee"
MARKERS = "osD^vPX"  # their number and that of the colors have no common divisor, so that 70 lines differ
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
    """A figure of `size` inches and its axes (an array, rows x columns), free of pyplot: nothing needs to be closed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


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
        return text.getvalue()
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
    epochs = [record for record in records if record["kind"] == "epoch"]

    def line(axis: "Axes", key: str, color: str, label: Optional[str] = None) -> list[tuple]:
        points = [(record["epoch"], record[key]) for record in epochs if key in record]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, label=label)
        return points

    with style():
        figure, ((left, right),) = subplots(1, 2, (9, 3.4))
        line(left, "train_loss", COLORS[0], "training")
        line(left, "eval_loss", COLORS[1], split)
        if points := line(right, f"eval_{metric.key}", COLORS[1]):
            pick = max if metric.higher_is_better else min
            epoch, best = pick(points, key=lambda point: point[1])
            right.plot(epoch, best, "o", color=COLORS[1], markersize=4)
            right.set_title(f"last {metric.format(points[-1][1])}, best {metric.format(best)} (epoch {epoch})")
        left.set(title=title, xlabel="epoch", ylabel="loss")
        left.legend()
        unit = f" ({metric.unit})" if metric.unit else ""
        right.set(xlabel="epoch", ylabel=f"{metric.label} on the {split} split{unit}")
        for axis in (left, right):
            axis.grid()
        save(figure, path)
