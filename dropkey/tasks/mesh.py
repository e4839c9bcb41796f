"""Mesh recovery: the three-dimensional mesh of a body in an image, by METRO and its losses."""

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from dropkey import data as loaders
from dropkey import datasets
from dropkey.config.schema import AugmentConfig, TrainConfig
from dropkey.data.augment import denormalized
from dropkey.datasets import stick_figures
from dropkey.errors import ConfigError, DataError
from dropkey.mesh.measures import errors, mesh_losses
from dropkey.mesh.samples import Augment, Body, EvalLoader, MeshBatch, Meshes, TrainLoader
from dropkey.metrics import Metric
from dropkey.models import create_model
from dropkey.tasks.base import Task, split_sizes

SHOWN = 16  # images at a time


class MeshRecovery(Task):
    """
    Args:
        rotation, scale, colour: augmentation, see `dropkey.mesh.samples.Augment`.
    """

    metrics = tuple(
        Metric(key, label, "mm", digits=1, higher_is_better=False)
        for key, label in (("mpve", "MPVE"), ("mpjpe", "MPJPE"), ("pa_mpjpe", "PA-MPJPE"))
    )
    fixed_normalisers = True

    def __init__(self, cfg: TrainConfig, rotation: float = 0.0, scale: float = 0.0, colour: float = 0.0):
        super().__init__(cfg)
        chosen = asdict(cfg.augment)
        for key, value in asdict(AugmentConfig()).items():
            if chosen[key] != value:
                raise ConfigError(
                    f"augment.{key}={chosen[key]} is for classification; task=mesh has task.args: rotation, scale, "
                    "colour"
                )
        self.augment = Augment(rotation, scale, colour)
        self.body: Optional[Body] = None  # of the data

    def load_data(self) -> Meshes:
        cfg = self.cfg.data
        read = datasets.reader(cfg.name, datasets.MESHES, arguments=2)
        return read(cfg, self.cfg.seed if cfg.split_seed == "run" else cfg.split_seed)

    def describe_data(self, data: Meshes) -> str:
        joints, vertices = data.body.regressor.shape
        return f"{split_sizes(data)} images with meshes of {vertices:,} vertices and {joints - 1} joints"

    def build_model(self, data: Meshes, *, pretrained: bool, fused: bool) -> nn.Module:
        cfg, self.body = self.cfg, data.body
        shape = {"template": self.body.tokens(), "joints": len(self.body.regressor) - 1, "levels": self.body.levels}
        model = replace(cfg.model, args={**cfg.model.args, **shape, "img_size": cfg.data.image_size})
        sizes = {"image_size": cfg.data.image_size, "channels": cfg.data.channels, "num_classes": 0}
        if not cfg.model.name.startswith("metro"):
            raise ConfigError(
                f"model.name={cfg.model.name} finds no meshes; task=mesh takes metro_r50, metro_small ..."
            )
        return create_model(model, **sizes, pretrained=pretrained, fused=fused)

    def train_loader(self, data: Meshes, dist) -> TrainLoader | loaders.FirstBatch:
        trainer = self.cfg.trainer
        parts = {"batch_size": trainer.batch_size, "grad_accum_steps": trainer.grad_accum_steps}
        loader = TrainLoader(data.train, self.cfg.data, self.augment, **parts, seed=self.cfg.seed, dist=dist)
        return loaders.FirstBatch(loader, trainer.grad_accum_steps) if trainer.overfit else loader

    def eval_loader(self, data: Meshes, split: str, dist, batch_size=None) -> EvalLoader:
        if getattr(data, split) is None:
            raise DataError(f"there is no {split} split: data.val_fraction=0 holds nothing out; raise it")
        size = batch_size or self.cfg.trainer.eval_batch_size
        return EvalLoader(getattr(data, split), self.cfg.data, size, dist)

    def example(self, data: Meshes, dist) -> MeshBatch:
        cfg, (joints, vertices) = self.cfg.data, data.body.regressor.shape
        shapes = (cfg.channels, cfg.image_size, cfg.image_size), (vertices, 3), (joints - 1, 3)
        return MeshBatch(*(torch.zeros(1, *one, device=dist.device) for one in shapes), torch.zeros(1).long())

    def planned_data(self) -> Optional[SimpleNamespace]:
        if self.cfg.data.name != "stick_figures":  # only the files know how many vertices there are
            return None
        return SimpleNamespace(body=stick_figures.body(), train_samples=None)

    def normalisers(self, batch: MeshBatch) -> dict[str, float]:
        return dict.fromkeys(("joints", "vertices", "projection"), len(batch))

    def losses(self, model: nn.Module, batch: MeshBatch) -> dict[str, Tensor]:
        joints, levels, camera = model(batch.images)
        levels = [level.float() for level in levels]
        with torch.autocast(batch.images.device.type, enabled=False):
            body = self.body.to(batch.images.device)
            return mesh_losses(joints.float(), levels, camera.float(), batch, body)

    def predict(self, model: nn.Module, batch: MeshBatch) -> tuple[Tensor, Tensor]:
        """The full mesh B V 3 and the camera B 3."""
        _, levels, camera = model(batch.images)
        return levels[-1].float(), camera.float()

    def average(self, outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Vertex by vertex."""
        return tuple(torch.stack(each).mean(0) for each in zip(*outputs, strict=True))

    def scores(self) -> "MeshScores":
        return MeshScores(self.body)

    def samples(self, data: Meshes, split: str, ids: Tensor, dist) -> Iterator[MeshBatch]:
        yield from EvalLoader(getattr(data, split).subset(ids), self.cfg.data, SHOWN, dist)

    def pictures(self, batch: MeshBatch) -> Tensor:
        return denormalized(batch.images.cpu(), self.cfg.data)

    def sample_names(self, data: Meshes, split: str, ids: Tensor) -> list[str]:
        return [f"{split} {number}" for number in ids.tolist()]


class MeshScores:
    """Means over samples of their errors in millimetres, where data are in metres."""

    def __init__(self, body: Body):
        self.body = body
        self.totals = torch.zeros(4, dtype=torch.float64)  # of the three errors, and samples

    def update(self, outputs: tuple[Tensor, Tensor], batch: MeshBatch) -> None:
        found, true = (one.double().cpu() for one in (outputs[0], batch.vertices))
        self.totals[:3] += 1000 * errors(found, true, self.body.exact()).sum(0)
        self.totals[3] += len(batch)

    def compute(self, dist) -> dict[str, float]:
        *sums, count = dist.sum(self.totals).tolist()
        keys = (metric.key for metric in MeshRecovery.metrics)
        return dict(zip(keys, (total / count for total in sums), strict=True)) | {"samples": int(count)}

    def correct(self, dist) -> None:
        return None
