"""What a result was measured with: versions, commit, hardware, memory."""

import importlib.metadata
import resource
import subprocess
import sys
from pathlib import Path
from typing import Optional

import torch

from dropkey import __version__
from dropkey.engine.distributed import DistContext
from dropkey.records import hardware

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb")


def peak_memory_mib(dist: DistContext) -> int:
    """Peak memory of the GPU, or of the process on a CPU."""
    if dist.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(dist.device) / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def device_name(dist: DistContext) -> str:
    return torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else hardware()


def versions() -> dict[str, str]:
    found = {"dropkey": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> Optional[str]:
    """The commit of this code, with + when files differ from it; None where it is not in a repository, or installed
    somewhere inside the repository of another project."""
    here = Path(__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
