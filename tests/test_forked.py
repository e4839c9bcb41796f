"""Jobs of a table that are forked from a parent with torch in memory (dropkey.reproduction.forked)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from dropkey.records import RunDirectory
from dropkey.reproduction import forked
from dropkey.reproduction.runner import LocalProcess

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def job(tmp_path):
    """Starts a script of that text with the words."""

    def start(text: str, *words: str):
        script = tmp_path / "job.py"
        script.write_text(text)
        return forked.start([sys.executable, str(script), *words], ENVIRONMENT | {"ITS_OWN": "1"}, tmp_path / "log")

    start.log = tmp_path / "log"
    return start


def ended(process, seconds: float = 60) -> int:
    until = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return process.poll()


def test_a_job_has_its_words_its_environment_and_its_log(job):
    text = "import os, sys; print(sys.argv[1:], os.environ['ITS_OWN'], __name__); os.system('echo from a child')"
    assert ended(job(text, "a=1", "b=2")) == 0
    assert job.log.read_text().split("\n")[:-1] in (
        ["['a=1', 'b=2'] 1 __main__", "from a child"],
        ["from a child", "['a=1', 'b=2'] 1 __main__"],  # buffered until the end
    )


def test_the_exit_code_is_that_of_the_script(job):
    assert ended(job("import sys; sys.exit(7)")) == 7


def test_a_traceback_is_in_the_log(job):
    assert ended(job("raise ValueError('a made-up error')")) == 1
    assert "ValueError: a made-up error" in job.log.read_text()


def test_a_killed_job_tells_the_signal(job):
    assert ended(job("import os; os.kill(os.getpid(), 9)")) == -signal.SIGKILL


def test_a_job_is_in_a_session_of_its_own(job):
    """So that Ctrl-C in the terminal reaches it through the launcher only."""
    assert ended(job("import os; assert os.getsid(0) == os.getpid()")) == 0


def test_a_job_that_is_asked_to_stop_may_save_first(job):
    process = job("""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(143)))
print("ready", flush=True)
time.sleep(60)""")
    while "ready" not in (job.log.read_text() if job.log.exists() else ""):
        time.sleep(0.02)
    process.terminate()
    assert ended(process) == 143 and "saved" in job.log.read_text()


def test_a_forked_training_is_that_of_a_new_process_to_the_last_bit(tmp_path):
    found = []
    for start in (forked.start, LocalProcess):
        words = [*runs.SMALL, "trainer.epochs=1", "optim.warmup_epochs=0", f"output={tmp_path / start.__name__}"]
        process = start([sys.executable, "train.py", *words], ENVIRONMENT, tmp_path / f"{start.__name__}.log")
        assert ended(process, 120) == 0
        (path,) = (tmp_path / start.__name__).iterdir()
        found.append(RunDirectory(path))
    assert runs.unequal(*map(runs.state, found)) is None
    assert runs.records(found[0]) == runs.records(found[1])


def test_the_parent_asks_nothing_of_cuda():
    """Or its children could not use it."""
    program = """
import os, torch
os.setsid = lambda: None

def asked(*_):
    raise AssertionError("CUDA was asked")

for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, asked)
torch.cuda.device_count = torch.cuda.is_available = asked
import dropkey.commands.preload
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_few_jobs_and_torchrun_start_processes_of_their_own(tmp_path):
    assert forked.starter(forked.WORTH_IT - 1, ENVIRONMENT) is LocalProcess
    process = forked.start([sys.executable, "-c", "1", "torch.distributed.run"], ENVIRONMENT, tmp_path / "log")
    assert isinstance(process, LocalProcess) and ended(process) == 0
