"""The meshes that a trained run finds in test images, and what its joints attend to (METRO, figures of attention)."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from dropkey.analysis.boxes import choose
from dropkey.analysis.capture import attention_weights
from dropkey.analysis.maps import AttentionMaps, select_heads
from dropkey.analysis.trained import Trained
from dropkey.errors import ConfigError
from dropkey.metrics import Metric
from dropkey.tasks.meshes import FoundMeshes


@dataclass
class Found:
    """What one run finds in one image."""

    position: int  # in the test split
    mesh: FoundMeshes  # of this image alone
    truth: FoundMeshes
    error: float  # the task's first metric, of this image
    metric: Metric

    def __str__(self) -> str:
        return self.metric.format(self.error)


@torch.no_grad()
def found(trained: Trained, ids: Tensor) -> list[Found]:
    """For each test image at those positions."""
    task, rows = trained.task, []
    for batch in trained.batches(ids):
        outputs = task.predict(trained.model, batch)
        meshes = task.meshes(outputs, batch)
        rows += zip(meshes, task.truth(batch, meshes), task.errors(outputs, batch)[:, 0].tolist(), strict=True)
    return [Found(position, *row, task.metrics[0]) for position, row in zip(ids.tolist(), rows, strict=True)]


def joints_of(trained: Trained, ids: Tensor, wanted: list[int]) -> list[tuple[int, int]]:
    """Position and joint of each map: those joints in each image; without any, one in each image.

    Raises:
        ConfigError: no such joint.
    """
    positions, joints = ids.tolist(), len(trained.task.body.regressor) - 1
    for joint in wanted:
        if not 0 <= joint < joints:
            raise ConfigError(f"joint={joint}: the body has {joints} joints, 0 to {joints - 1}")
    if not wanted:
        return [(position, n * joints // len(positions)) for n, position in enumerate(positions)]
    return [(position, joint) for position in positions for joint in wanted]


def look_at(
    trained: Trained, chosen: list[tuple[int, int]], head: str = "mean", layer: Optional[int] = None
) -> tuple[AttentionMaps, list[tuple[float, float]], list[FoundMeshes]]:
    """What joints attend to, on the full mesh; with the place of each joint, in shares of the image, and the mesh. A
    vertex has the weight of that vertex of the coarse mesh, whose vertices are the tokens, that is nearest at rest.

    Args:
        chosen: of each map the position of a test image and the number of a joint.
        layer: in forward order, from 0; None: the last.
    Returns:
        In `values` M V for each of them; what goes to other joints has no place there.
    """
    body, values = trained.task.body, []
    joints, nearest = len(body.regressor) - 1, torch.cdist(body.template, body.template[body.coarse]).argmin(1)
    seen = found(trained, torch.tensor([position for position, _ in chosen]))
    for position, joint in chosen:
        (batch,) = trained.batches(torch.tensor([position]))
        layers = attention_weights(trained.model, batch.images)
        number = choose(layers, [True] * len(layers), layer, "a joint")
        heads, names = select_heads(layers[number].weights[0, None, :, joint], head)
        values.append(heads[0][:, joints:][:, nearest].cpu())
    where = f"attention layer {number + 1} of {len(layers)}, {layers[number].name}"
    maps = AttentionMaps(values, names, f"{where}; from the joint in the ring to vertices", number)
    points = [one.mesh.points[joint] / one.mesh.size for one, (_, joint) in zip(seen, chosen, strict=True)]
    return maps, [tuple(point.tolist()) for point in points], [one.mesh for one in seen]
