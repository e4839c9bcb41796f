"""Jobs of two processes under torchrun, on gloo (faults 1, 8, 15-17, 20, 21)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from dropkey.records import RunDirectory

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parent / "distributed_run.py"


def launch(output: Path, *words: str, event: str = "0:0:0", restarts: int = 0):
    """(the finished torchrun process, its run directory, seconds it took)"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={restarts}", str(DRIVER), str(output), event, *words]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    directories = [path for path in output.iterdir() if (path / "config.yaml").exists()]
    assert len(directories) == 1, done.stderr
    return done, RunDirectory(directories[0]), time.monotonic() - began


def losses(run: RunDirectory) -> list[float]:
    return [record["loss"] for record in run.records("step")]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> RunDirectory:
    """DropKey in two processes, uninterrupted."""
    done, run, _ = launch(tmp_path_factory.mktemp("two"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(torchrun's process, run directory) of the same job after SIGTERM to its second process at step 4."""
    done, run, seconds = launch(tmp_path_factory.mktemp("stopped"), event=f"{int(signal.SIGTERM)}:4:1")
    print(f"ended {seconds:.0f} s after its start, imports included")
    return done, run


def copied(run: RunDirectory, output: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(run.path, output / run.path.name)))


def test_two_processes_give_the_result_of_one_with_the_same_global_batch(tmp_path):
    done, two, _ = launch(tmp_path / "two", "regularizer=none")
    assert done.returncode == 0, done.stderr
    one = runs.train(tmp_path / "one", "regularizer=none")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two.summary()["top1"] == one.summary()["top1"]
    assert two.summary()["samples"] == one.summary()["samples"]
    assert two.path.name == one.path.name


def test_masks_belong_to_chunks_so_two_processes_equal_two_accumulated_chunks(two, tmp_path):
    one = runs.train(tmp_path, "trainer.grad_accum_steps=2")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two.summary()["loss"] == pytest.approx(one.summary()["loss"], rel=1e-5)


def test_masks_differ_between_processes(two, tmp_path):
    """Were they the same, two processes would not equal two chunks with draws of their own (the test above), and
    accumulating must not equal a single chunk."""
    assert losses(two) != pytest.approx(losses(runs.train(tmp_path)), rel=1e-5)


def test_sigterm_to_one_rank_saves_once_and_resumes_to_the_same_bits(two, stopped, tmp_path):
    done, run = stopped
    assert done.returncode != 0
    assert run.status()["state"] == "interrupted"
    assert runs.state(run)["position"]["global_step"] == 4
    copied(run, tmp_path)
    done, run, _ = launch(tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.unequal(runs.state(two), runs.state(run)) is None
    assert runs.records(two) == runs.records(run)


def test_torchrun_restarts_a_killed_rank_and_the_result_is_the_same_to_the_bit(two, tmp_path):
    done, run, _ = launch(tmp_path, event=f"{int(signal.SIGKILL)}:5:1", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resuming after 1 epochs" in (run.path / "log.txt").read_text()
    assert runs.unequal(runs.state(two), runs.state(run)) is None
    assert runs.records(two) == runs.records(run)
    assert run.summary()["hash"] == two.summary()["hash"]


def test_a_killed_rank_ends_the_job(tmp_path):
    done, run, seconds = launch(tmp_path, event=f"{int(signal.SIGKILL)}:5:1")
    print(f"ended {seconds:.0f} s after its start, imports included")
    assert done.returncode != 0
    assert seconds < 120
    assert run.status()["state"] in ("failed", "interrupted", "running")


def test_an_error_in_one_process_ends_the_job_and_is_told_once(tmp_path):
    done, run, _ = launch(tmp_path, event="-1:5:1")
    assert done.returncode != 0
    assert done.stderr.count("error: process 1: images/broken.png cannot be read") == 1
    assert "dropkey/engine" not in done.stderr  # no traceback of ours, only torchrun's own
    assert run.status()["state"] == "failed"


def test_another_number_of_processes_is_noticed_aloud(stopped, tmp_path):
    run = copied(stopped[1], tmp_path)
    assert runs.train(tmp_path).path == run.path
    assert (
        "resuming with 1 processes x 1 microbatches instead of 2 x 1: same global batch"
        in (run.path / "log.txt").read_text()
    )


def test_a_mistake_in_the_config_is_reported_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = str(Path(__file__).parents[1] / "train.py")
    done = subprocess.run([*command, train, "regularizer=dropky"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("did you mean dropkey?") == 1
