"""Jobs as Slurm jobs, through submitit (optional: pip install submitit)."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Optional

from dropkey.errors import ConfigError
from dropkey.reproduction.slots import Slot

AT_ONCE = 100  # jobs in the queue, where jobs= does not say
REQUEUES = 1000  # time limits that a training may outlive
LEAD = 120  # seconds before the time limit at which Slurm warns, and the training saves


class Preemptible:
    """What a job does on its node: the command, as a process. When Slurm preempts it or its time is over, the training
    saves itself, and the job queues again and resumes."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.command, self.environment, self.log = command, environment, log
        self.process: Optional[subprocess.Popen] = None

    def __call__(self) -> int:
        environment = {**os.environ, **self.environment}
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(self.command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return self.process.wait()
        except KeyboardInterrupt:  # the local cluster's way to cancel; Slurm signals the training itself
            self.process.send_signal(signal.SIGTERM)
            return self.process.wait()

    def checkpoint(self):
        """Called by submitit, on Slurm's warning, while `__call__` waits."""
        import submitit

        os.kill(self.process.pid, signal.SIGTERM)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # `wait` would wait for itself: we interrupt it
        return submitit.helpers.DelayedSubmission(Preemptible(self.command, self.environment, self.log))


class Submitted:
    """A job in the queue, with the face of a process."""

    def __init__(self, job):
        self.job = job

    def poll(self) -> Optional[int]:
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # cancelled, node lost, out of memory: submitit says it in many ways
            print(f"job {self.job.job_id}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            return 1

    def terminate(self) -> None:
        self.job.cancel(check=False)


def starter(parameters: dict[str, str], output: Path, gpus: int):
    """(command, environment, log) -> a submitted job.

    Args:
        parameters: submitit's, such as {"partition": "gpu", "timeout_min": "240"}; "cluster" may be "local", to try it.
        gpus: of each job.
    Raises:
        ConfigError: submitit or Slurm is missing, or it knows no such parameter.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher=slurm needs submitit: pip install submitit") from None
    values = {key: int(value) if value.isdigit() else value for key, value in parameters.items()}
    cluster = values.pop("cluster", "slurm")
    values = {"timeout_min": 24 * 60, **({"gpus_per_node": gpus} if gpus else {}), **values}
    if cluster == "slurm":
        values.setdefault("signal_delay_s", LEAD)
    named = {key if key in SHARED else f"{cluster}_{key}": value for key, value in values.items()}
    try:
        executor = submitit.AutoExecutor(output / ".slurm", cluster=cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(name="dropkey", **named)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"launcher=slurm: {' '.join(str(error).split())}") from None

    def start(command: list[str], environment: dict[str, str], log: Path) -> Submitted:
        own = {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}
        return Submitted(executor.submit(Preemptible(command, own, log.absolute())))

    return start


SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")  # any cluster's


def slots(jobs: int, gpus_per_run: int, cpus: int) -> list[Slot]:
    """Room in the queue. Which GPUs a job gets is Slurm's business; how many processes it starts is ours."""
    gpus = tuple(str(number) for number in range(gpus_per_run)) if gpus_per_run > 1 else ()
    return [Slot(gpus, max(1, cpus // gpus_per_run))] * (jobs or AT_ONCE)
