"""Image classification: one class per image."""

import dataclasses
from types import SimpleNamespace
from typing import Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkey import data as loaders
from dropkey import datasets
from dropkey.config.geometry import grid_side
from dropkey.data.augment import denormalized, per_channel
from dropkey.errors import ConfigError
from dropkey.metrics import Metric
from dropkey.models import constructor_arguments, create_model
from dropkey.tasks.base import Task, split_sizes
from dropkey.tasks.preprocessing import ImageTransform, info_fault

SHOWN = 64  # images at a time: with 3,136 tokens (T2T) an image has 40 MB of attention weights in each layer
UNLABELLED = (  # their author's word (sail-sg/volo, issue 8)
    "labels of tokens are those of the image: VOLO-D1 ends at 83.8 % instead of the published 84.2 %, larger ones lose "
    "0 to 0.4 points; data.token_labels=<folder of a teacher's label maps> closes the gap"
)
BINS = 15  # of the calibration error (Guo et al., 2017)


class Classification(Task):
    """Cross-entropy of class ids, or of the soft targets that mixup, cutmix and label smoothing make."""

    metrics = (
        Metric("top1", "top-1", "%", proportion=True),
        Metric("top5", "top-5", "%", proportion=True),
        Metric("loss", "loss", digits=4, higher_is_better=False),
        Metric("ece", "calibration error", "%", higher_is_better=False),
    )
    fixed_normalisers = True  # the loader drops the last, incomplete batch

    def load_data(self) -> loaders.Dataset:
        return datasets.load(self.cfg.data, self.cfg.seed)

    def describe_data(self, data: loaders.Dataset) -> str:
        lines = [f"{split_sizes(data)} images of {data.num_classes} classes, {data.image_size} px"]
        if self.cfg.data.token_labels is not None:
            lines.append(f"labels of tokens from {self.cfg.data.token_labels}")
        elif self.mixes_tokens and self.cfg.data.name == "imagenet":
            lines.append(UNLABELLED)
        return "\n".join(lines)

    def build_model(self, data: loaders.Dataset, *, pretrained: bool, fused: bool) -> nn.Module:
        return create_model(
            self.cfg.model,
            image_size=data.image_size,
            channels=data.channels,
            num_classes=data.num_classes,
            pretrained=pretrained,
            fused=fused,
        )

    def train_loader(self, data: loaders.Dataset, dist) -> loaders.TrainLoader:
        cfg = self.cfg
        loader = loaders.train_loader(
            data,
            cfg.data,
            cfg.augment,
            batch_size=cfg.trainer.batch_size,
            grad_accum_steps=cfg.trainer.grad_accum_steps,
            seed=cfg.seed,
            rank=dist.rank,
            world_size=dist.world_size,
            device=dist.device,
            token_side=grid_side(cfg.model, cfg.data.image_size, ["self"]) if cfg.data.token_labels else None,
        )
        return loaders.FirstBatch(loader, cfg.trainer.grad_accum_steps) if cfg.trainer.overfit else loader

    def eval_loader(self, data: loaders.Dataset, split: str, dist, batch_size=None) -> loaders.EvalLoader:
        return loaders.eval_loader(
            data,
            split,
            self.cfg.data,
            batch_size=batch_size or self.cfg.trainer.eval_batch_size,
            rank=dist.rank,
            world_size=dist.world_size,
            device=dist.device,
        )

    def example(self, data: loaders.Dataset, dist) -> loaders.ImageBatch:
        images = torch.zeros(1, data.channels, data.image_size, data.image_size, device=dist.device)
        zero = torch.zeros(1, dtype=torch.int64)
        return loaders.ImageBatch(images, zero.to(dist.device), zero)

    def planned_data(self) -> SimpleNamespace:
        cfg = self.cfg.data
        return SimpleNamespace(
            image_size=cfg.image_size,
            channels=cfg.channels,
            num_classes=cfg.num_classes or 10,
            train_samples=datasets.TRAIN_SAMPLES.get(cfg.name),
        )

    def normalisers(self, batch: loaders.ImageBatch) -> dict[str, float]:
        return dict.fromkeys(
            ("cross_entropy", "token_cross_entropy") if self.mixes_tokens else ("cross_entropy",), len(batch)
        )

    @property
    def mixes_tokens(self) -> bool:
        return bool(self.cfg.model.args.get("use_mix_token"))

    def losses(self, model: nn.Module, batch: loaders.ImageBatch) -> dict[str, Tensor]:
        outputs = model(batch.images)
        if self.mixes_tokens:
            return mix_token_losses(*outputs, batch.targets)
        return {"cross_entropy": F.cross_entropy(outputs, batch.targets, reduction="sum")}

    def predict(self, model: nn.Module, batch: loaders.ImageBatch) -> Tensor:
        return model(batch.images)

    def average(self, outputs: list[Tensor]) -> Tensor:
        """The mean of the probabilities, as log-probabilities."""
        return torch.stack([logits.float().softmax(-1) for logits in outputs]).mean(0).log()

    def scores(self) -> "ClassificationScores":
        return ClassificationScores()

    def samples(self, data: loaders.Dataset, split: str, ids: Tensor, dist) -> Iterator[loaders.ImageBatch]:
        some = dataclasses.replace(data, **{split: getattr(data, split).subset(ids)})
        yield from self.eval_loader(some, split, dist, SHOWN)

    def pictures(self, batch: loaders.ImageBatch) -> Tensor:
        return denormalized(batch.images.cpu(), self.cfg.data)

    def sample_names(self, data: loaders.Dataset, split: str, ids: Tensor) -> list[str]:
        """Class and position, on two lines."""
        targets = getattr(data, split).targets
        return [f"{data.classes[targets[number]]}\n{split} {number}" for number in ids.tolist()]

    def info_fault(self, info: dict) -> str:
        return info_fault(info)

    def model_info(self, data: loaders.Dataset, model: nn.Module) -> dict:
        """The classes, the architecture and the preprocessing, as config.json of timm has them."""
        cfg, size = self.cfg.data, data.image_size
        own = getattr(model, "pretrained_cfg", None) or {}
        return {
            "architecture": self.cfg.model.name.split(".")[0],
            "num_classes": data.num_classes,
            "label_names": list(data.classes),
            "model_args": {
                "num_classes": data.num_classes,
                "in_chans": data.channels,
                **constructor_arguments(self.cfg.model, size),
            },
            "pretrained_cfg": {
                "num_classes": data.num_classes,
                "input_size": [data.channels, size, size],
                "fixed_input_size": own.get("fixed_input_size", False),
                "interpolation": "bicubic",
                "crop_pct": cfg.crop_pct,
                "crop_mode": "center",
                "mean": per_channel(cfg.mean, data.channels),
                "std": per_channel(cfg.std, data.channels),
                "first_conv": own.get("first_conv"),
                "classifier": own.get("classifier"),
            },
        }

    def data_facts(self, info: dict) -> SimpleNamespace:
        channels, size, _ = info["pretrained_cfg"]["input_size"]
        return SimpleNamespace(image_size=size, channels=channels, num_classes=info["num_classes"])

    def transform(self) -> ImageTransform:
        return ImageTransform(self.cfg.data)

    def collate(self, samples: Sequence[Tensor], device: torch.device) -> loaders.ImageBatch:
        unknown = torch.zeros(len(samples), dtype=torch.int64)
        images = samples if isinstance(samples, Tensor) else torch.stack(list(samples))
        return loaders.ImageBatch(images.to(device), unknown.to(device), unknown)

    def answers(self, outputs, info: dict, threshold: Optional[float] = None) -> "Predictions":
        if threshold is not None:
            raise ConfigError(f"threshold={threshold:g} is for runs that find boxes")
        means, spreads = [], []
        for passes, _ in outputs:
            probabilities = torch.stack([logits.float().softmax(-1).cpu() for logits in passes])
            means.append(probabilities.mean(0))
            spreads += [probabilities.std(0)] if len(passes) > 1 else []
        return Predictions(torch.cat(means), torch.cat(spreads) if spreads else None, info["label_names"])


def mix_token_losses(logits: Tensor, token_logits: Tensor, own: float, targets: Tensor) -> dict[str, Tensor]:
    """Of what MixTokenVOLO makes in training: the image against its own and its partner's label, and half of each
    token's against the label of the image it is from, or its own (its mean over tokens). `targets`: class ids,
    B x classes, or B x (1 + tokens) x classes."""
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    of_image, of_tokens = (targets, targets[:, None]) if targets.dim() == 2 else (targets[:, 0], targets[:, 1:])
    mixed = own * of_image + (1 - own) * of_image.flip(0)
    of_tokens = of_tokens.expand(token_logits.shape)
    count = token_logits.shape[1]
    token_loss = F.cross_entropy(token_logits.flatten(0, 1), of_tokens.flatten(0, 1), reduction="sum") / count
    return {
        "cross_entropy": F.cross_entropy(logits, mixed, reduction="sum"),
        "token_cross_entropy": 0.5 * token_loss,
    }


@dataclasses.dataclass
class Predictions:
    """Of B images."""

    probabilities: Tensor  # float32 (B, classes) on the CPU; with monte_carlo the mean of the passes
    spread: Optional[Tensor]  # the same shape: standard deviation over the passes; None without monte_carlo
    classes: list[str]

    def top(self, k: int = 5) -> list[list[dict]]:
        """For each image its `k` most probable classes, the first first: {"label": ..., "score": ...}, and with
        monte_carlo "spread"."""
        scores, ids = self.probabilities.topk(min(k, len(self.classes)))
        found = []
        for row, (values, positions) in enumerate(zip(scores.tolist(), ids.tolist(), strict=True)):
            found.append([{"label": self.classes[i], "score": p} for i, p in zip(positions, values, strict=True)])
            if self.spread is not None:
                for choice, position in zip(found[-1], positions, strict=True):
                    choice["spread"] = self.spread[row, position].item()
        return found


class ClassificationScores:
    """Top-1 and top-5, cross-entropy and expected calibration error."""

    def __init__(self):
        self.totals = torch.zeros(4, dtype=torch.float64)  # correct, correct among five, summed loss, images
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, correct, summed confidence
        self.hits: list[tuple[Tensor, Tensor]] = []  # ids, whether correct

    def update(self, outputs: Tensor, batch: loaders.ImageBatch) -> None:
        """`outputs`: logits or log-probabilities, B x classes."""
        logits, targets = outputs.float().cpu(), batch.targets.cpu()  # float64 sums, which not every device has
        hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
        self.hits.append((batch.ids, hits[:, 0]))
        correct, loss = hits[:, 0], F.cross_entropy(logits, targets, reduction="none")
        self.totals += torch.tensor([correct.sum(), hits.any(-1).sum(), loss.double().sum(), len(targets)])
        confidence = logits.softmax(-1).amax(-1)
        which = (confidence.nan_to_num() * BINS).long().clamp_(max=BINS - 1)
        values = torch.stack([torch.ones_like(confidence), correct.float(), confidence]).double()
        self.bins.index_add_(1, which, values)

    def compute(self, dist) -> dict[str, float]:
        """Percent, but for `loss` (nats)."""
        totals, bins = dist.sum(self.totals), dist.sum(self.bins)
        correct, among_five, loss, count = totals.tolist()
        gap = (bins[1] - bins[2]).abs().sum().item()
        return {
            "top1": 100 * correct / count,
            "top5": 100 * among_five / count,
            "loss": loss / count,
            "ece": 100 * gap / count,
            "samples": int(count),
        }

    def correct(self, dist) -> Tensor:
        count = int(dist.sum(torch.tensor(sum(len(ids) for ids, _ in self.hits))))
        right = torch.zeros(count, dtype=torch.uint8)
        for ids, hits in self.hits:
            right[ids] = hits.byte()
        return dist.sum(right).bool()
