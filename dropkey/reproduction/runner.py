"""Starts the jobs of a table, each in its own process: a job that fails does not stop the others."""

import contextlib
import fcntl
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from dropkey.errors import Busy, StorageError
from dropkey.records import RunDirectory, write_json
from dropkey.reproduction.jobs import (
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    MISSING,
    RUNNING,
    Job,
    own_state,
    share_left,
    state,
)
from dropkey.reproduction.slots import Slot

POLL = 0.2  # seconds
RECHECK = 2.0  # seconds until a job of another launcher is looked at again
WAITING, ELSEWHERE = "waiting", "elsewhere"  # for a slot or another job; run by another launcher


@dataclass
class JobState:
    """A job in this launcher."""

    job: Job
    state: str
    reason: str = ""
    slot: Optional[Slot] = None
    process: object = None  # poll() -> exit code or None, terminate()
    claim: Optional[contextlib.ExitStack] = None
    started: float = 0.0  # 0: not by this launcher
    share_left: float = 1.0  # of the work, when it started
    next_check: float = 0.0

    @property
    def over(self) -> bool:
        return self.state in (DONE, FAILED, DIVERGED, INTERRUPTED)

    def leave_to_other(self) -> None:
        self.state, self.started, self.next_check = ELSEWHERE, 0.0, time.monotonic() + RECHECK


class LocalProcess:
    """A process on this machine, in its own session, so that Ctrl-C in the terminal reaches it through us only."""

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


@dataclass
class Launcher:
    """Starts missing jobs, resumes interrupted ones, and repeats failed ones if `retry`.

    Several launchers may share the work: each holds a file lock on the jobs it runs, and each training a lock on its
    run directory.
    """

    jobs: list[Job]
    slots: list[Slot]
    retry: bool = False  # jobs that failed or diverged in an earlier call
    start: Callable = LocalProcess  # (command, environment, log file) -> process
    states: list[JobState] = field(default_factory=list)
    stopped: int = 0  # the signal that asked to stop

    def run(self, watch=lambda launcher, event, one: None) -> list[JobState]:
        """The state of every job when all are over, or when a signal has stopped them.

        Args:
            watch: called with this launcher, "start", "end" or "stop", and the state of the job.
        """
        self.states = [self.initial(job) for job in self.jobs]
        free = list(self.slots)
        with self.signals():
            while not self.stopped and not all(one.over for one in self.states):
                for one in self.states:
                    if one.process is not None and (code := one.process.poll()) is not None:
                        free.append(one.slot)
                        self.finish(one, code)
                        watch(self, "end", one)
                    elif one.process is None and not one.over and free and self.ready(one):
                        if self.start_job(one, free[-1]):
                            free.pop()
                            watch(self, "start", one)
                        elif one.over:
                            watch(self, "end", one)
                time.sleep(POLL)
            self.stop(watch)
        return self.states

    def initial(self, job: Job) -> JobState:
        found, reason = state(job)
        if found in (FAILED, DIVERGED) and self.retry:
            found = WAITING
            if own_state(job)[0] != MISSING:
                try:
                    forget_failure(job)
                except (OSError, StorageError) as error:
                    found, reason = FAILED, str(error)
        return JobState(job, found if found in (DONE, FAILED, DIVERGED) else WAITING, reason)

    def ready(self, one: JobState) -> bool:
        if time.monotonic() < one.next_check:
            return False
        base = next((other for other in self.states if other.job == one.job.needs), None)
        if base is not None and base.over and base.state != DONE:
            one.state = INTERRUPTED if base.state == INTERRUPTED else FAILED
            one.reason = f"it needs {base.job.label}, which is {base.state}"
        return base is None or base.state == DONE

    def start_job(self, one: JobState, slot: Slot) -> bool:
        """Starts the process, unless the job is over, another launcher has it, or the disk refuses."""
        if one.over:
            return False
        claim = contextlib.ExitStack()
        try:
            claim.enter_context(claimed(one.job))
            if self.is_settled(one):
                claim.close()
                return False
            one.job.failure.unlink(missing_ok=True)
            one.share_left = share_left(one.job)
            command = slot.command(one.job)
            with open(one.job.log, "a") as file:
                file.write(f"$ {' '.join(command)}\n")
            one.process = self.start(command, slot.environment(), one.job.log)
        except Busy:
            one.leave_to_other()
            return False
        except OSError as error:
            claim.close()
            one.state, one.reason = FAILED, str(error)
            return False
        one.state, one.reason, one.slot, one.claim = RUNNING, "", slot, claim
        one.started = time.monotonic()
        return True

    def is_settled(self, one: JobState) -> bool:
        """Whether a job that nobody else has claimed need not start: it is over, or its training runs by itself.
        One that has failed since this launcher began has failed in another one."""
        found, reason = own_state(one.job)
        settled = found == DONE or (found in (FAILED, DIVERGED) and (one.state == ELSEWHERE or not self.retry))
        if settled or found == RUNNING:
            one.leave_to_other()
        if settled:
            one.state, one.reason = found, reason
        return settled or found == RUNNING

    def finish(self, one: JobState, code: int) -> None:
        """The state that follows from the exit code and the files of the run."""
        one.process, one.slot = None, None
        found, reason = state(one.job)
        if code == Busy.exit_code:
            one.leave_to_other()
        elif found in (DONE, DIVERGED):
            one.state, one.reason = found, reason
            if one.share_left == 1:
                with contextlib.suppress(OSError):
                    one.job.claim.write_text(f"{time.monotonic() - one.started:.1f}")
        elif found == INTERRUPTED and RunDirectory(one.job.run).status().get("state") == INTERRUPTED:
            one.state, one.reason = INTERRUPTED, reason
        else:
            one.state, one.reason = FAILED, reason if found == FAILED else failure_reason(code, one.job.log)
            if found != FAILED:
                with contextlib.suppress(OSError, StorageError):  # the disk is full, say: the failure matters more
                    record_failure(one.job, one.reason)
        one.claim.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 stop the launcher, which passes them on: the trainings save and end."""

        def note(number, frame):
            self.stopped = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, watch) -> None:
        running = [one for one in self.states if one.process is not None]
        for one in running:
            one.process.terminate()
            watch(self, "stop", one)
        for one in running:
            while one.process.poll() is None:
                time.sleep(POLL)
            found, reason = state(one.job)
            one.state, one.reason, one.process = found if found != RUNNING else INTERRUPTED, reason, None
            one.claim.close()


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Locks a job against other launchers. The system releases the lock when this process ends.

    Raises:
        Busy: another launcher has it.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    with open(job.claim, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{job.label} is being run by another launcher") from None
        yield


def discard(job: Job) -> None:
    """Deletes a result, so that the job runs again.

    Raises:
        Busy: another process has the job or its run.
    """
    with claimed(job):
        if job.evaluation:
            (job.run / job.result).unlink(missing_ok=True)
        else:
            with RunDirectory(job.run).lock():
                RunDirectory(job.run).clear()


def failure_reason(code: int, log: Path) -> str:
    """Why a process ended that did not record a reason."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    last = lines[-1].strip() if lines and not lines[-1].startswith("$ ") else "no output"
    return f"exit code {code}: {last.removeprefix('error: ')[:300]}"


def record_failure(job: Job, reason: str) -> None:
    if job.evaluation:
        write_json(job.failure, {"reason": reason})
    else:
        RunDirectory(job.run).set_status(FAILED, reason=reason)


def forget_failure(job: Job) -> None:
    """A training then resumes from its last checkpoint."""
    if job.evaluation:
        job.failure.unlink(missing_ok=True)
    else:
        RunDirectory(job.run).set_status(INTERRUPTED, reason="to be tried again")
