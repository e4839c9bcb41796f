"""Runs what a table lacks: each task its own process, so that whatever happens to one leaves the others going."""

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
from dropkey.reproduction.slots import Slot
from dropkey.reproduction.tasks import DIVERGED, DONE, FAILED, INTERRUPTED, RUNNING, Task, state

POLL = 0.2  # seconds
WAITING, ELSEWHERE = "waiting", "elsewhere"  # for another task; run by another launcher


@dataclass
class Job:
    """A task on its way through this launcher."""

    task: Task
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

    Two launchers at once share the work: a claim on each task, held as a file lock by the launcher, and the lock of
    the run itself, held by the training, keep them from doing a thing twice.
    """

    tasks: list[Task]
    slots: list[Slot]
    retry: bool = False  # what failed or diverged in an earlier call
    retries: int = 0  # further attempts, within this call, at what fails
    start: object = None  # (command, environment, log file) -> process; None: a process on this machine
    jobs: list[Job] = field(default_factory=list)
    stopped: int = 0  # the signal that asked to stop

    def run(self, watch=lambda launcher, event, job: None) -> list[Job]:
        """All jobs, each done, failed or diverged; or, after a signal, as they were left.

        Args:
            watch: called with ("tick", None) a few times a second and with ("start", "end" or "stop", job).
        """
        self.jobs = [self.job(task) for task in self.tasks]
        free = list(self.slots)
        with self.signals():
            while not self.stopped and not all(job.over for job in self.jobs):
                for job in self.jobs:
                    if job.process is not None and (code := job.process.poll()) is not None:
                        free.append(job.slot)
                        self.finish(job, code)
                        watch(self, "end", job)
                    elif job.process is None and not job.over and free and self.ready(job):
                        if self.launch(job, free[-1]):
                            free.pop()
                            watch(self, "start", job)
                        elif job.over:
                            watch(self, "end", job)
                watch(self, "tick", None)
                time.sleep(POLL)
            self.stop(watch)
        return self.jobs

    def job(self, task: Task) -> Job:
        found, reason = state(task)
        if found in (FAILED, DIVERGED) and self.retry:
            forget(task)
            found = WAITING
        return Job(task, found if found in (DONE, FAILED, DIVERGED) else WAITING, reason)

    def ready(self, job: Job) -> bool:
        if time.monotonic() < job.look_again:
            return False
        if job.task.needs is None:
            return True
        base = next((other for other in self.jobs if other.task == job.task.needs), None)
        if base is not None and base.over and base.state != DONE:
            job.state = INTERRUPTED if base.state == INTERRUPTED else FAILED
            job.reason = f"it needs {base.task.name}, which is {base.state}"
        return base is None or base.state == DONE

    def launch(self, job: Job, slot: Slot) -> bool:
        """Starts the job's process, unless the task is done by now or somebody else does it."""
        if job.over:
            return False
        claim = contextlib.ExitStack()
        try:
            claim.enter_context(claimed(job.task))
        except Busy:
            job.state, job.look_again = ELSEWHERE, time.monotonic() + 2
            return False
        found, reason = state(job.task)
        settled = found == DONE or (found in (FAILED, DIVERGED) and job.state == ELSEWHERE)
        if settled or found == RUNNING:
            claim.close()
            job.state, job.reason = (found, reason) if settled else (ELSEWHERE, "")
            job.look_again = time.monotonic() + 2
            return False
        job.task.failure.unlink(missing_ok=True)
        command = slot.command(job.task)
        log = job.task.log
        with open(log, "a") as file:
            file.write(f"$ {' '.join(command)}\n")
        job.process = (self.start or start_here)(command, slot.environment(), log)
        job.state, job.reason, job.slot, job.claim = RUNNING, "", slot, claim
        job.attempts, job.began = job.attempts + 1, time.monotonic()
        return True

    def finish(self, job: Job, code: int) -> None:
        """What the exit code and what lies on disk say together."""
        job.process, job.slot = None, None
        found, reason = state(job.task)
        if code == Busy.exit_code:
            job.state, job.began, job.look_again = ELSEWHERE, 0.0, time.monotonic() + 2
        elif found in (DONE, DIVERGED):
            job.state, job.reason = found, reason
        else:
            asked_to = job.task.script == "train.py" and RunDirectory(job.task.run).status().get("state") == INTERRUPTED
            if not asked_to and found != FAILED:
                reason = explain(code, job.task.log)
                record_failure(job.task, reason)
            again = job.attempts <= self.retries and code != ConfigError.exit_code
            job.state, job.reason = (WAITING if again else INTERRUPTED if asked_to else FAILED), reason
        job.claim.close()

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
        running = [job for job in self.jobs if job.process is not None]
        for job in running:
            job.process.terminate()
            watch(self, "stop", job)
        for job in running:
            while job.process.poll() is None:
                watch(self, "tick", None)
                time.sleep(POLL)
            found, reason = state(job.task)
            job.state, job.reason, job.process = found if found != RUNNING else INTERRUPTED, reason, None
            job.claim.close()


@contextlib.contextmanager
def claimed(task: Task) -> Iterator[None]:
    """Holds a task against other launchers; the system lets go of it however this one ends.

    Raises:
        Busy: another launcher holds it.
    """
    task.run.mkdir(parents=True, exist_ok=True)
    with open(task.run / f".claim-{Path(task.result).stem}", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{task.name} is claimed by another launcher") from None
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


def record_failure(task: Task, reason: str) -> None:
    if task.script == "train.py":
        RunDirectory(task.run).set_status(FAILED, reason=reason)
    else:
        write_json(task.failure, {"reason": reason})


def forget(task: Task) -> None:
    """A failure, so that the task is tried again: a training goes on from its last checkpoint."""
    if task.script == "train.py":
        RunDirectory(task.run).set_status(INTERRUPTED, reason="to be tried again")
    else:
        task.failure.unlink(missing_ok=True)
