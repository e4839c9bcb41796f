"""An optimizer step that the device may still be at."""

import json
import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from dropkey.engine.distributed import DistContext
from dropkey.errors import Diverged
from dropkey.records import RunDirectory


@dataclass
class Begun:
    """Its figures are on their way to the host, which goes on to the next step meanwhile."""

    step: int  # both counted from 1
    epoch: int
    lr: float
    ids: list[Tensor]  # of the samples, per microbatch
    figures: Tensor  # loss, gradient norm; on the host, but not before `arrived`
    arrived: Optional[torch.cuda.Event] = None

    @classmethod
    def at(cls, figures: Tensor, **place) -> "Begun":
        """Sends the figures to the host without waiting for them."""
        if not figures.is_cuda:
            return cls(figures=figures.cpu(), **place)
        sent = figures.to("cpu", non_blocking=True)  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(figures=sent, arrived=arrived, **place)

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm. Waits until the device has got that far."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.figures.tolist()
        return loss, norm

    def fault(self, loss: float, norm: float) -> dict:
        """What is kept of a step that cannot be used."""
        ids = [number for some in self.ids for number in some.tolist()]
        shown = {"loss": str(loss), "gradient_norm": str(norm), "sample_ids": ids}
        return {"epoch": self.epoch, "step": self.step, **shown}


def usable(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def diverged(fault: Optional[dict], run: RunDirectory, dist: DistContext) -> Diverged:
    """The error to raise, in every process, once one of them has a fault; saves the evidence of all."""
    path = run.path / "diverged.json"
    seen = dist.gather(fault)  # None: all was finite in that process
    first = min((one for one in seen if one), key=lambda one: one["step"])
    if dist.is_main:
        shares = [one and {key: one[key] for key in ("loss", "gradient_norm", "sample_ids")} for one in seen]
        evidence = {"epoch": first["epoch"], "step": first["step"], "processes": shares}
        path.write_text(json.dumps(evidence, indent=1))
    figures = f"loss {first['loss']}, gradient norm {first['gradient_norm']}"
    return Diverged(
        f"{figures} in epoch {first['epoch']}, step {first['step']}; the weights were not updated with it, "
        f"its samples are listed in {path}; a lower optim.lr, a longer optim.warmup_epochs or "
        "optim.clip_grad_norm=1 may help"
    )
