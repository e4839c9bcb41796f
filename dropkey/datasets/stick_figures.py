"""A procedural stick figure of capsules in random poses, rendered small and grey, with its mesh.

It is about a metre tall by definition, so that its errors read as millimetres, and stands for no living body. Ten bones
have capsules of 22 vertices each; linear blend skinning moves them with weights that fall with the distance to a bone.
Joints are fixed averages of vertices. The right limbs are darker than the left, what is further away is darker.

Coordinates: x to the right, y downwards, z away from the viewer.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey.config.schema import DataConfig
from dropkey.data.images import Pixels
from dropkey.mesh.measures import project
from dropkey.mesh.samples import Body, Meshes, Split
from dropkey.seeds import derive_seed

TRAIN, HELD_OUT = 4_000, 300  # figures for training, and for validation and test each
TEST_SEED = 0  # not the run's: runs with different seeds are compared on the same images
RINGS, AROUND = (0.08, 0.36, 0.64, 0.92), 5  # of a capsule: places along the bone, vertices in each; and two ends
CHUNK = 25  # figures that are rendered at once: what fits a processor's cache

# The points of the skeleton at rest. Bones: where one begins (it turns about that point), where it ends, which bone
# carries it, half its width and depth, and its brightness.
SIDE = [
    (0.07, 0.02, 0.0),
    (0.08, 0.24, 0.0),
    (0.09, 0.47, 0.0),
    (0.12, -0.27, 0.0),
    (0.26, -0.27, 0.0),
    (0.4, -0.27, 0.0),
]
POINTS = [(0.0, 0.0, 0.0), (0.0, -0.31, 0.0), (0.0, -0.47, 0.0), *SIDE, *((-x, y, z) for x, y, z in SIDE)]
BONES = [(0, 1, -1, 0.1, 0.06, 0.85), (1, 2, 0, 0.06, 0.06, 1.0)]
for first, light in ((3, 1.0), (9, 0.6)):
    BONES += [(first, first + 1, 0, 0.045, 0.045, light), (first + 1, first + 2, len(BONES), 0.035, 0.035, light)]
    BONES += [(first + 3, first + 4, 0, 0.035, 0.035, light), (first + 4, first + 5, len(BONES), 0.028, 0.028, light)]
HIPS = (3, 9)
# Of each bone: mean and deviation of its turn about x, y and z, in radians. Deviations are of a uniform distribution.
TURNS = [((0, 0, 0), (0.25, 0.6, 0.2)), ((0, 0, 0), (0.25, 0.3, 0.2))]
for sign in (1, -1):
    TURNS += [((-0.2, 0, 0), (0.45, 0.1, 0.15)), ((0.6, 0, 0), (0.35, 0, 0))]
    TURNS += [((0, 0.2 * sign, 0.5 * sign), (0.1, 0.4, 0.5)), ((0, 0.8 * sign, 0), (0, 0.45, 0))]
LIGHT = (-0.45, -0.6, -0.66)  # where it comes from


def read(data: DataConfig, seed: int) -> Meshes:
    """`seed` draws the figures for training and validation; data.max_train_samples is the number for training."""
    figure = body()

    def split(name: str, count: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(derive_seed("stick figures", name, seed))
        parts = [draw(figure, min(CHUNK, count - at), data.image_size, generator) for at in range(0, count, CHUNK)]
        images, vertices, points = (torch.cat(part) for part in zip(*parts, strict=True))
        pixels = images[:, None].expand(-1, data.channels, -1, -1).numpy()
        return Split(Pixels(np.ascontiguousarray(pixels)), torch.arange(count), vertices, points)

    return Meshes(
        figure,
        split("train", data.max_train_samples or TRAIN, seed),
        split("val", HELD_OUT, seed) if data.val_fraction > 0 else None,
        split("test", HELD_OUT, TEST_SEED),
    )


def body() -> Body:
    points = torch.tensor(POINTS)
    parts = [capsule(points[begin], points[end], width, depth) for begin, end, _, width, depth, _ in BONES]
    vertices = torch.cat([part for part, _ in parts])
    faces = torch.cat([corners + number * len(part) for number, (part, corners) in enumerate(parts)])
    near = torch.cdist(points, vertices).div(0.05).square().neg().softmax(-1)  # point 0 is the root
    middle, coarse = (torch.arange(0, len(vertices), step) for step in (3, 8))
    return Body(vertices, near, torch.tensor(HIPS) - 1, middle, coarse, faces)


def capsule(begin: Tensor, end: Tensor, width: float, depth: float) -> tuple[Tensor, Tensor]:
    """Vertices n 3 and faces m 3, whose corners run clockwise seen from outside (z points away)."""
    along = (end - begin) / (end - begin).norm()
    across = torch.tensor([0.0, 1.0, 0.0]) if along[0].abs() > 0.5 else torch.tensor([1.0, 0.0, 0.0])
    angles = torch.arange(AROUND)[:, None] * (2 * torch.pi / AROUND)
    circle = angles.cos() * across * width + angles.sin() * torch.tensor([0.0, 0.0, depth])
    tips = torch.stack([begin - 0.3 * width * along, end + 0.3 * width * along])
    vertices = torch.cat([begin + (end - begin) * place + circle for place in RINGS] + [tips])
    faces = []
    for ring in range(len(RINGS)):
        for i in range(AROUND):
            one, two = (ring * AROUND + (i + step) % AROUND for step in (0, 1))
            if ring + 1 < len(RINGS):
                faces += [(one, two, one + AROUND), (two, two + AROUND, one + AROUND)]
            if ring in (0, len(RINGS) - 1):
                faces.append((one, two, len(RINGS) * AROUND + (ring > 0)))
    faces = torch.tensor(faces)
    corners = vertices[faces]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    inward = (normals * (corners.mean(1) - (begin + end) / 2)).sum(-1) < 0
    faces[inward] = faces[inward].flip(-1)
    return vertices, faces


def skinning(vertices: Tensor) -> Tensor:
    """V bones: how much each moves with each bone. The distance counts in half widths of the bone."""
    points, weights = torch.tensor(POINTS), []
    for begin, end, _, width, depth, _ in BONES:
        a, b = points[begin], points[end]
        place = ((vertices - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
        away = (vertices - a - place[:, None] * (b - a)).norm(dim=-1)
        weights.append(-2 * (2 * away / (width + depth)).square())
    return torch.stack(weights, -1).softmax(-1)


def pose(vertices: Tensor, turns: Tensor) -> Tensor:
    """B V 3 of V 3 at rest and of each bone's turn about its beginning, B bones 3: axis times radians."""
    points, zero = torch.tensor(POINTS), torch.zeros_like(turns[..., 0])
    x, y, z = turns.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    rotations, moved = [], []  # of each bone: B 3 3 and, of its beginning, B 3
    for number, turn in enumerate(skew.matrix_exp().unbind(1)):
        begin, _, carrier = BONES[number][:3]
        if carrier < 0:
            rotations, moved = [turn], [points[begin].expand(len(turns), 3)]
            continue
        arm = points[begin] - points[BONES[carrier][0]]
        moved.append(moved[carrier] + rotations[carrier] @ arm)
        rotations.append(rotations[carrier] @ turn)
    weights = skinning(vertices)
    found = 0
    for number, (rotation, place) in enumerate(zip(rotations, moved, strict=True)):
        posed = (vertices - points[BONES[number][0]]) @ rotation.transpose(1, 2) + place[:, None]
        found = found + weights[:, number, None] * posed
    return found


def draw(figure: Body, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 B H W, meshes B V 3 and projected joints B J 3 (x, y in [-1, 1], and confidence 1)."""
    mean, deviation = (torch.tensor(part, dtype=torch.float32) for part in zip(*TURNS, strict=True))
    spread = torch.rand(count, len(BONES), 3, generator=generator) * 2 - 1
    vertices = pose(figure.template, mean + deviation * 3**0.5 * spread)
    camera = torch.rand(count, 3, generator=generator) * torch.tensor([0.4, 0.2, 0.2]) + torch.tensor([1.3, -0.1, -0.1])
    images = render(vertices, figure.faces, camera, side)
    joints = figure.joints(vertices)
    flat = project(joints, camera)
    return images, vertices, torch.cat([flat, torch.ones_like(flat[..., :1])], -1)


def render(vertices: Tensor, faces: Tensor, camera: Tensor, side: int) -> Tensor:
    """uint8 B H W: points spread over the triangles that face the viewer; in each pixel the nearest is seen. Lambert's
    law with a light beside the viewer, darker with distance."""
    count, rows = len(vertices), max(side // 9, 1)
    spread = torch.tensor([(i, j, rows - i - j) for i in range(rows + 1) for j in range(rows + 1 - i)]) / rows
    corners = vertices[:, faces]  # B F 3 3
    normals = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    sample, face = (normals[..., 2] < 0).nonzero(as_tuple=True)
    slope = F.normalize(normals[sample, face], dim=-1) @ torch.tensor(LIGHT)
    own = torch.tensor([each[-1] for each in BONES])[face // (len(faces) // len(BONES))]
    shade = own * (0.35 + 0.65 * slope.clamp_min(0))  # of each face
    flat = (project(vertices, camera) + 1) * (side / 2)
    placed = torch.cat([flat, vertices[..., 2:]], -1)[sample[:, None], faces[face]]  # faces 3 3
    x, y, z = (spread @ placed).unbind(-1)  # of each point
    grey = (shade[:, None] * (0.75 - 0.5 * z).clamp(0.1, 1) * 255).round()
    packed = ((z + 2) * 8192).int() * 256 + grey.int()  # the nearest is the least; its grey is in the last 8 bits
    place = (sample[:, None] * side + y.long().clamp(0, side - 1)) * side + x.long().clamp(0, side - 1)
    image = torch.full((count * side * side,), 2**30, dtype=torch.int32)
    image.scatter_reduce_(0, place.flatten(), packed.flatten(), "amin")
    return (image % 256).to(torch.uint8).view(count, side, side)
