"""A second, tiny task that proves the seam: regression of every point of a set, with sets of unequal size.

Lower is better, and the loss is normalised by the number of points, which differs from microbatch to microbatch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkey.data import epoch_order
from dropkey.metrics import Metric
from dropkey.seeds import derive_seed
from dropkey.tasks.base import Task

WIDTH = 16
OVERRIDES = ("task.name=regression_task:Regression", "data.name=regression_task:points", "trainer.eval_batch_size=5")
SIZES = {"train": 48, "val": 13, "test": 17}  # sets; 13 and 17 divide by no number of processes


@dataclass
class Sets:
    """One split: points N x L x 4, of which `present` says which are real, and a target for each: N x L."""

    points: Tensor
    present: Tensor
    targets: Tensor

    def take(self, ids: Tensor) -> "SetBatch":
        return SetBatch(self.points[ids], self.present[ids], self.targets[ids], ids)


@dataclass
class SetBatch(Sets):
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Splits:
    train: Sets
    val: Sets
    test: Sets

    def fingerprint(self) -> str:
        return "points"


def points(size: int, seed: int, longest: int = 7) -> Sets:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, longest, 4, generator=generator)
    count = torch.randint(1, longest + 1, (size, 1), generator=generator)
    present = torch.arange(longest) < count
    total = (features * present[..., None]).sum(1, keepdim=True)  # what attention must find out
    return Sets(features, present, features[..., 0] + total[..., 1] / count)


class SetModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        x = self.embed(features)
        for block in self.blocks:
            x = x + block(x, x, x, key_padding_mask=~present, need_weights=False)[0]
        return self.head(x).squeeze(-1)


class Loader:
    def __init__(self, split: Sets, cfg, dist):
        self.split, self.cfg, self.dist = split, cfg, dist

    def __len__(self) -> int:
        return len(self.split.points) // self.cfg.trainer.batch_size

    def epoch(self, epoch: int, start: int = 0):
        size, parts = self.cfg.trainer.batch_size, self.cfg.trainer.grad_accum_steps
        microbatch = size // (parts * self.dist.world_size)
        order = epoch_order(len(self.split.points), self.cfg.seed, epoch)
        for step in range(start, len(self)):
            for part in range(self.dist.rank * parts, (self.dist.rank + 1) * parts):
                yield self.split.take(order[step * size + part * microbatch :][:microbatch])

    def close(self) -> None:
        pass


class Regression(Task):
    metrics = (
        Metric("mae", "mean absolute error", digits=3, higher_is_better=False),
        Metric("loss", "squared error", digits=4, higher_is_better=False),
    )

    def load_data(self) -> Splits:
        return Splits(**{name: points(size, derive_seed(name)) for name, size in SIZES.items()})

    def describe_data(self, data: Splits) -> str:
        return f"{len(data.train.points)} sets of points"

    def build_model(self, data: Splits, *, pretrained: bool, fused: bool) -> nn.Module:
        return SetModel()

    def train_loader(self, data: Splits, dist) -> Loader:
        return Loader(data.train, self.cfg, dist)

    def eval_loader(self, data: Splits, split: str, dist, batch_size=None) -> list[SetBatch]:
        sets, size = getattr(data, split), batch_size or self.cfg.trainer.eval_batch_size
        shares = torch.arange(len(sets.points)).split(size)
        return [sets.take(share.tensor_split(dist.world_size)[dist.rank]) for share in shares]

    def example(self, data: Splits, dist) -> SetBatch:
        return data.train.take(torch.zeros(1, dtype=torch.int64))

    def normalisers(self, batch: SetBatch) -> dict[str, float]:
        return {"squared": int(batch.present.sum())}

    def losses(self, model: nn.Module, batch: SetBatch) -> dict[str, Tensor]:
        errors = (model(batch.points, batch.present) - batch.targets)[batch.present]
        return {"squared": errors.square().sum()}

    def predict(self, model: nn.Module, batch: SetBatch) -> Tensor:
        return model(batch.points, batch.present)

    def average(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs).mean(0)

    def scores(self) -> "PointScores":
        return PointScores()

    def samples(self, data: Splits, split: str, ids: Tensor, dist):
        yield getattr(data, split).take(ids)

    def pictures(self, batch: SetBatch) -> Tensor:
        """The coordinates as grey levels, a row per point."""
        return torch.sigmoid(batch.points)[:, None]

    def sample_names(self, data: Splits, split: str, ids: Tensor) -> list[str]:
        return [f"{split} {number}" for number in ids.tolist()]


class PointScores:
    def __init__(self):
        self.totals = torch.zeros(4, dtype=torch.float64)  # absolute and squared errors, points, sets

    def update(self, outputs: Tensor, batch: SetBatch) -> None:
        errors = (outputs - batch.targets)[batch.present].double()
        self.totals += torch.tensor(
            [float(errors.abs().sum()), float(errors.square().sum()), int(batch.present.sum()), len(batch)]
        )

    def compute(self, dist) -> dict[str, float]:
        absolute, squared, count, sets = dist.sum(self.totals).tolist()
        return {"mae": absolute / count, "loss": squared / count, "samples": int(sets)}

    def correct(self, dist) -> None:
        return None
