"""Losses and errors of meshes. Shape letters: B samples, V vertices, J joints, N points."""

import torch
from torch import Tensor

from dropkey.mesh.samples import Body, MeshBatch

JOINTS, VERTICES, PROJECTION = 1000.0, 100.0, 100.0  # official weights of the losses
LEVELS = 0.33  # and of each of the three meshes


def project(points: Tensor, camera: Tensor) -> Tensor:
    """B N 2, x and y from -1 to 1 in the image, of B N 3: weak perspective with camera B 3, the scale and what is added
    to x and y before."""
    return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])


def camera_of(points: Tensor, flat: Tensor, confidence: Tensor) -> Tensor:
    """B 3, the camera that projects points B N 3 as close to B N 2 as possible (least squares, weighted by confidence
    B N 1); NaN where all is unknown."""
    centre, middle = (
        (confidence * one[..., :2]).sum(1, keepdim=True) / confidence.sum(1, keepdim=True) for one in (points, flat)
    )
    x, y = points[..., :2] - centre, flat - middle
    scale = (confidence * x * y).sum((1, 2)) / (confidence * x * x).sum((1, 2))
    return torch.cat([scale[:, None], middle[:, 0] / scale[:, None] - centre[:, 0]], dim=-1)


def mesh_losses(joints: Tensor, levels: list[Tensor], camera: Tensor, batch: MeshBatch, body: Body) -> dict:
    """Sums over the samples, of what `dropkey.models.metro.METRO` gives."""
    vertices = batch.vertices - body.root(batch.vertices)
    true = body.joints(vertices)
    centred, both = body.between_hips(true), (joints, body.joints(levels[-1]))
    meshes = (vertices[:, body.coarse], vertices[:, body.middle], vertices)
    flat, confidence = batch.points[..., :2], batch.points[..., 2:]
    return {
        "joints": JOINTS * sum(per_sample((body.between_hips(one) - centred).square()) for one in both),
        "vertices": VERTICES * LEVELS * sum(per_sample((a - b).abs()) for a, b in zip(levels, meshes, strict=True)),
        "projection": PROJECTION * sum(per_sample(confidence * (project(one, camera) - flat).square()) for one in both),
    }


def per_sample(values: Tensor) -> Tensor:
    """The sum over samples of their means."""
    return values.flatten(1).mean(1).sum()


def errors(found: Tensor, true: Tensor, body: Body) -> Tensor:
    """B 3 of meshes B V 3: the mean distance of vertices around each mesh's own root, of joints around the middle of
    their own hips, and of joints after the best similarity."""
    joints = body.joints(found), body.joints(true)
    hips = [body.between_hips(one) for one in joints]
    meshes = [one - body.root(one) for one in (found, true)]
    pairs = (meshes, hips, (aligned(*joints), joints[1]))
    return torch.stack([(a - b).norm(dim=-1).mean(-1) for a, b in pairs], dim=-1)


def aligned(points: Tensor, target: Tensor) -> Tensor:
    """B N 3: `points` moved, turned and scaled as close to `target` as possible (least squares), never mirrored."""
    centre, other = points.mean(1, keepdim=True), target.mean(1, keepdim=True)
    x, y = points - centre, target - other
    u, s, vt = torch.linalg.svd((x.transpose(1, 2) @ y).nan_to_num(0, 0, 0))  # else it refuses; `x` stays as it is
    signs = torch.ones_like(s)
    signs[:, 2] = torch.linalg.det(u @ vt).sign()
    rotation = (u * signs[:, None]) @ vt  # acts on rows
    spread = x.square().sum((1, 2)).clamp_min(torch.finfo(x.dtype).tiny)
    scale = (s * signs).sum(-1) / spread
    return scale[:, None, None] * (x @ rotation) + other
