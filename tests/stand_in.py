"""Stands in for train.py and eval.py where a test is about what launches them: same files, no training, no torch.

It misbehaves as the environment variable BEHAVIOUR says: a JSON object from a part of the run's name to one of raise,
exit, kill, diverge, stop, sleep, once (fails at the first attempt only), wait once (sleeps at the first).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dropkey.errors import Busy
from dropkey.records import RunDirectory
from dropkey.reproduction.jobs import Compositions

FIGURES = {"top1": 50.0, "top5": 90.0, "loss": 1.0, "ece": 3.0}
OWN = ("seed", "output", "init_from")  # of a task, not of its composition
VERSIONS = {"torch": "0", "python": "0"}


def main(script: str, words: list[str]) -> None:
    if script == "eval.py":
        run = RunDirectory(Path(next(w for w in words if w.startswith("run=")).removeprefix("run=")))
        passes = int(next(w for w in words if w.startswith("eval.monte_carlo=")).split("=")[1])
        text = json.dumps({**FIGURES, "count": 10, "monte_carlo": passes, "versions": VERSIONS, "hardware": "none"})
        (run.path / f"eval-test-mc{passes}.json").write_text(text)
        return
    given = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
    output, seed = Path(given["output"]), int(given["seed"])
    rest = tuple(word for word in words if word.partition("=")[0] not in OWN)
    composed = Compositions(output).get(rest)  # remembered: composing anew takes longer than all the rest
    start = Path(given["init_from"]).name if "init_from" in given else None
    run = RunDirectory(output / composed.run_name(seed, start))
    with open(output / "starts.txt", "a") as file:
        file.write(run.path.name + "\n")
    if run.finished:
        return
    try:
        with run.lock():
            train(run, top1=50 + 10 * composed.keys.get("regularizer.ratio", 0) + seed)
    except Busy as error:
        sys.exit(error.exit_code)


def train(run: RunDirectory, top1: float) -> None:
    run.set_status("running")
    act(run)
    time.sleep(float(os.environ.get("PAUSE", "0")))
    run.append({"kind": "epoch", "step": 1, "epoch": 1, "train_loss": 0.5, "eval_top1": 40.0, "eval_loss": 1.0})
    rest = {"images": 10, "epochs": 1, "seconds": 1.0, "best_split": "val", "code": "c", "data": "d", "commit": "e"}
    run.write_summary({**FIGURES, "top1": top1, **rest, "versions": VERSIONS, "hardware": "none"})
    run.set_status("done")


def act(run: RunDirectory) -> None:
    behaviours = json.loads(os.environ.get("BEHAVIOUR", "{}"))
    how = next((how for part, how in behaviours.items() if part in run.path.name), None)
    if how == "raise":
        raise ValueError("a made-up error")
    if how == "exit":
        print("leaving early")
        sys.exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "diverge":
        run.set_status("diverged", reason="loss nan")
        sys.exit(4)
    if how == "stop":
        run.set_status("interrupted", reason="SIGTERM")
        sys.exit(143)
    if how == "once" and not (run.path / "tried").exists():
        (run.path / "tried").touch()
        sys.exit(9)
    if how == "sleep" or (how == "wait once" and not (run.path / "tried").exists()):
        (run.path / "tried").touch()
        signal.signal(signal.SIGTERM, lambda *_: (run.set_status("interrupted", reason="SIGTERM"), sys.exit(143)))
        time.sleep(60)
