"""What a trained run with queries finds in test images, and where its queries look (paper, figure 13)."""

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from dropkey.analysis.answers import Answer
from dropkey.analysis.capture import LayerAttention, attention_weights
from dropkey.analysis.maps import AttentionMaps, select_heads
from dropkey.analysis.trained import Trained
from dropkey.errors import ConfigError
from dropkey.patching.patch import blocks_of
from dropkey.tasks.marks import ENOUGH, Mark, overlap

LEAST = 0.5  # score of a box that is drawn
OBJECTS = 2  # of an image at most, whose maps are drawn


@dataclass
class Found:
    """What one run finds in one image: its answers, the surest first, then the truth."""

    position: int  # in the test split
    marks: list[Mark]

    @property
    def answers(self) -> list[Mark]:
        return [mark for mark in self.marks if mark.score is not None]

    @property
    def truths(self) -> list[Mark]:
        return [mark for mark in self.marks if mark.score is None]

    @property
    def false(self) -> list[Mark]:
        return [mark for mark in self.answers if mark.right is False]

    @property
    def missed(self) -> list[Mark]:
        return [mark for mark in self.truths if not mark.right]

    def __str__(self) -> str:
        counts = (f"{len(self.false)} false", self.false), (f"{len(self.missed)} missed", self.missed)
        wrong = [text for text, marks in counts if marks]
        return f"✗ {', '.join(wrong)}" if wrong else f"✓ {len(self.truths)} of {len(self.truths)}"


def mistaken(found: Found) -> tuple:
    """By which the worst come first: the surest false box, then how many objects were missed."""
    return -max((mark.score for mark in found.false), default=0.0), -len(found.missed)


def mistaken_for(found: Found) -> list[Answer]:
    """The false boxes that lie on an object of another label."""
    return [
        Answer(found.position, true.label, mark.label, False, mark.score)
        for mark in found.false
        for true in found.truths
        if true.label != mark.label and overlap(mark, true) >= ENOUGH
    ]


@torch.no_grad()
def found(trained: Trained, ids: Tensor, threshold: float = LEAST) -> list[Found]:
    """For each test image at those positions."""
    info, rows = trained.task.model_info(trained.dataset, trained.model), []
    for batch in trained.batches(ids):
        rows += trained.task.marks(trained.task.predict(trained.model, batch), batch, info, threshold)
    return [Found(position, marks) for position, marks in zip(ids.tolist(), rows, strict=True)]


def objects(looked: list[Found]) -> list[tuple[Found, Mark]]:
    """The largest true objects of each image; what is said of the same boxes, as all verbs of a pair, is one label.

    Raises:
        ConfigError: there are none.
    """
    chosen = [(one, true) for one in looked for true in sorted(distinct(one.truths), key=area, reverse=True)[:OBJECTS]]
    if not chosen:
        raise ConfigError(f"images={','.join(str(one.position) for one in looked)} show no object; choose others")
    return chosen


def distinct(truths: list[Mark]) -> list[Mark]:
    found: dict[tuple, Mark] = {}
    for true in truths:
        first = found.setdefault(key := tuple(true.boxes.flatten().tolist()), true)
        found[key] = true if first is true else replace(first, label=f"{first.label}, {true.label}")
    return list(found.values())


def area(mark: Mark) -> float:
    width, height = (mark.boxes[:, 2:] - mark.boxes[:, :2]).unbind(-1)
    return (width * height).max().item()


def asked(answers: list[Mark], true: Mark) -> Mark:
    """The query that is surest of that object, by score and overlap; of those that overlap nothing the surest."""
    return max(answers, key=lambda mark: (mark.score * overlap(mark, true), mark.score))


def answer_to(one: Found, mark: Mark, true: Mark) -> Answer:
    """As of a classifier, for what is written below a map."""
    there = overlap(mark, true) >= ENOUGH
    predicted = f"{mark.label} {100 * mark.score:.0f} %" if there else "no box"
    labels = [other.label for other in one.truths if torch.equal(other.boxes, true.boxes)]
    return Answer(one.position, true.label, predicted, there and mark.label in labels, mark.score)


# ------------------------------------------------------------------------------------------------------------- maps


def look_at(
    trained: Trained, ids: Tensor, chosen: list[tuple[Found, Mark]], head: str, layer: Optional[int]
) -> tuple[AttentionMaps, list[Answer], list[list[Mark]]]:
    """For each of those `objects` of the images at `ids`: the map of the query that is surest of it, what this query
    says, and its box before the true one."""
    looked = {one.position: one for one in found(trained, ids, 0.0)}
    rows = [(looked[one.position], true) for one, true in chosen]
    marks = [asked(one.answers, true) for one, true in rows]
    said = [answer_to(one, mark, true) for (one, true), mark in zip(rows, marks, strict=True)]
    queries = [(one.position, mark.query) for (one, _), mark in zip(rows, marks, strict=True)]
    drawn = [[replace(mark, right=s.right), true] for mark, s, (_, true) in zip(marks, said, rows, strict=True)]
    return query_maps(trained, queries, head, layer), said, drawn


def query_maps(
    trained: Trained, chosen: list[tuple[int, int]], head: str = "mean", layer: Optional[int] = None
) -> AttentionMaps:
    """What queries attend to in the encoder's tokens.

    Args:
        chosen: of each map the position of a test image and the number of a query.
        layer: of cross-attention, among all attention layers in forward order; None: the last.
    """
    values = []
    for position, query in chosen:
        layers, grid = attention_of(trained, position)
        number = choose(layers, [one.kind == "cross" for one in layers], layer, "the queries of the decoder")
        heads, names = select_heads(layers[number].weights[0, None, :, query], head)
        values.append(heads[0].unflatten(-1, grid))
    where = f"attention layer {number + 1} of {len(layers)}, {layers[number].name}"
    return AttentionMaps(values, names, f"{where}; the query of the box", number)


def point_maps(
    trained: Trained, ids: list[int], point: tuple[float, float], head: str = "mean", layer: Optional[int] = None
) -> tuple[AttentionMaps, list[tuple[float, float]]]:
    """What the encoder's token at a point attends to, of each image; and the point in shares of each image.

    Args:
        point: x and y in pixels of the image.
        layer: of the encoder, among all attention layers in forward order; None: its last.
    Raises:
        ConfigError: outside of an image; no such layer or head.
    """
    values, places = [], []
    for position in ids:
        (batch,) = trained.batches(torch.tensor([position]))
        width, height = (batch.records[0][side] for side in ("width", "height"))
        if not (0 <= point[0] < width and 0 <= point[1] < height):
            size = f"test image {position}, which has {width} x {height} pixels"
            raise ConfigError(f"point={point[0]:g},{point[1]:g} is outside of {size}")
        layers, grid = attention_of(trained, position)
        x, y = point[0] / width, point[1] / height
        number = choose(layers, in_encoder(layers), layer, "a point of the image (point=x,y)")
        token = int(y * grid[0]) * grid[1] + int(x * grid[1])
        heads, names = select_heads(layers[number].weights[0, None, :, token], head)
        values.append(heads[0].unflatten(-1, grid))
        places.append((x, y))
    where = f"attention layer {number + 1} of {len(layers)}, {layers[number].name}"
    return AttentionMaps(values, names, f"{where}; from the point x = {point[0]:g}, y = {point[1]:g}", number), places


@torch.no_grad()
def attention_of(trained: Trained, position: int) -> tuple[list[LayerAttention], tuple[int, int]]:
    """All layers, of a test image alone, so that nothing is padded; and height and width of its tokens."""
    (batch,) = trained.batches(torch.tensor([position]))
    return attention_weights(trained.model, batch.images), trained.task.grid(trained.model, batch)


def in_encoder(layers: list[LayerAttention]) -> list[bool]:
    """Self-attention in another stack than cross-attention."""
    stacks = [stack for stack, _ in blocks_of([(layer.name, layer.kind) for layer in layers], "stack")]
    decoder = {stack for stack, layer in zip(stacks, layers, strict=True) if layer.kind == "cross"}
    return [layer.kind == "self" and stack not in decoder for stack, layer in zip(stacks, layers, strict=True)]


def choose(layers: list[LayerAttention], fits: list[bool], wanted: Optional[int], asker: str) -> int:
    """The number of that layer, or of the last that fits."""
    numbers = [number for number, fit in enumerate(fits) if fit]
    if wanted is None:
        return numbers[-1]
    if -len(layers) <= wanted < len(layers) and fits[wanted]:
        return wanted % len(layers)
    fitting = ", ".join(map(str, numbers))
    raise ConfigError(f"layer={wanted}: from {asker}, the layers that look at the image are {fitting}")
