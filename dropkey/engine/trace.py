"""trainer.profile: what a few steps do, and when."""

import contextlib
from pathlib import Path
from typing import Callable, Iterator, Optional

import torch


@contextlib.contextmanager
def traced(wanted: bool, target: Path, info: Callable[[str], None]) -> Iterator[Optional[torch.profiler.profile]]:
    """A profiler whose `step` follows each optimizer step and which writes steps 5 to 10 to `target`; None unless
    `wanted`."""
    if not wanted:
        yield None
        return
    ready = torch.profiler.schedule(wait=3, warmup=1, active=6, repeat=1)
    with torch.profiler.profile(schedule=ready, on_trace_ready=lambda p: p.export_chrome_trace(str(target))) as profile:
        yield profile
    info(f"trace of 6 steps: {target} (open in https://ui.perfetto.dev)")
