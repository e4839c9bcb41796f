"""Mesh recovery in use: images from anywhere, the meshes found in them, and what other programs run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, radians, sin
from typing import Optional

import torch
from torch import Tensor, nn

from dropkey.data.images import resize_center_crop, to_tensor
from dropkey.mesh.measures import project
from dropkey.tasks.preprocessing import Picture, opened


@dataclass(frozen=True)
class Crop:
    """The middle square of an image, resized, not yet normalised."""

    pixels: Tensor  # uint8 C H W
    size: tuple[int, int]  # width and height of the original


@dataclass(frozen=True)
class Crops:
    """An image from anywhere, as evaluation in training would see it: converted to grey or RGB, resized, cropped."""

    channels: int
    image_size: int

    def __call__(self, image: Picture) -> Crop:
        """Of a path or a PIL image. DataError names a file that cannot be read."""
        picture = opened(image, self.channels)
        return Crop(to_tensor(resize_center_crop(picture, self.image_size)), picture.size)


@dataclass
class FoundMeshes:
    """The meshes in B images, on the CPU; of one of them, without B: `found[0]`, or `for one in found`.

    Metres around the body's root: x to the right, y downwards, z away from the camera. With monte_carlo, means.
    """

    vertices: Tensor  # float32 B V 3
    joints: Tensor  # float32 B J 3
    camera: Tensor  # float32 B 3: scale, and what is added to x and y before; gives -1 to 1 in the middle square
    size: Tensor  # int64 B 2: width and height of the images
    faces: Tensor  # int64 F 3: the corners of triangles, the same for all; none where the data had none
    spread: Optional[Tensor] = None  # float32 B J: with monte_carlo, how far joints stray over the passes (deviation)

    def __len__(self) -> int:
        return len(self.vertices)

    def __getitem__(self, which: int) -> "FoundMeshes":
        spread = None if self.spread is None else self.spread[which]
        parts = (self.vertices, self.joints, self.camera, self.size)
        return FoundMeshes(*(part[which] for part in parts), self.faces, spread)

    @classmethod
    def joined(cls, found: Sequence["FoundMeshes"]) -> "FoundMeshes":
        """Of several batches."""
        parts = ("vertices", "joints", "camera", "size", *(["spread"] if found[0].spread is not None else []))
        return cls(**{part: torch.cat([getattr(one, part) for one in found]) for part in parts}, faces=found[0].faces)

    @property
    def points(self) -> Tensor:
        """The joints in pixels of the image, B J 2."""
        return self.flat(self.joints)

    def flat(self, points: Tensor) -> Tensor:
        """B N 3 as pixels of the image, B N 2, by the camera."""
        camera, size = torch.atleast_2d(self.camera), self.size[..., None, :]
        side = size.amin(-1, keepdim=True)  # of the middle square
        return (size + project(points.view(len(camera), -1, 3), camera).view(*points.shape[:-1], 2) * side) / 2

    def turned(self, degrees: float) -> "FoundMeshes":
        """About the vertical axis through the root, which comes to the middle of the image; by 90 what was to the right
        is nearest."""
        x, z = cos(radians(degrees)), sin(radians(degrees))
        turn = torch.tensor([[x, 0.0, z], [0.0, 1.0, 0.0], [-z, 0.0, x]]).T
        camera = self.camera * torch.tensor([1.0, 0.0, 1.0])
        return replace(self, vertices=self.vertices @ turn, joints=self.joints @ turn, camera=camera)

    def top(self, k: Optional[int] = None) -> list[list[dict]]:
        """For each image its first `k` joints, None: all: {"label": ..., "position": [x, y, z], "point": [x, y]}, the
        latter in pixels of the image; and with monte_carlo "spread"."""
        found = []
        for one in self:
            rows = zip(one.joints[:k].tolist(), one.points[:k].tolist(), strict=True)
            found.append([{"label": f"joint {n}", "position": at, "point": flat} for n, (at, flat) in enumerate(rows)])
            if one.spread is not None:
                found[-1] = [row | {"spread": far} for row, far in zip(found[-1], one.spread.tolist(), strict=False)]
        return found

    def obj(self) -> str:
        """One mesh as a Wavefront file: y upwards and z towards the viewer, as programs that open it have them."""
        vertices = (self.vertices * torch.tensor([1.0, -1.0, -1.0])).tolist()
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
        lines += [f"f {a} {b} {c}" for a, b, c in (self.faces + 1).tolist()]
        return "\n".join(lines) + "\n"


class FullMesh(nn.Module):
    """Vertices B V 3, joints B J 3 and camera B 3 of METRO."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, levels, camera = self.model(images)
        return levels[-1], self.model.body.joints(levels[-1]), camera
