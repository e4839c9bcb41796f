"""Runs what a table lacks: each job its own process, so that whatever happens to one leaves the others going."""

import contextlib
import fcntl
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from dropkey.errors import Busy, ConfigError
from dropkey.records import RunDirectory, write_json
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, RUNNING, Job, state
from dropkey.reproduction.slots import Slot

POLL = 0.2  # seconds
WAITING, ELSEWHERE = "waiting", "elsewhere"  # for another job; run by another launcher


@dataclass
class JobState:
    """A job on its way through this launcher."""

    job: Job
    state: str
    reason: str = ""
    attempts: int = 0
    slot: Optional[Slot] = None
    process: object = None  # poll() -> exit code or None, terminate()
    claim: Optional[contextlib.ExitStack] = None
    began: float = 0.0  # 0: not by this launcher
    look_again: float = 0.0  # not before

    @property
    def over(self) -> bool:
        return self.state in (DONE, FAILED, DIVERGED, INTERRUPTED)


@dataclass
class Launcher:
    """`run` starts what is missing, resumes what was interrupted, and what failed where `retry` says so.

    Two launchers at once share the work: a claim on each job, held as a file lock by the launcher, and the lock of
    the run itself, held by the training, keep them from doing a thing twice.
    """

    jobs: list[Job]
    slots: list[Slot]
    retry: bool = False  # what failed or diverged in an earlier call
    retries: int = 0  # further attempts, within this call, at what fails
    start: object = None  # (command, environment, log file) -> process; None: a process on this machine
    items: list[JobState] = field(default_factory=list)
    stopped: int = 0  # the signal that asked to stop

    def run(self, watch=lambda launcher, event, item: None) -> list[JobState]:
        """All jobs, each done, failed or diverged; or, after a signal, as they were left.

        Args:
            watch: called with ("tick", None) a few times a second and with ("start", "end" or "stop", item).
        """
        self.items = [self.item(job) for job in self.jobs]
        free = list(self.slots)
        with self.signals():
            while not self.stopped and not all(item.over for item in self.items):
                for item in self.items:
                    if item.process is not None and (code := item.process.poll()) is not None:
                        free.append(item.slot)
                        self.finish(item, code)
                        watch(self, "end", item)
                    elif item.process is None and not item.over and free and self.ready(item):
                        if self.launch(item, free[-1]):
                            free.pop()
                            watch(self, "start", item)
                        elif item.over:
                            watch(self, "end", item)
                watch(self, "tick", None)
                time.sleep(POLL)
            self.stop(watch)
        return self.items

    def item(self, job: Job) -> JobState:
        found, reason = state(job)
        if found in (FAILED, DIVERGED) and self.retry:
            forget(job)
            found = WAITING
        return JobState(job, found if found in (DONE, FAILED, DIVERGED) else WAITING, reason)

    def ready(self, item: JobState) -> bool:
        if time.monotonic() < item.look_again:
            return False
        if item.job.needs is None:
            return True
        base = next((other for other in self.items if other.job == item.job.needs), None)
        if base is not None and base.over and base.state != DONE:
            item.state = INTERRUPTED if base.state == INTERRUPTED else FAILED
            item.reason = f"it needs {base.job.name}, which is {base.state}"
        return base is None or base.state == DONE

    def launch(self, item: JobState, slot: Slot) -> bool:
        """Starts the item's process, unless the job is done by now or somebody else does it."""
        if item.over:
            return False
        claim = contextlib.ExitStack()
        try:
            claim.enter_context(claimed(item.job))
        except Busy:
            item.state, item.look_again = ELSEWHERE, time.monotonic() + 2
            return False
        found, reason = state(item.job)
        settled = found == DONE or (found in (FAILED, DIVERGED) and item.state == ELSEWHERE)
        if settled or found == RUNNING:
            claim.close()
            item.state, item.reason = (found, reason) if settled else (ELSEWHERE, "")
            item.look_again = time.monotonic() + 2
            return False
        item.job.failure.unlink(missing_ok=True)
        command = slot.command(item.job)
        log = item.job.log
        with open(log, "a") as file:
            file.write(f"$ {' '.join(command)}\n")
        item.process = (self.start or start_here)(command, slot.environment(), log)
        item.state, item.reason, item.slot, item.claim = RUNNING, "", slot, claim
        item.attempts, item.began = item.attempts + 1, time.monotonic()
        return True

    def finish(self, item: JobState, code: int) -> None:
        """What the exit code and what lies on disk say together."""
        item.process, item.slot = None, None
        found, reason = state(item.job)
        if code == Busy.exit_code:
            item.state, item.began, item.look_again = ELSEWHERE, 0.0, time.monotonic() + 2
        elif found in (DONE, DIVERGED):
            item.state, item.reason = found, reason
        else:
            asked_to = item.job.script == "train.py" and RunDirectory(item.job.run).status().get("state") == INTERRUPTED
            if not asked_to and found != FAILED:
                reason = explain(code, item.job.log)
                record_failure(item.job, reason)
            again = item.attempts <= self.retries and code != ConfigError.exit_code
            item.state, item.reason = (WAITING if again else INTERRUPTED if asked_to else FAILED), reason
        item.claim.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 are handed on to the processes, which save and end."""

        def note(number, frame):
            self.stopped = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, watch) -> None:
        running = [item for item in self.items if item.process is not None]
        for item in running:
            item.process.terminate()
            watch(self, "stop", item)
        for item in running:
            while item.process.poll() is None:
                watch(self, "tick", None)
                time.sleep(POLL)
            found, reason = state(item.job)
            item.state, item.reason, item.process = found if found != RUNNING else INTERRUPTED, reason, None
            item.claim.close()


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Holds a job against other launchers; the system lets go of it however this one ends.

    Raises:
        Busy: another launcher holds it.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    with open(job.run / f".claim-{Path(job.result).stem}", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{job.name} is claimed by another launcher") from None
        yield


class Here:
    """A process on this machine, in a session of its own: Ctrl-C in the terminal reaches it once, through us."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def poll(self) -> Optional[int]:
        return self.process.poll()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


start_here = Here


def explain(code: int, log: Path) -> str:
    """Why a process ended that left no reason itself."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    last = lines[-1].strip() if lines and not lines[-1].startswith("$ ") else "no output"
    return f"exit code {code}: {last.removeprefix('error: ')[:300]}"


def record_failure(job: Job, reason: str) -> None:
    if job.script == "train.py":
        RunDirectory(job.run).set_status(FAILED, reason=reason)
    else:
        write_json(job.failure, {"reason": reason})


def forget(job: Job) -> None:
    """A failure, so that the job is tried again: a training goes on from its last checkpoint."""
    if job.script == "train.py":
        RunDirectory(job.run).set_status(INTERRUPTED, reason="to be tried again")
    else:
        job.failure.unlink(missing_ok=True)
