"""Images with the mesh of a body in them, and their loaders.

Order and augmentation follow from (seed, epoch, place in the epoch), as in `dropkey.data.loaders`. Shape letters: B
samples, V vertices, J joints.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkey.config.schema import DataConfig
from dropkey.data import epoch_order, microbatch_begins, require_batch
from dropkey.data.augment import EvalPicture, Normalize
from dropkey.data.images import Files, Pixels, to_device
from dropkey.data.reading import Decoding, OnDevice, Request
from dropkey.seeds import derive_seed


class Body(nn.Module):
    """What all meshes of a data set share.

    Args:
        template: float32 V 3, the body at rest.
        regressor: float32 1 + J, V: the weights of the vertices in the root (pelvis), then in each joint.
        hips: int64 2, the joints between which joints are centred.
        middle, coarse: int64, the vertices that make the mesh at its two lower resolutions.
        faces: int64 F 3, the corners of triangles; for drawing only, perhaps none.
    """

    def __init__(self, template, regressor, hips, middle, coarse, faces: Sequence = ()):
        super().__init__()
        for name, value in (("template", template), ("regressor", regressor)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))
        for name, value in (("hips", hips), ("middle", middle), ("coarse", coarse), ("faces", faces)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.int64))
        self.faces = self.faces.view(-1, 3)  # also where there are none

    @classmethod
    def blank(cls, joints: int, levels: Sequence[int], faces: int) -> "Body":
        """Of those sizes, for the values of another one."""
        coarse, middle, full = levels
        template, regressor = torch.zeros(full, 3), torch.zeros(1 + joints, full)
        return cls(template, regressor, [0, 0], [0] * middle, [0] * coarse, torch.zeros(faces, 3))

    @property
    def levels(self) -> tuple[int, int, int]:
        """Vertices, from coarse to fine."""
        return len(self.coarse), len(self.middle), len(self.template)

    def joints(self, vertices: Tensor) -> Tensor:
        """B J 3 of B V 3."""
        return self.regressor[1:] @ vertices

    def root(self, vertices: Tensor) -> Tensor:
        """B 1 3 of B V 3."""
        return self.regressor[:1] @ vertices

    def between_hips(self, joints: Tensor) -> Tensor:
        """Joints B J 3, centred at the middle of their own hips."""
        return joints - joints[:, self.hips].mean(1, keepdim=True)

    def exact(self) -> "Body":
        """In float64, on the CPU."""
        parts = (value.cpu() for value in (self.template, self.regressor, self.hips, self.middle, self.coarse))
        return Body(*parts, self.faces.cpu()).double()

    def tokens(self) -> Tensor:
        """The template as METRO's tokens, J + coarse vertices, 3, around its root."""
        return torch.cat([self.regressor[1:] @ self.template, self.template[self.coarse]]) - self.root(self.template)


@dataclass
class Split:
    """n samples. A position in the split, 0 to n - 1, is a sample's id."""

    images: Files | Pixels
    rows: Tensor  # int64 (n,): which of the images
    vertices: Tensor  # float32 n V 3
    points: Tensor  # float32 n J 3: the joints in the image, x and y from -1 to 1, and the confidence in each

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: Tensor) -> "Split":
        return Split(self.images, self.rows[positions], self.vertices[positions], self.points[positions])


@dataclass
class Meshes:
    body: Body
    train: Split
    val: Optional[Split]
    test: Split

    def fingerprint(self) -> str:
        """Ten hexadecimal digits over the body and all samples."""
        digest = hashlib.sha256()
        for value in self.body.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(split.images.content())
                for value in (split.rows, split.vertices, split.points):
                    digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()[:10]


@dataclass
class MeshBatch:
    images: Tensor  # float32 B C H W on the device, normalised
    vertices: Tensor  # float32 B V 3 on the device
    points: Tensor  # float32 B J 3 on the device, as in `Split`
    ids: Tensor  # int64 (B,) on the CPU: positions in the split
    sizes: Optional[Tensor] = None  # B 2 on the CPU: width and height of images from anywhere, whose middle was cut out

    def __len__(self) -> int:
        return len(self.ids)


class Augment:
    """Rotation and scale of the image about its centre, and brightness of each channel; the mesh turns with the image.

    Args: as officially, rotation is the deviation in degrees (at most twice that; 6 of 10 images are not turned),
        scale the deviation and the most that is added to 1, colour the most that is added to a channel's factor 1.
    """

    def __init__(self, rotation: float = 0.0, scale: float = 0.0, colour: float = 0.0):
        self.rotation, self.scale, self.colour = rotation, scale, colour

    def draw(self, channels: int, seed: int) -> list[float]:
        """Angle in radians, scale, and the factor of each channel."""
        generator = torch.Generator().manual_seed(seed)
        turn, size = torch.randn(2, generator=generator).tolist()
        turned, *tints = torch.rand(1 + channels, generator=generator).tolist()
        angle = self.rotation * max(-2, min(2, turn)) * (turned > 0.6) * torch.pi / 180
        factors = (1 + self.colour * (2 * tint - 1) for tint in tints)
        return [angle, 1 + self.scale * max(-1, min(1, size)), *factors]

    def __call__(self, images: Tensor, vertices: Tensor, points: Tensor, seeds: list[int]) -> tuple[Tensor, ...]:
        """uint8 B C H W, B V 3, B J 3 -> float32 of the same shapes."""
        if not (self.rotation or self.scale or self.colour):
            return images, vertices, points
        drawn = torch.tensor([self.draw(images.shape[1], seed) for seed in seeds]).to(images.device)
        cos, sin, scale = drawn[:, 0].cos(), drawn[:, 0].sin(), drawn[:, 1, None, None]
        turn = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)  # of rows (x, y), y downwards: clockwise
        back = F.pad(turn / scale, (0, 1))  # columns: from a place in the new image to that in the old
        grid = F.affine_grid(back, images.shape, align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False)
        vertices = torch.cat([vertices[..., :2] @ turn, vertices[..., 2:]], -1)
        points = torch.cat([points[..., :2] @ turn * scale, points[..., 2:]], -1)
        return (images * drawn[:, 2:, None, None]).clamp(0, 255), vertices, points


class Reader:
    """Batches of a split, on the device."""

    def __init__(self, split: Split, data: DataConfig, device: torch.device):
        self.split, self.device, self.normalize = split, device, Normalize(data, device)
        self.empty = torch.empty(0, data.channels, data.image_size, data.image_size, device=device)
        in_memory = isinstance(split.images, Pixels)
        picture = EvalPicture(data.image_size)
        self.reader = (
            OnDevice(split.images, device) if in_memory else Decoding(split.images, picture, data.num_workers, device)
        )
        self.close = self.reader.close

    def read(self, shares: list[Tensor], augment=lambda share, *parts: parts) -> Iterator[MeshBatch]:
        images = self.reader.read(Request(self.split.rows[ids]) for ids in shares if len(ids))
        for number, ids in enumerate(shares):
            parts = [to_device(part[ids], self.device) for part in (self.split.vertices, self.split.points)]
            if len(ids):
                pictures, *parts = augment(number, next(images), *parts)
            yield MeshBatch(self.normalize(pictures) if len(ids) else self.empty, *parts, ids)


class TrainLoader:
    """One process's part of every epoch; `len` is the number of optimizer steps, the incomplete last one is dropped.

    Raises:
        DataError: fewer samples than one batch.
    """

    def __init__(self, split: Split, data: DataConfig, augment: Augment, *, batch_size, grad_accum_steps, seed, dist):
        require_batch(len(split), batch_size)
        self.reader, self.augment, self.seed = Reader(split, data, dist.device), augment, seed
        self.samples, self.batch_size, self.close = len(split), batch_size, self.reader.close
        self.parts, self.dist = grad_accum_steps, dist
        self.microbatch = batch_size // (grad_accum_steps * dist.world_size)

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[MeshBatch]:
        order = epoch_order(self.samples, self.seed, epoch)
        own = microbatch_begins(self.batch_size, self.parts, self.dist, range(start, len(self)))

        def augmented(number: int, *parts: Tensor) -> tuple[Tensor, ...]:
            places = range(own[number], own[number] + self.microbatch)
            return self.augment(*parts, [derive_seed(self.seed, "augment meshes", epoch, place) for place in places])

        yield from self.reader.read([order[begin : begin + self.microbatch] for begin in own], augmented)


class EvalLoader:
    """Every sample once over all processes, each batch shared out among them; `len` is the number of batches."""

    def __init__(self, split: Split, data: DataConfig, batch_size: int, dist):
        self.reader = Reader(split, data, dist.device)
        shares = torch.arange(len(split)).split(batch_size)
        self.shares, self.close = [one.tensor_split(dist.world_size)[dist.rank] for one in shares], self.reader.close

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[MeshBatch]:
        yield from self.reader.read(self.shares)
