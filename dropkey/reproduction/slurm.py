"""Jobs as Slurm jobs, through submitit (optional: pip install submitit)."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Optional

from dropkey.config.check import require
from dropkey.errors import ConfigError
from dropkey.reproduction.slots import Slot, check_counts

AT_ONCE = 100  # jobs in the queue, unless jobs= is given
REQUEUES = 1000  # time limits that a training may reach
WARNING = 120  # seconds before the time limit at which Slurm signals the training to save
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")  # known to any cluster


class Preemptible:
    """The job on its node: it runs the command as a process. When Slurm preempts it or the time limit is near, the
    training saves its state, and the job is queued again and resumes."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.command, self.environment, self.log = command, environment, log
        self.process: Optional[subprocess.Popen] = None

    def __call__(self) -> int:
        environment = {**os.environ, **self.environment}
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(self.command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return self.process.wait()
        except KeyboardInterrupt:  # how submitit's local cluster cancels; Slurm signals the training itself
            self.process.send_signal(signal.SIGTERM)
            return self.process.wait()

    def checkpoint(self):
        """Called by submitit on Slurm's warning, while `__call__` waits."""
        import submitit

        os.kill(self.process.pid, signal.SIGTERM)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # Popen.wait is held by `__call__`
        return submitit.helpers.DelayedSubmission(Preemptible(self.command, self.environment, self.log))


class SubmittedProcess:
    """A job in the queue, with the interface of a process."""

    def __init__(self, job):
        self.job = job

    def poll(self) -> Optional[int]:
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # cancelled, node lost, out of memory: submitit has an exception for each
            print(f"job {self.job.job_id}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            return 1

    def terminate(self) -> None:
        self.job.cancel(check=False)


def submitter(parameters: dict[str, str], output: Path, gpus: int):
    """A function (command, environment, log) -> submitted job.

    Args:
        parameters: of submitit, such as {"partition": "gpu", "timeout_min": "240"}; "cluster": "local" tries it here.
        gpus: of each job.
    Raises:
        ConfigError: submitit or Slurm is missing, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher=slurm needs submitit: pip install submitit") from None
    values = {
        key: int(value) if value.isascii() and value.isdigit() and len(value) < 19 else value
        for key, value in parameters.items()
    }
    cluster = values.pop("cluster", "slurm")
    values = {"timeout_min": 24 * 60, **({"gpus_per_node": gpus} if gpus else {}), **values}
    if cluster == "slurm":
        values.setdefault("signal_delay_s", WARNING)
    named = {key if key in SHARED else f"{cluster}_{key}": value for key, value in values.items()}
    try:
        executor = submitit.AutoExecutor(output / ".slurm", cluster=cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(name="dropkey", **named)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"launcher=slurm: {' '.join(str(error).split())}") from None

    def submit(command: list[str], environment: dict[str, str], log: Path) -> SubmittedProcess:
        threads = {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}
        return SubmittedProcess(executor.submit(Preemptible(command, threads, log.absolute())))

    return submit


def queue_slots(jobs: int, gpus_per_run: int, cpus: str) -> list[Slot]:
    """Places in the queue. Slurm chooses the GPUs of a job; their number decides how many processes it starts."""
    check_counts(jobs=jobs, gpus_per_run=gpus_per_run)
    good = cpus.isascii() and cpus.isdigit() and len(cpus) < 6 and int(cpus) > 0
    require(good, f"slurm.cpus_per_task={cpus} must be a number from 1")
    gpus = tuple(str(number) for number in range(gpus_per_run)) if gpus_per_run > 1 else ()
    return [Slot(gpus, max(1, int(cpus) // gpus_per_run))] * (jobs or AT_ONCE)
