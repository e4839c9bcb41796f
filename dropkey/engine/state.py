"""Everything that a training must remember: it resumes bitwise identically.

No random state is in it: every draw derives from (run seed, step, purpose), see `dropkey.seeds`.
"""

from dataclasses import asdict, dataclass, field
from typing import Optional

import torch
from timm.utils import ModelEmaV3
from torch import nn

from dropkey.errors import ConfigError


@dataclass
class Position:
    """Where a training stands."""

    epoch: int = 0  # epochs finished, evaluation included
    step: int = 0  # optimizer steps done in the epoch under way
    global_step: int = 0  # optimizer steps done in all
    best: Optional[float] = None  # value of the watched metric, of all evaluations so far
    best_epoch: int = 0
    last: Optional[float] = None  # value of the watched metric at the last evaluation
    loss_sum: float = 0.0  # of the epoch under way, this process's share
    samples: int = 0  # trained on, in all
    seconds: float = 0.0  # of training and evaluation, over all sessions
    training_seconds: float = 0.0  # of that, optimizer steps alone


@dataclass
class State:
    """The moving parts of a training and their position."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Optional[ModelEmaV3]
    position: Position = field(default_factory=Position)
    record: Optional[dict] = None  # the last one, should metrics.jsonl lose it

    @property
    def evaluated(self) -> nn.Module:
        """The weights that evaluation sees: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def weights(self) -> dict:
        """What evaluation and fine-tuning need."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def state_dict(self, loss_sums: list[float], shape: tuple[int, int]) -> dict:
        """Tensors and plain Python only. `loss_sums` of all processes; `shape` = (processes, microbatches of each)."""
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": asdict(self.position),
            "record": self.record,
            "loss_sums": loss_sums,
            "shape": list(shape),
        }

    def load_state_dict(self, state: dict, rank: int, shape: tuple[int, int]) -> Optional[str]:
        """Returns a notice if the job's shape has changed, else None.

        Raises:
            ConfigError: the state is of another model.
        """
        try:
            self.model.load_state_dict(state["model"])
            kernels = [group.get("fused") for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, fused in zip(self.optimizer.param_groups, kernels, strict=True):
                group["fused"] = fused  # this version's, whichever version saved
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"the checkpoint does not fit this model, perhaps another version of the program saved it: {reason}; "
                "go on with that version, or start over with overwrite=true"
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.position = Position(**state["position"])
        self.record = state.get("record")
        sums, before = state["loss_sums"], tuple(state["shape"])
        if before == shape:
            self.position.loss_sum = sums[rank]
            return None
        # each process holds its share of the sum, whose mean over processes is the loss
        self.position.loss_sum = sum(sums) * shape[0] / before[0] if rank == 0 else 0.0
        masks = "" if before[0] * before[1] == shape[0] * shape[1] else ", other masks (each microbatch draws its own)"
        return (
            f"resuming with {shape[0]} processes x {shape[1]} microbatches instead of {before[0]} x {before[1]}: same "
            f"global batch and data order{masks}"
        )
