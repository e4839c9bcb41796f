"""Jobs of two processes on gloo (faults 1, 8, 15-17, 20, 21), under torchrun's agent."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_run
import processes
import runs
from dropkey.records import RunDirectory


def launch(output: Path, *overrides: str, event=None, restarts: int = 0) -> tuple[processes.Finished, RunDirectory]:
    """The finished job and its run directory."""
    done = processes.torchrun(distributed_run.main, str(output), overrides, event, restarts=restarts)
    directories = [path for path in output.iterdir() if (path / "config.yaml").exists()]
    assert len(directories) == 1, done.stderr
    return done, RunDirectory(directories[0])


def losses(run: RunDirectory) -> list[float]:
    return [record["loss"] for record in run.records("step")]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> RunDirectory:
    """DropKey in two processes, uninterrupted."""
    done, run = launch(tmp_path_factory.mktemp("two"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same job after SIGTERM to its second process at step 4."""
    return launch(tmp_path_factory.mktemp("stopped"), event=(int(signal.SIGTERM), 4, 1))


def copied(run: RunDirectory, output: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(run.path, output / run.path.name)))


@pytest.mark.fault(18)
def test_two_processes_give_the_result_of_one_with_the_same_global_batch(tmp_path):
    done, two = launch(tmp_path / "two", "regularizer=none")
    assert done.returncode == 0, done.stderr
    one = runs.train(tmp_path / "one", "regularizer=none")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two.summary()["top1"] == one.summary()["top1"]
    assert two.summary()["samples"] == one.summary()["samples"]
    assert two.correct("summary.json") == one.correct("summary.json")
    assert two.path.name == one.path.name


def test_masks_belong_to_microbatches_so_two_processes_equal_two_accumulated_microbatches(two, tmp_path):
    one = runs.train(tmp_path, "trainer.grad_accum_steps=2")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two.summary()["loss"] == pytest.approx(one.summary()["loss"], rel=1e-5)


@pytest.mark.fault(20)
def test_masks_differ_between_processes(two, tmp_path):
    """Were they the same, two processes would not equal two microbatches with masks of their own (the test above), and
    accumulating must not equal a single microbatch."""
    assert losses(two) != pytest.approx(losses(runs.train(tmp_path)), rel=1e-5)


@pytest.mark.fault(1, 15)
def test_sigterm_to_one_rank_saves_once_and_resumes_bitwise_identically(two, stopped, tmp_path):
    done, run = stopped
    assert done.returncode != 0
    assert run.status()["state"] == "interrupted"
    assert runs.state(run)["position"]["global_step"] == 4
    copied(run, tmp_path)
    done, run = launch(tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.unequal(runs.state(two), runs.state(run)) is None
    assert runs.records(two) == runs.records(run)


@pytest.mark.fault(17, 21)
def test_torchrun_restarts_a_killed_rank_and_the_result_is_bitwise_identical(two, tmp_path):
    done, run = launch(tmp_path, event=(int(signal.SIGKILL), 5, 1), restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resuming after 1 epochs" in (run.path / "log.txt").read_text()
    assert runs.unequal(runs.state(two), runs.state(run)) is None
    assert runs.records(two) == runs.records(run)
    assert run.summary()["hash"] == two.summary()["hash"]


def test_a_killed_rank_ends_the_job(tmp_path):
    done, run = launch(tmp_path, event=(int(signal.SIGKILL), 5, 1))
    assert done.returncode != 0
    assert done.seconds < 60
    assert run.status()["state"] in ("failed", "interrupted", "running")


def test_an_error_in_one_process_ends_the_job_and_is_printed_once(tmp_path):
    done, run = launch(tmp_path, event=(-1, 5, 1))
    assert done.returncode != 0
    assert done.stderr.count("error: process 1: images/broken.png cannot be read") == 1
    assert run.status()["state"] == "failed"


@pytest.mark.fault(8)
def test_another_number_of_processes_is_logged(stopped, tmp_path):
    run = copied(stopped[1], tmp_path)
    assert runs.train(tmp_path).path == run.path
    expected = "resuming with 1 processes x 1 microbatches instead of 2 x 1: same global batch"
    assert expected in (run.path / "log.txt").read_text()


def test_another_task_is_trained_and_evaluated_by_two_processes_as_by_one(tmp_path):
    """Its microbatches hold different numbers of points, so a mean of means would give another loss."""
    import regression_task

    overrides = (*regression_task.OVERRIDES, "regularizer=none", "optim=sgd")
    done, two = launch(tmp_path / "two", *overrides)
    assert done.returncode == 0, done.stderr
    one = runs.train(tmp_path / "one", *overrides)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert two.summary()["mae"] == pytest.approx(one.summary()["mae"], rel=1e-4)
    assert two.summary()["samples"] == one.summary()["samples"] == regression_task.SIZES["test"]


def test_the_command_of_the_readme_runs_two_processes_and_a_mistake_is_reported_once():
    """torchrun and train.py themselves, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = str(Path(__file__).parents[1] / "train.py")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, train, "regularizer=dropky"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: regularizer=dropky does not exist") == 1
    assert "regularizer=dropky does not exist" in done.stderr.splitlines()[-2]  # below torchrun's own thirty lines
    assert "NO_OTHER_FAILURES" in done.stderr
