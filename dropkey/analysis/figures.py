"""The pictures: attention maps, entropy over depth, masks, schedules. Colours are Paul Tol's, safe for the
colour-blind; files are PNG, JPEG, PDF or SVG by their suffix."""

import contextlib
import itertools
import math
import textwrap
from pathlib import Path
from typing import Iterator

import torch.nn.functional as F
from torch import Tensor

from dropkey import regularizers, schedules
from dropkey.analysis.maps import Maps
from dropkey.errors import ConfigError, StorageError

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#332288", "#dd7733", "#222222", "#44aa99")
MARKERS = "osD^vPX"  # of another number than the colours, so that 70 lines differ
INK, KEPT = "#222222", "#dde5ee"
MASKS = (("dropkey", None), ("dropkey_block", 3), ("dropkey_cross", 5), ("dropkey_cross", "full"))  # figure 3
DRAWS = 4096  # masks over which a mean ratio is taken
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
PIXELS = 224  # of an image in a figure of maps, after upsampling
SHADE, TRACE = 0.7, 0.12  # brightness of a map where the image is black, of the image where the map is


@contextlib.contextmanager
def canvas(path: Path, rows: int, columns: int, size: tuple[float, float], **options) -> Iterator[tuple]:
    """Figure and axes of `size` inches, saved as `path` at the end.

    Raises:
        ConfigError: a suffix that is no picture's.
        StorageError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output={path}: pictures end in {', '.join(SUFFIXES)}")
    style = {"font.size": 9, "axes.titlesize": 9, "axes.edgecolor": INK, "text.color": INK, "svg.hashsalt": "dropkey"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
        try:
            yield figure, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            figure.savefig(temporary, dpi=160, format=path.suffix[1:])
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}; output=... takes another place") from None
        finally:
            plt.close(figure)


def plain(axis) -> None:
    """An axis that shows an image."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


# ------------------------------------------------------------------------------------------------------------ maps


def maps(pictures: Tensor, titles: list[str], found: list[Maps], labels: list[str], path: Path) -> None:
    """Images in the first row, below them every map of every run: the colour is attention, from none to the most in
    that map; the image lies beneath as light and shade.

    Args:
        pictures: B C H W in [0, 1].
        titles: what to call each image.
        found: for each run, maps of these images.
        labels: of the runs.
    """
    rows = [(label, i, run) for label, run in zip(labels, found, strict=True) for i in range(len(run.names))]
    size = (1.4 * len(titles) + 0.4, 1.4 * (1 + len(rows)) + 0.7)
    with canvas(path, 1 + len(rows), len(titles), size) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
        for axis in axes.flat:
            plain(axis)
        for column, title in enumerate(titles):
            image = enlarge(pictures[column : column + 1])[0]
            axes[0, column].imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy())
            axes[0, column].set_title(title, fontsize=8)
            for axis, (_, i, run) in zip(axes[1:, column], rows, strict=True):
                axis.imshow(over(image, run.values[column, i]).numpy())
        for axis, (label, i, run) in zip(axes[1:, 0], rows, strict=True):
            told = [label] * (len(found) > 1) + [run.names[i]] * (len(run.names) > 1 or len(found) == 1)
            axis.set_ylabel("\n".join(line for part in told for line in textwrap.wrap(part, 22)), fontsize=8)
        captions = [*dict.fromkeys(run.caption for run in found), "each map from 0 (black) to its own maximum (light)"]
        figure.supxlabel("\n".join(captions), fontsize=8)


def enlarge(images: Tensor) -> Tensor:
    """Images at `PIXELS` or more, their own pixels still visible."""
    factor = max(1, math.ceil(PIXELS / images.shape[-1]))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def over(image: Tensor, values: Tensor) -> Tensor:
    """A map (h w) upsampled over an image (C H W) as colours, H W 3: a product, because a mixture of the two would
    turn light pixels into other colours of the scale, and a trace of the image where the map is black.

    Bilinear, because bicubic draws dark rings around peaks that nobody computed.
    """
    from matplotlib import colormaps

    large = F.interpolate(values[None, None].float().cpu(), size=image.shape[-2:], mode="bilinear")[0, 0]
    colours = Tensor(colormaps["inferno"]((large / large.max()).numpy())[..., :3])
    light = image.mean(0).unsqueeze(-1)
    return (colours * (SHADE + (1 - SHADE) * light) + TRACE * light).clamp(max=1)


# --------------------------------------------------------------------------------------------------------- entropy


def entropy(records: list[list[dict]], labels: list[str], path: Path) -> None:
    """Normalised entropy over depth: a mark for each head, a line through the means over heads.

    Args:
        records: the entropy.json of the runs behind each line, several where they differ in the seed alone.
        labels: of the lines.
    """
    deepest = max((group[0] for group in records), key=lambda record: len(record["layers"]))["layers"]
    width = max(4.8, 1.6 + 0.42 * len(deepest))
    columns = max(1, int(width / (0.6 + 0.07 * max(map(len, labels)))))  # inches of a legend in 8 point
    with canvas(path, 1, 1, (width, 3.2 + 0.2 * math.ceil(len(labels) / columns))) as (figure, ((axis,),)):
        for index, (group, label) in enumerate(zip(records, labels, strict=True)):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            shift = 0.34 * ((index + 0.5) / len(records) - 0.5)  # lines side by side rather than one over the other
            layers = range(len(group[0]["layers"]))
            heads = [[v for record in group for v in record["layers"][layer]["normalised"]] for layer in layers]
            across = [layer + 1 + shift for layer in layers]
            for x, values in zip(across, heads, strict=True):
                axis.plot([x] * len(values), values, marker, color=colour, alpha=0.5, markersize=3.5, markeredgewidth=0)
            means = [sum(values) / len(values) for values in heads]
            told = label + (f", {len(group)} seeds" if len(group) > 1 else "")
            axis.plot(across, means, "-", marker=marker, color=colour, markersize=5.5, linewidth=1.5, label=told)
        axis.set_xticks(range(1, len(deepest) + 1), kinds_below([layer["kind"] for layer in deepest]))
        axis.set(xlabel="attention layer", ylabel="attention entropy / log K")
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def kinds_below(kinds: list[str]) -> list[str]:
    """Numbers of layers from 1; where there are several kinds of attention, below the middle of each stretch its
    kind."""
    names = [str(number) for number in range(1, len(kinds) + 1)]
    end = 0
    for kind, stretch in itertools.groupby(kinds) if len(set(kinds)) > 1 else ():
        begin, end = end, end + len(list(stretch))
        names[(begin + end - 1) // 2] += f"\n{kind}"
    return names


# -------------------------------------------------------------------------------------------- masks and schedules


def masks(ratio: float, grid: int, path: Path) -> None:
    """One query's mask under DropKey, DropKey-Block and DropKey-Cross (paper, figure 3) on a square grid of keys,
    with the share dropped there and its mean over many draws."""
    from matplotlib.colors import ListedColormap

    with canvas(path, 1, len(MASKS), (2.1 * len(MASKS), 2.75)) as (figure, axes):
        for axis, (kind, window) in zip(axes[0], MASKS, strict=True):
            shape = (1, 1, DRAWS, grid * grid)
            drawn = regularizers.draw(kind, shape, ratio, seed=0, grid=(grid, grid), window=window)[0, 0].float()
            own = drawn.mean(-1)
            one = (own - ratio).abs().argmin()  # a typical draw: with few seed points the ratio of one varies a lot
            axis.pcolormesh(
                drawn[one].view(grid, grid).numpy(), cmap=ListedColormap([KEPT, COLOURS[0]]), edgecolors="white"
            )
            axis.set(aspect="equal")
            axis.invert_yaxis()
            plain(axis)
            axis.set_title(kind if window is None else f"{kind}, window {window}")
            axis.set_xlabel(f"dropped here {own[one]:.3f}\nmean of {DRAWS:,} draws {own.mean():.3f}", fontsize=8)
        figure.suptitle(f"Keys dropped for one query (dark), ratio {ratio:g}, {grid} × {grid} keys", fontsize=10)


def schedule(ratio: float, layers: int, path: Path) -> None:
    """The drop ratio of each attention layer under every schedule (paper, figure 6)."""
    with canvas(path, 1, 1, (5.6, 3.2)) as (figure, ((axis,),)):
        for colour, marker, kind in zip(COLOURS, MARKERS, ("constant", "decreasing", "increasing"), strict=False):
            values = schedules.ratios(kind, ratio, 0.0, layers)
            told = f"{kind} (mean {sum(values) / layers:.3g})"
            axis.plot(range(1, layers + 1), values, "-", marker=marker, color=colour, markersize=4.5, label=told)
        axis.set(xlabel="attention layer", ylabel="drop ratio", ylim=(-0.04 * ratio, 1.12 * ratio))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
