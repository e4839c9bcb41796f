"""Weights & Biases mirrors the records on disk. Training neither waits for it nor fails because of it."""

import contextlib
import dataclasses
import logging
import os
import threading
from pathlib import Path
from typing import Callable, Optional

from dropkey.config import identity
from dropkey.config.schema import TrainConfig
from dropkey.records import RunDirectory

INIT_TIMEOUT = 5  # seconds to reach the server or to log in, before going offline
FINISH_TIMEOUT = 60  # seconds for the last uploads


class NoOpTracker:
    """Used without W&B, and in all processes but the first."""

    def log(self, record: dict) -> None:
        pass

    def finish(self, summary: Optional[dict], picture: Optional[Path] = None) -> None:
        pass


def start(cfg: TrainConfig, directory: Path, info: Callable[[str], None]):
    """A tracker for the run in `directory`. If W&B cannot be used as asked, one line is logged and it goes offline or
    stays off."""
    if cfg.logger.name == "none" or (wanted := mode(cfg, info)) == "disabled":
        return NoOpTracker()
    try:
        import wandb
    except ImportError:
        info("wandb is not installed: records stay on disk only (pip install wandb, or logger=none)")
        return NoOpTracker()
    for tried in dict.fromkeys([wanted, "offline"]):
        try:
            if tried == "online":
                require_answer(wandb.setup().settings.base_url)
            return Wandb(wandb, cfg, tried, directory)
        except Exception as error:  # whatever it is, the training matters more
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service would hold the failed run's id
            if tried == "online":
                info(f"W&B is offline: {reason}; upload later with: wandb sync {directory}/wandb/offline-run-*")
            else:
                info(f"W&B is off for this run: {reason}")
    return NoOpTracker()


def require_answer(server: str) -> None:
    """TimeoutError or ConnectionError for a server that takes a connection and says nothing, or that it is broken: W&B
    itself would try again for a long time. All else is left to W&B, which knows proxies, certificates and keys."""
    import requests  # as W&B does

    statuses = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            query = {"query": "{ __typename }"}
            statuses.append(requests.post(f"{server}/graphql", json=query, timeout=2 * INIT_TIMEOUT).status_code)

    if not finishes_within(INIT_TIMEOUT, ask):
        raise TimeoutError(f"{server} does not answer within {INIT_TIMEOUT} s")
    if statuses and statuses[0] >= 500:
        raise ConnectionError(f"{server} answers with error {statuses[0]}")


def mode(cfg: TrainConfig, info: Callable[[str], None]) -> str:
    """online, offline or disabled: as the config says, else as W&B's own variable says, else offline."""
    said = os.environ.get("WANDB_MODE") or "offline"
    found = cfg.logger.mode or {"dryrun": "offline", "run": "online"}.get(said, said)
    if found not in ("online", "offline", "disabled"):
        info(f"WANDB_MODE={said} is none of online, offline, disabled: W&B is offline")
        return "offline"
    return found


def replay(cfg: TrainConfig, run: RunDirectory, info: Callable[[str], None]) -> None:
    """Logs a finished run to W&B as if it were trained now."""
    tracker = start(cfg, run.path, info)
    for record in run.records():
        tracker.log(record)
    tracker.finish(run.summary(), run.path / "curves.png")


def finishes_within(seconds: float, action: Callable) -> bool:
    """Runs `action` in a thread that may be left behind; whether it ended in time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class Wandb:
    """One W&B run per run directory, under the run's hash, however often the run is resumed."""

    def __init__(self, wandb, cfg: TrainConfig, mode: str, directory: Path):
        logging.getLogger("wandb").setLevel(logging.ERROR)
        self.wandb = wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        timeouts = {"init_timeout": INIT_TIMEOUT, "login_timeout": INIT_TIMEOUT}
        settings = wandb.Settings(**timeouts, console="off", silent=True)
        self.run = wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            tags=cfg.logger.tags or None,
            dir=str(directory),
            id=identity.run_hash(cfg),
            group=identity.group_hash(cfg),
            name=directory.name,
            config=dataclasses.asdict(cfg),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        """Numbers appear as epoch/<name> and step/<name> over the optimizer step."""
        kind = record["kind"]
        values = {f"{kind}/{k}": v for k, v in record.items() if k not in ("kind", "step") and v is not None}
        with contextlib.suppress(Exception):
            self.run.log({"step": record["step"], **values})

    def finish(self, summary: Optional[dict], picture: Optional[Path] = None) -> None:
        def end():
            with contextlib.suppress(Exception):
                if summary:
                    self.run.summary.update(summary)
                if picture is not None and picture.exists():
                    self.run.log({"curves": self.wandb.Image(str(picture))})
                self.run.finish()

        finishes_within(FINISH_TIMEOUT if summary else 5, end)  # an interrupted process has to end soon
