"""Whether there can be a GPU, known before torch is imported, which takes seconds."""

import ctypes
import importlib.util
import os
import re
from pathlib import Path

from dropkey.errors import ConfigError


def check_device(key: str, device: str) -> None:
    """Refuses cuda where there can be none; where there may be one, torch tells later. Not part of `check`: a table is
    planned where it is not trained."""
    if device == "cuda" and (reason := no_cuda()):
        raise ConfigError(f"{key}=cuda, but {reason}; take {key}=auto, which uses what there is")


def no_cuda() -> str:
    """Why torch will find no GPU, or an empty string."""
    torch = importlib.util.find_spec("torch")
    version = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8") if torch else ""
    if re.search(r"^hip\b.*= '", version, re.MULTILINE):
        return ""
    if re.search(r"^cuda\b.*= None", version, re.MULTILINE):
        return "the installed torch was built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    return ""
