"""What the training loop asks of a task, and nothing else: see `Task`."""

from abc import ABC, abstractmethod
from typing import Any, Callable, Iterator, Optional, Protocol

import torch
from torch import Tensor, nn

from dropkey.config.schema import TrainConfig
from dropkey.metrics import Metric
from dropkey.tasks.marks import Mark


class Batch(Protocol):
    """A microbatch, on the device. Its `len` is its number of samples."""

    ids: Tensor  # int64, on the CPU: positions in the split, named when training diverges

    def __len__(self) -> int: ...


class EpochLoader(Protocol):
    """One process's part of every epoch; `len` is the number of optimizer steps per epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """`grad_accum_steps` microbatches for each optimizer step from step `start` on; a function of its arguments and
        of the run's seed, so that a resumed epoch continues exactly."""

    def close(self) -> None: ...


class Scores(Protocol):
    """Sums over one process's samples of a split."""

    def update(self, outputs: Any, batch: Batch) -> None: ...

    def compute(self, dist) -> dict[str, Optional[float]]:
        """The figures over all processes, the same in each: a value per metric (None, but for the first, where it has
        no meaning for these samples), and `samples`."""

    def correct(self, dist) -> Optional[Tensor]:
        """Boolean (samples,) over all processes: which samples of the split are right; None if that has no meaning."""


class Task(ABC):
    """What is learned, from which data, and how it is measured.

    `metrics` are the figures of an evaluation; the first is watched during training, and its direction decides which
    checkpoint is best. `dist` below is the process's `dropkey.engine.distributed.DistContext`.
    """

    metrics: tuple[Metric, ...]

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg

    # ------------------------------------------------------------------------------------------- data and model

    @abstractmethod
    def load_data(self) -> Any:
        """A data set with the splits `train`, `val` (or None) and `test`, and a `fingerprint()`."""

    @abstractmethod
    def describe_data(self, data: Any) -> str:
        """Sizes and kinds of samples, for the first lines of a run."""

    @abstractmethod
    def build_model(self, data: Any, *, pretrained: bool, fused: bool) -> nn.Module:
        """The model with its head for these data, not yet regularized; initialised from torch's generator."""

    @abstractmethod
    def train_loader(self, data: Any, dist) -> EpochLoader: ...

    @abstractmethod
    def eval_loader(self, data: Any, split: str, dist, batch_size: Optional[int] = None) -> Any:
        """Every sample of the split once over all processes; as many batches in each process, some perhaps empty."""

    @abstractmethod
    def example(self, data: Any, dist) -> Batch:
        """One sample as the model takes it, for a trial forward pass."""

    def planned_data(self) -> Any:
        """What `build_model` and `example` take in place of the data, as the config says, and `train_samples`, how many
        there are before a part is held out, None where only the data tell. None: it cannot be planned without data."""
        return None

    # ----------------------------------------------------------------------------------------------------- loss

    fixed_normalisers = False  # whether they are the same for all batches: the processes then add them up once

    @abstractmethod
    def normalisers(self, batch: Batch) -> dict[str, float]:
        """What each of the `losses` is divided by: summed over the microbatches and processes of an optimizer step
        before dividing (at least 1). Read from the batch alone, on the host: samples, boxes, ..."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the microbatch, under the keys of `normalisers`. Their normalised sum is minimised."""

    # ----------------------------------------------------------------------------------------------- evaluation

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """What `Scores.update` takes."""

    @abstractmethod
    def average(self, outputs: list[Any]) -> Any:
        """Several stochastic predictions of one batch as one (Monte Carlo)."""

    @abstractmethod
    def scores(self) -> Scores: ...

    # --------------------------------------------------------------------------------------- looking at samples

    @abstractmethod
    def samples(self, data: Any, split: str, ids: Tensor, dist) -> Iterator[Batch]:
        """The samples at those positions of a split, in this order, as the model takes them."""

    @abstractmethod
    def pictures(self, batch: Batch) -> Tensor:
        """The samples as people see them: float B C H W in [0, 1], on the CPU."""

    @abstractmethod
    def sample_names(self, data: Any, split: str, ids: Tensor) -> list[str]: ...

    @property
    def shows(self) -> str:
        """What its answers are to the eye: classes, boxes, or meshes."""
        return "boxes" if self.boxes_per_answer else "classes"

    boxes_per_answer = 0  # of a task whose queries find boxes: it has `marks` and `grid`

    def marks(self, outputs: Any, batch: Batch, info: dict, threshold: float) -> list[list[Mark]]:
        """Of what `predict` gave, for each sample: its answers of that score at least, the surest first, then the truth
        as far as the batch has it. `info`: `model_info`."""
        raise NotImplementedError

    def grid(self, model: nn.Module, batch: Batch) -> tuple[int, int]:
        """Height and width of the tokens that the encoder makes of the batch's images."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- the model in use (dropkey.load)

    def info_fault(self, info: dict) -> str:
        """What is wrong with what was read back of `model_info`; "" if nothing is."""
        return ""

    def model_info(self, data: Any, model: nn.Module) -> dict:
        """For model.json: what the model's use must know of its data, and `label_names`; {}: it cannot be used so."""
        return {}

    def data_facts(self, info: dict) -> Any:
        """What `build_model` takes in place of the data, made of `model_info`."""
        raise NotImplementedError

    def transform(self) -> Callable[[Any], Any]:
        """Makes of one sample from anywhere, such as an image file, what `collate` takes."""
        raise NotImplementedError

    at_a_time = 64  # samples of a batch in use

    def collate(self, samples: Any, device: torch.device) -> Batch:
        """A batch for `predict` of what `transform` made."""
        raise NotImplementedError

    def answers(self, outputs: Iterator[tuple[list[Any], Batch]], info: dict, threshold: Optional[float]) -> Any:
        """What a user gets: something with `top(k)`, which is for each sample a list of dicts with a `label` and a
        `score`, the surest first.

        Args:
            outputs: of each batch what `predict` gave, in one pass or in several (Monte Carlo).
            threshold: the least score, for tasks that draw boxes; None: their own.
        """
        raise NotImplementedError

    def exported(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        """What other programs run: a module of images B C H W, and the names of its outputs, B first."""
        return model, ["logits"]


def split_sizes(data: Any) -> str:
    """Of a data set's splits, for `describe_data`: "40 training, 10 validation, 10 test"."""
    named = (("training", data.train), ("validation", data.val), ("test", data.test))
    return ", ".join(f"{len(split):,} {name}" for name, split in named if split is not None)
