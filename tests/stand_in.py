"""Stands in for train.py and eval.py in tests of the launcher: it writes the same files, without training or torch.

It misbehaves as the environment variable BEHAVIOUR says: a JSON object from a part of the run's name to one of raise,
exit, kill, diverge, stop, sleep, wait once (sleeps at the first attempt only).
"""

import importlib.metadata
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dropkey.code_version import part_digest
from dropkey.errors import Busy
from dropkey.records import RunDirectory

METRICS = [{"key": "top1", "label": "top-1", "unit": "%"}, {"key": "loss", "label": "loss", "higher_is_better": False}]
VERSIONS = {"torch": importlib.metadata.version("torch"), "python": "0"}
RESULT = {
    "loss": 1.0,
    "metrics": METRICS,
    "samples": 10,
    "versions": VERSIONS,
    "hardware": "none",
    "code": {"engine": part_digest("engine")},
}


def announce(jobs, output: Path) -> None:
    """What the stand-in must know of its jobs, which the real scripts compose: it takes longer than all the rest."""
    from dropkey.config.identity import evaluation_settings

    known = {
        " ".join(job.overrides): {
            "run": str(job.run),
            "result": job.result,
            "settings": evaluation_settings(job.evaluation) if job.evaluation else None,
        }
        for job in jobs
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "jobs.json").write_text(json.dumps(known))


def main(script: str, overrides: list[str]) -> None:
    given = dict(override.split("=", 1) for override in overrides)
    output = Path(given["output"] if script == "train.py" else given["run"] + "/..")
    job = json.loads((output / "jobs.json").read_text())[" ".join(overrides)]
    run = RunDirectory(job["run"])
    with open(output / "starts.txt", "a") as file:
        file.write(f"{run.path.name} {job['result']}\n")
    start = given.get("init_from") or given.get("run")
    if start and not RunDirectory(start).finished:
        sys.exit(f"error: {start} is not finished")
    if script == "eval.py":
        content = {**RESULT, "top1": 50.0, "settings": job["settings"]}
        (run.path / job["result"]).write_text(json.dumps(content))
        return
    if run.finished:
        return
    try:
        with run.lock():
            ratio, seed = float(given.get("regularizer.ratio", 0)), int(given["seed"])
            noise = float(os.environ.get("NOISE", "0")) * random.Random(run.path.name).gauss(0, 1)
            train(run, top1=50 + 10 * ratio + seed % 1000 + noise, validation=50 - 10 * ratio)
    except Busy as error:
        sys.exit(error.exit_code)


def train(run: RunDirectory, top1: float, validation: float) -> None:
    run.set_status("running")
    act(run)
    time.sleep(float(os.environ.get("PAUSE", "0")))
    run.append({"kind": "epoch", "step": 1, "epoch": 1, "train_loss": 0.5, "eval_top1": 40.0, "seconds": 1.0})
    rest = {"epochs": 1, "seconds": 1.0, "samples_per_second": 10.0, "best_split": "val", "data": "d", "commit": "e"}
    rest["objective"] = validation
    run.write_result("summary.json", {**RESULT, **rest, "top1": top1})
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
    if how == "sleep" or (how == "wait once" and not (run.path / "tried").exists()):
        (run.path / "tried").touch()
        signal.signal(signal.SIGTERM, lambda *_: (run.set_status("interrupted", reason="SIGTERM"), sys.exit(143)))
        time.sleep(60)
