"""Mesh recovery: the three-dimensional mesh of a body in an image, by METRO and its losses."""

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor, nn

from dropkey import data as loaders
from dropkey import datasets, shapes
from dropkey.config.schema import AugmentConfig, TrainConfig
from dropkey.data.augment import Normalize, denormalized, per_channel
from dropkey.datasets import stick_figures
from dropkey.errors import ConfigError, DataError
from dropkey.mesh.measures import camera_of, errors, mesh_losses
from dropkey.mesh.samples import Augment, Body, EvalLoader, MeshBatch, Meshes, TrainLoader
from dropkey.metrics import Metric
from dropkey.models import constructor_arguments, create_model
from dropkey.tasks.base import Task, split_sizes
from dropkey.tasks.meshes import Crop, Crops, FoundMeshes, FullMesh
from dropkey.tasks.preprocessing import info_fault

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
        cfg = self.cfg
        model = replace(cfg.model, args={**cfg.model.args, **sizes_of(data.body), "img_size": cfg.data.image_size})
        sizes = {"image_size": cfg.data.image_size, "channels": cfg.data.channels, "num_classes": 0}
        if not cfg.model.name.startswith("metro"):
            raise ConfigError(
                f"model.name={cfg.model.name} finds no meshes; task=mesh takes metro_r50, metro_small ..."
            )
        made = create_model(model, **sizes, pretrained=pretrained, fused=fused)
        made.set_body(data.body)
        self.body = made.body  # with the values of a checkpoint that is loaded into the model
        return made

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
        """The full mesh B V 3, around its root, and the camera B 3."""
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

    shows = "meshes"

    def meshes(self, outputs: tuple[Tensor, Tensor], batch: MeshBatch) -> FoundMeshes:
        """Of what `predict` gave."""
        vertices, camera = outputs
        size = torch.tensor(batch.images.shape[:1:-1]).expand(len(batch), 2) if batch.sizes is None else batch.sizes
        parts = (vertices, self.body.joints(vertices), camera, size, self.body.faces)
        return FoundMeshes(*(part.cpu() for part in parts))

    def truth(self, batch: MeshBatch, found: FoundMeshes) -> FoundMeshes:
        """Around the root, with the camera that fits the joints in the image best; where these are unknown, that of
        what was found."""
        vertices = batch.vertices - self.body.root(batch.vertices)
        camera = camera_of(self.body.joints(vertices), batch.points[..., :2], batch.points[..., 2:]).cpu()
        return self.meshes((vertices, torch.where(camera.isfinite(), camera, found.camera)), batch)

    def errors(self, outputs: tuple[Tensor, Tensor], batch: MeshBatch) -> Tensor:
        """B 3 in the units of `metrics`, on the CPU."""
        return millimetres(outputs, batch, self.body)

    def model_info(self, data: Meshes, model: nn.Module) -> dict:
        """The body itself is among the weights."""
        cfg, sizes = self.cfg.data, sizes_of(data.body)
        return {
            "architecture": self.cfg.model.name.split(".")[0],
            "num_classes": sizes["joints"],
            "label_names": [f"joint {number}" for number in range(sizes["joints"])],
            "model_args": {"in_chans": cfg.channels, **constructor_arguments(self.cfg.model, cfg.image_size)}
            | {"img_size": cfg.image_size, **sizes},
            "pretrained_cfg": {
                "input_size": [cfg.channels, cfg.image_size, cfg.image_size],
                "mean": per_channel(cfg.mean, cfg.channels),
                "std": per_channel(cfg.std, cfg.channels),
            },
        }

    def info_fault(self, info: dict) -> str:
        sizes = {"joints": int, "levels": [int], "faces": int}
        wrong = info_fault(info) or shapes.problem(info["model_args"], sizes)
        return wrong or ("" if len(info["model_args"]["levels"]) == 3 else "model_args.levels must be three numbers")

    def data_facts(self, info: dict) -> SimpleNamespace:
        sizes = (info["model_args"][key] for key in ("joints", "levels", "faces"))
        return SimpleNamespace(body=Body.blank(*sizes))

    def transform(self) -> Crops:
        return Crops(self.cfg.data.channels, self.cfg.data.image_size)

    def collate(self, samples: Sequence[Crop], device: torch.device) -> MeshBatch:
        pixels = torch.stack([sample.pixels for sample in samples]).to(device)
        unknown, sizes = torch.zeros(len(samples), 0, 3, device=device), torch.tensor([one.size for one in samples])
        images = Normalize(self.cfg.data, device)(pixels)
        return MeshBatch(images, unknown, unknown, torch.arange(len(samples)), sizes)

    def answers(self, outputs, info: dict, threshold: Optional[float] = None) -> FoundMeshes:
        if threshold is not None:
            raise ConfigError(f"threshold={threshold:g} is for runs that find boxes")
        found = []
        for passes, batch in outputs:
            each = [self.meshes(one, batch) for one in passes]
            found.append(each[0] if len(each) == 1 else self.meshes(self.average(passes), batch))
            if len(each) > 1:
                found[-1].spread = torch.stack([one.joints for one in each]).std(0).norm(dim=-1)
        return FoundMeshes.joined(found)

    def exported(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        return FullMesh(model), ["vertices", "joints", "camera"]


def sizes_of(body: Body) -> dict:
    return {"joints": len(body.regressor) - 1, "levels": list(body.levels), "faces": len(body.faces)}


def millimetres(outputs: tuple[Tensor, Tensor], batch: MeshBatch, body: Body) -> Tensor:
    """The three errors of each sample, B 3, where data are in metres."""
    found, true = (one.double().cpu() for one in (outputs[0], batch.vertices))
    return 1000 * errors(found, true, body.exact())


class MeshScores:
    """Means over samples of their errors in millimetres, where data are in metres."""

    def __init__(self, body: Body):
        self.body = body
        self.totals = torch.zeros(4, dtype=torch.float64)  # of the three errors, and samples

    def update(self, outputs: tuple[Tensor, Tensor], batch: MeshBatch) -> None:
        self.totals[:3] += millimetres(outputs, batch, self.body).sum(0)
        self.totals[3] += len(batch)

    def compute(self, dist) -> dict[str, float]:
        *sums, count = dist.sum(self.totals).tolist()
        keys = (metric.key for metric in MeshRecovery.metrics)
        return dict(zip(keys, (total / count for total in sums), strict=True)) | {"samples": int(count)}

    def correct(self, dist) -> None:
        return None
