"""Where jobs run: shares of the CPU cores, GPUs, several runs on one GPU, or several GPUs for one run."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dropkey.config.check import require
from dropkey.config.compose import CONFIGS, INSTALLED
from dropkey.reproduction.jobs import Job

SCRIPTS: Optional[Path] = None if INSTALLED else CONFIGS.parent  # of train.py and eval.py
MOST = 10_000  # jobs at a time, far beyond what any machine or queue takes
CPU_JOBS = 4  # at most, because each takes a gigabyte


@dataclass(frozen=True)
class Slot:
    """Room for one job."""

    gpus: tuple[str, ...]  # empty: on the CPU
    threads: int

    def __str__(self) -> str:
        return f"gpu {','.join(self.gpus)}" if self.gpus else f"cpu x {self.threads}"

    def environment(self) -> dict[str, str]:
        """OMP_NUM_THREADS is this slot's share of the cores: OpenMP threads spin while they wait, and two trainings
        with all cores each take 6 to 30 times as long as one after the other."""
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
        return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})

    def command(self, job: Job) -> list[str]:
        """An evaluation uses one process, because the draws of Monte Carlo depend on the number of processes."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(self.gpus)}"]
        launch = torchrun if len(self.gpus) > 1 and not job.evaluation else []
        return [*python(job.script, launch), *job.overrides]


def python(script: str, launch: list[str] = ()) -> list[str]:
    """Starts a script of the checkout from any directory, or the command of that name where dropkey is installed."""
    if SCRIPTS is None:
        safe = "-P"  # a dropkey in the working directory is another one
        return [sys.executable, safe, *launch, "-m", "dropkey", Path(script).stem]
    return [sys.executable, *launch, str(SCRIPTS / script)]


def slots(jobs: int, gpus: str, per_gpu: int, gpus_per_run: int) -> list[Slot]:
    """One slot for each job that may run at the same time.

    Args:
        jobs: at most this many; 0: as many as the GPUs have room for, on a CPU one per core up to 4. Two trainings
            with one thread each finish sooner than two in a row with two threads.
        gpus: auto (all visible ones), none, or their numbers with commas.
        per_gpu: runs that share a GPU.
        gpus_per_run: GPUs of one run, through torchrun.
    Raises:
        ConfigError: numbers that do not fit together.
    """
    check_counts(jobs, per_gpu, gpus_per_run)
    found = visible_gpus() if gpus == "auto" else chosen_gpus(gpus)
    require(per_gpu == 1 or gpus_per_run == 1, f"per_gpu={per_gpu} and gpus_per_run={gpus_per_run}: one must be 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not found:
        require(gpus_per_run == 1, f"gpus_per_run={gpus_per_run} but no GPU is visible")
        count = jobs or min(cores, CPU_JOBS)
        return [Slot((), max(1, cores // count))] * count
    enough = len(found) >= gpus_per_run
    require(enough, f"gpus_per_run={gpus_per_run} but there are {len(found)} GPUs ({','.join(found)})")
    groups = [tuple(found[i : i + gpus_per_run]) for i in range(0, len(found) - gpus_per_run + 1, gpus_per_run)]
    groups = (groups * per_gpu)[: jobs or None]
    return [Slot(group, max(1, cores // len(groups) // gpus_per_run)) for group in groups]


def check_counts(jobs: int = 0, per_gpu: int = 1, gpus_per_run: int = 1) -> None:
    require(0 <= jobs <= MOST, f"jobs={jobs} must be between 0 and {MOST:,}")
    for key, value in (("per_gpu", per_gpu), ("gpus_per_run", gpus_per_run)):
        require(1 <= value <= MOST, f"{key}={value} must be between 1 and {MOST:,}")


def chosen_gpus(gpus: str) -> list[str]:
    """Those that `gpus` names, which must be visible: CUDA silently takes the CPU for one that is not there."""
    names = [gpu.strip() for gpu in gpus.split(",") if gpu.strip() and gpus != "none"]
    require(bool(names) or gpus == "none", f"gpus='{gpus}': auto, none, or numbers such as 0,1")
    require(len(set(names)) == len(names), f"gpus={gpus} names a GPU twice; per_gpu=2 has two runs share one")
    visible = visible_gpus() if names else []
    lacking = [name for name in names if name not in visible and not (visible and name.startswith(("GPU-", "MIG-")))]
    shown = f"visible are {','.join(visible)}" if visible else "none is visible"
    require(not lacking, f"gpus={gpus}: there is no GPU {','.join(lacking)}; {shown}")
    return names


def visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]
