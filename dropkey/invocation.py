"""The commands, and how the user starts them: messages and help say `python train.py`, `dropkey train` or
`python -m dropkey train`, as the one that runs was started."""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """`dropkey <name>`; its code is `start` in dropkey/commands/<name>.py (- is _ there), which takes its words from
    sys.argv."""

    about: str
    script: Optional[str] = None  # the same command in a checkout
    extra: str = "train"  # pip install 'dropkey[extra]' installs what it needs


COMMANDS = {
    "train": Command("trains a run: regularizer=dropkey schedule=decreasing; with -m several", "train.py"),
    "eval": Command("measures a run on a split: run=runs/<directory>", "eval.py"),
    "predict": Command("classifies images: run=runs/<directory> photo.jpg", "scripts/predict.py"),
    "export": Command(
        "writes a model for timm, torch.export, ONNX: run=runs/<directory> format=onnx", "scripts/export.py"
    ),
    "runs": Command("lists runs, filtered and grouped: regularizer=dropkey state=failed", "scripts/runs.py"),
    "reproduce": Command("makes a table of the paper: plan table=schedule scale=cpu", "scripts/reproduce.py"),
    "visualize": Command("draws attention, its entropy, masks: maps run=runs/<directory>", "scripts/visualize.py"),
    "label-maps": Command(
        "makes token labels for VOLO: teacher=dm_nfnet_f6 data=imagenet output=maps", "scripts/label_maps.py"
    ),
    "search": Command("looks for the best settings: optim.lr=log:1e-4..1e-2", "scripts/search.py", "sweeps"),
}


def invocation(command: str = "", processes: int = 1) -> str:
    """What starts a command, as text for a shell, with torchrun for several processes; empty: the one that runs."""
    typed = sys.argv[0]
    if typed.startswith(("dropkey ", "python ")):  # dropkey/__main__.py has left it there
        words = shlex.split(typed)
        if command:
            words = [*(["python", "-m", "dropkey"] if words[1] == "-m" else words[:-1]), command]
    elif not command:
        words = ["python", typed]
    elif Path(typed).resolve() not in {CHECKOUT / (known.script or "") for known in COMMANDS.values()}:
        words = ["dropkey", command]  # in a program of the user, a notebook
    elif script := COMMANDS[command].script:
        words = ["python", str(CHECKOUT / script) if os.path.isabs(typed) else os.path.relpath(CHECKOUT / script)]
    else:
        words = ["python", "-m", "dropkey", command]
    if processes > 1:
        words = ["torchrun", f"--nproc-per-node={processes}", *(words[1:] if words[0] == "python" else ["-m", *words])]
    return shlex.join(words)


def as_started(text: str) -> str:
    """`text` with each `dropkey <command>` named as the user would start it."""
    return re.sub(rf"\bdropkey ({'|'.join(COMMANDS)})\b", lambda found: invocation(found[1]), text)
