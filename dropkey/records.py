"""What a run leaves on disk. Reports, resume and W&B read these files and nothing else. Imports no torch."""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, Optional

from dropkey import shapes
from dropkey.errors import Busy, StorageError, explained
from dropkey.metrics import Metric

PATIENCE = 0.3  # seconds: `is_locked` of another process holds the lock for a moment


def replace_file(path: Path, write: Callable, verify: Optional[Callable[[Path], None]] = None) -> None:
    """Replaces the file `path` by what `write(file)` writes, atomically: after a crash it is the old or the new one.

    Written to a temporary file in the same directory, flushed, checked by `verify(temporary path)`, renamed.

    Raises:
        StorageError: the disk is full or refuses; the old file is intact and the temporary one gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.")
    except OSError as error:
        error.filename = error.filename2 = None  # perhaps the temporary name
        raise StorageError(f"cannot write {path}: {explained(error)}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in RuntimeError
        written = temporary.stat().st_size if temporary.exists() else 0
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        refused = error if isinstance(error, OSError) else error.__context__  # what torch.save wrapped
        reason = explained(refused) if isinstance(refused, OSError) else str(error).splitlines()[0]
        kept = "; the old file is intact" if path.exists() else ""
        raise StorageError(f"cannot write {path}: {reason} (after {written:,} bytes; {free:,} free){kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def unfollowed(path: str, flags: int) -> int:
    """For `open`: refuses a link (ELOOP), which might lead to a file of somebody else."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def locked_within(file, seconds: float) -> bool:
    """Whether the file could be locked in that time."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


class RunDirectory:
    """A run on disk: config.yaml, status.json, metrics.jsonl, summary.json, log.txt, curves.png, checkpoints/."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    # -------------------------------------------------------------------------------------------- status, summary

    def status(self) -> dict:
        """{} for a run that never started; otherwise `time`, `state` (running, done, failed, diverged, interrupted) and
        the `reason` of a failure."""
        return self.read_json("status.json")

    def set_status(self, state: str, **details) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.path / "status.json", {"state": state, "time": now, **process, **details})

    def state(self) -> tuple[str, str]:
        """(state, reason) of the run now: "missing" where it never started, "interrupted" where its process is gone,
        "diverged" where its result is no number, "damaged" where a file that tells cannot be read."""
        try:
            status = self.status()
            found, summary = status.get("state", "missing"), self.summary() if status.get("state") == "done" else {}
        except StorageError as error:
            return "damaged", str(error)
        if found == "running" and not self.is_locked():
            found = "interrupted"
        if found == "done" and not summary:
            found = "interrupted"
        if summary and shapes.not_a_number(summary):
            return "diverged", shapes.not_a_number(summary)
        return found, status.get("reason", "") if found in ("failed", "diverged") else ""

    def is_locked(self) -> bool:
        """Whether a training holds the run now; its lock is released however it ends."""
        try:
            with open(self.path / ".lock", "rb", opener=unfollowed) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:  # not ours to lock
            return False
        return False

    @property
    def finished(self) -> bool:
        return self.status().get("state") == "done" and bool(self.summary())

    def summary(self) -> dict:
        return self.read_json("summary.json")

    def write_result(self, name: str, result: dict, correct: Optional[bytes] = None) -> None:
        """The JSON file of an evaluation, such as summary.json, and before it summary.bits: for each sample of the
        split a bit, whether it was right."""
        if correct is not None:
            replace_file((self.path / name).with_suffix(".bits"), lambda file: file.write(correct))
        write_json(self.path / name, result)

    def correct(self, name: str) -> Optional[bytes]:
        with contextlib.suppress(OSError):
            return (self.path / name).with_suffix(".bits").read_bytes()

    def read_json(self, name: str) -> dict:
        """{} where there is no such file.

        Raises:
            StorageError: it cannot be read, or is not what dropkey.shapes says.
        """
        try:
            return shapes.read_object(self.path / name, shapes.shape_of(name))
        except FileNotFoundError:
            return {}
        except StorageError as error:
            raise StorageError(f"{error}; delete it, and it is made again, or start over with overwrite=true") from None

    def entropy(self) -> dict:
        """entropy.json; {} where it is missing or damaged: it is measured again then."""
        with contextlib.suppress(StorageError):
            return self.read_json("entropy.json")
        return {}

    # ---------------------------------------------------------------------------------------------------- metrics

    def append(self, record: dict) -> None:
        """One line of metrics.jsonl. `kind` is "step" or "epoch"; floats carry 7 significant digits."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(record)) + "\n")

    def records(self, kind: Optional[str] = None) -> list[dict]:
        """All records, or those of one kind, without lines that are damaged, which are named on stderr, and a last one
        that is still being written or was cut off.

        Raises:
            StorageError: there is something else in the file's place.
        """
        try:
            *lines, last = self.metrics.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.metrics} cannot be read: {error.strerror}; move it away") from None
        found = [as_record(line) for line in (*lines, last)]
        damaged = [str(number) for number, one in enumerate(found[:-1], 1) if one is None]
        if damaged:
            tell_once(f"{self.metrics}: line {', '.join(damaged)} is damaged and left out")
        return [record for record in found if record and kind in (None, record["kind"])]

    def truncate(self, update: int, epoch: int, last: Optional[dict] = None) -> None:
        """Removes the records made after optimizer step `update` or after `epoch` finished epochs, because training
        resumes from there. `last`: the last record before, which the file may have lost."""
        kept = [r for r in self.records() if (r["step"] <= update if r["kind"] == "step" else r["epoch"] <= epoch)]
        keys = ("kind", "step", "epoch")
        if last is not None and not any(all(r.get(key) == last.get(key) for key in keys) for r in kept):
            kept = [*kept, last]
        text = "".join(json.dumps(rounded(record)) + "\n" for record in kept)
        replace_file(self.metrics, lambda file: file.write(text.encode()))

    def log(self, text: str) -> None:
        with open(self.path / "log.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text + "\n")

    # ------------------------------------------------------------------------------------------------------- life

    def clear(self) -> None:
        """Removes the run's files, for overwrite=true, but not the lock file."""
        for child in self.path.iterdir() if self.path.exists() else ():
            if child.name != ".lock":
                shutil.rmtree(child) if child.is_dir() else child.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """An exclusive lock on the run, which the operating system releases when this process ends, however it ends.

        Raises:
            Busy: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "ab", opener=unfollowed) as file:
            if not locked_within(file, PATIENCE):
                holder = {}
                with contextlib.suppress(StorageError):
                    holder = self.status()
                raise Busy(
                    f"{self.path} is being trained by process {holder.get('pid')} on {holder.get('host')}; "
                    "wait for it or stop it"
                ) from None
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do while a worker process has a copy of the file


def rounded(record: dict) -> dict:
    """Floats with 7 significant digits."""
    return {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in record.items()}


def as_record(line: bytes) -> Optional[dict]:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if shapes.line(found) else None


@functools.lru_cache(maxsize=None)
def tell_once(text: str) -> None:
    """A warning on stderr, however often the file is read."""
    logging.getLogger("dropkey").warning(text)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def headline(summary: dict) -> str:
    """A run's result on the test split as one line."""
    figures = shown_figures(summary, summary["metrics"])
    return f"test   {figures}  ({summary['samples']:,} samples, epoch {summary['epochs']}, {clock(summary['seconds'])})"


def shown_figures(figures: dict, metrics: list[dict]) -> str:
    known = [metric for metric in metrics if figures[metric["key"]] is not None]
    return ", ".join(Metric(**metric).format(figures[metric["key"]]) for metric in known)


def hardware() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
