"""Where jobs run: shares of the cores, GPUs, several runs to a GPU, or several GPUs to a run."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from dropkey.config.check import require
from dropkey.config.compose import CONFIGS
from dropkey.reproduction.jobs import Job

SCRIPTS = CONFIGS.parent  # where train.py and eval.py lie
CPU_JOBS = 4  # a gigabyte each


@dataclass(frozen=True)
class Slot:
    """Room for one job."""

    gpus: tuple[str, ...]  # empty: on the CPU
    threads: int

    def __str__(self) -> str:
        return f"gpu {','.join(self.gpus)}" if self.gpus else f"cpu x {self.threads}"

    def environment(self) -> dict[str, str]:
        """OMP_NUM_THREADS is a share: OpenMP's threads wait spinning, and two trainings with all cores each take 6 to
        30 times as long as one after the other."""
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return environment

    def command(self, job: Job) -> list[str]:
        """The evaluation of a run takes one process: how the test images are shared out changes Monte Carlo's draws."""
        script = str(SCRIPTS / job.script)
        if len(self.gpus) > 1 and job.script == "train.py":
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(self.gpus)}"]
            return [sys.executable, *torchrun, script, *job.words]
        return [sys.executable, script, *job.words]


def slots(jobs: int | None, gpus: str, per_gpu: int, gpus_per_run: int) -> list[Slot]:
    """As many places as jobs may run at once.

    Args:
        jobs: at most this many; None: all there is room for on GPUs; on a CPU one per core, up to 4. Two trainings
            of one thread each get more done than one of two threads, and import at the same time.
        gpus: auto (all that are visible), none, or their numbers with commas.
        per_gpu: runs that share a GPU.
        gpus_per_run: GPUs of one run, through torchrun.
    Raises:
        ConfigError: numbers that do not go together.
    """
    found = visible_gpus() if gpus == "auto" else [g for g in gpus.split(",") if g and gpus != "none"]
    for key, value in (("jobs", jobs or 1), ("per_gpu", per_gpu), ("gpus_per_run", gpus_per_run)):
        require(value >= 1, f"{key}={value} must be 1 or more")
    require(per_gpu == 1 or gpus_per_run == 1, f"per_gpu={per_gpu} and gpus_per_run={gpus_per_run}: one must be 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not found:
        require(gpus_per_run == 1, f"gpus_per_run={gpus_per_run} but no GPU is visible")
        jobs = jobs or min(cores, CPU_JOBS)
        return [Slot((), max(1, cores // jobs))] * jobs
    require(
        len(found) >= gpus_per_run, f"gpus_per_run={gpus_per_run} but there are {len(found)} GPUs ({','.join(found)})"
    )
    groups = [tuple(found[i : i + gpus_per_run]) for i in range(0, len(found) - gpus_per_run + 1, gpus_per_run)]
    places = groups * per_gpu
    places = places[: jobs or len(places)]
    return [Slot(group, max(1, cores // len(places) // gpus_per_run)) for group in places]


def visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]
