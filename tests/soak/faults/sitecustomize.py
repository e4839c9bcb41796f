"""Python imports this at its start where PYTHONPATH names its folder. In a training it notes every step in the file
SOAK_STEPS, as "time process run step", and at step SOAK_STEP does what SOAK_FAULTS, {run: fault}, says of the run."""

import json
import os
import resource
import sys
import time
from pathlib import Path


def install(script: Path) -> None:
    sys.path.insert(0, str(script.resolve().parent))
    import torch

    from dropkey.engine.trainer import Trainer

    faults, at = json.loads(os.environ.get("SOAK_FAULTS", "{}")), int(os.environ["SOAK_STEP"])
    original = Trainer.step

    def step_and_fault(self, microbatches):
        begun = original(self, microbatches)
        run, step = self.run.path.name, self.state.position.global_step
        with open(os.environ["SOAK_STEPS"], "a") as file:
            file.write(f"{time.time():.3f} {os.getpid()} {run} {step}\n")
        fault = faults.get(run)
        if step != at:
            return begun
        if fault == "raises":
            raise ValueError("a made-up error")
        if fault == "exits":
            sys.exit(7)
        if fault == "exits at once":
            os._exit(7)
        if fault == "diverges":
            with torch.no_grad():
                next(self.state.model.parameters()).fill_(float("inf"))
        if fault == "may write 50 kB":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return begun

    Trainer.step = step_and_fault


scripts = [Path(word) for word in sys.orig_argv if word.endswith("train.py")]
if any("forkserver" in word for word in sys.orig_argv):  # the parent from which a table's jobs are forked
    scripts = [Path(__file__).resolve().parents[3] / "train.py"]
if scripts and "SOAK_STEPS" in os.environ:
    install(scripts[0])
