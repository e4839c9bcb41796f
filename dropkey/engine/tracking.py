"""Weights & Biases beside the records on disk. It mirrors them; nothing waits for it and nothing fails with it."""

import contextlib
import dataclasses
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Callable, Optional
from urllib.parse import urlparse

from dropkey.config import identity
from dropkey.config.schema import TrainConfig
from dropkey.records import RunDirectory

PATIENCE = 5  # seconds to reach the server before going offline
FINISH = 60  # seconds to let the last uploads through; after an interruption much less, the process is to end


class NoOpTracker:
    """A tracker that tracks nothing."""

    def log(self, record: dict) -> None:
        pass

    def finish(self, summary: Optional[dict], picture: Optional[Path] = None) -> None:
        pass


def reachable(url: str) -> bool:
    address = urlparse(url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname, port), timeout=PATIENCE):
            return True
    except OSError:
        return False


def why_offline(wandb) -> Optional[str]:
    """What stands against syncing, or None. Asked first because `wandb.init` would wait 90 s and raise."""
    settings = wandb.setup().settings
    if not (settings.api_key or os.environ.get("WANDB_API_KEY") or has_netrc(settings.base_url)):
        return "no API key (run `wandb login`)"
    if not reachable(settings.base_url):
        return f"{settings.base_url} does not answer"
    return None


def has_netrc(url: str) -> bool:
    import netrc

    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(urlparse(url).hostname) is not None
    return False


def within(seconds: float, task: Callable) -> bool:
    """Runs `task` in a thread that may be left behind; whether it ended in time."""
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def start(cfg: TrainConfig, directory: Path, info: Callable[[str], None]):
    """A tracker for the run in `directory`; offline or silent, with one line saying so, where W&B cannot be had."""
    logger = cfg.logger
    if logger.name == "none":
        return NoOpTracker()
    try:
        import wandb
    except ImportError:
        info("wandb is not installed: records stay on disk only (pip install wandb, or logger=none to silence this)")
        return NoOpTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        mode = logger.mode
        if mode == "online":
            obstacle = why_offline(wandb)
            if obstacle:
                info(f"W&B stays offline: {obstacle}; later: wandb sync {directory}/wandb/offline-run-*")
                mode = "offline"
        try:
            return Wandb(wandb, cfg, mode, directory)
        except Exception as error:
            if mode == "offline":
                raise
            info(f"W&B stays offline: {str(error).splitlines()[0]}; later: wandb sync {directory}/wandb/offline-run-*")
            return Wandb(wandb, cfg, "offline", directory)
    except Exception as error:  # whatever it is, the training matters more
        info(f"W&B is off for this run: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return NoOpTracker()


def replay(cfg: TrainConfig, run: RunDirectory, info: Callable[[str], None]) -> None:
    """Tells W&B of a finished run as if it were trained now."""
    tracker = start(cfg, run.path, info)
    for record in run.records():
        tracker.log(record)
    tracker.finish(run.summary(), run.path / "curves.png")


class Wandb:
    """One W&B run per run directory, under the run's hash, however often the run is resumed."""

    def __init__(self, wandb, cfg: TrainConfig, mode: str, directory: Path):
        logging.getLogger("wandb").setLevel(logging.ERROR)
        self.wandb = wandb
        settings = wandb.Settings(init_timeout=30, console="off", x_disable_stats=False, silent=True)
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

        within(FINISH if summary else 5, end)
