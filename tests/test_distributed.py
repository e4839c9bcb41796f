"""Jobs of two processes on gloo (faults 1, 8, 15-17, 20, 21), under torchrun's agent."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import distributed_run
import fault_runs
import processes
import regression_task
import runs
from dropkey.config.identity import run_directory
from dropkey.engine import checkpoint
from dropkey.engine.distributed import DistContext, StopSignal
from dropkey.errors import Interrupted
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
    assert runs.state(run)["position"]["global_step"] == 4  # that in which it came: here they meet after each step
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


@pytest.mark.fault(16)
def test_a_killed_rank_ends_the_job(tmp_path, figure):
    done, run = launch(tmp_path, event=(int(signal.SIGKILL), 5, 1))
    assert done.returncode != 0
    assert done.seconds < 60
    figure(f"rank killed: all over after {done.seconds:.0f} s, start included")
    assert run.status()["state"] in ("failed", "interrupted", "running")


def meet() -> None:
    with StopSignal():
        print("meets", flush=True)
        DistContext.start("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_whose_torchrun_is_gone_before_they_met_stops_when_asked_to(tmp_path, number):
    """torch would wait for the dead torchrun for half an hour, deaf to Python's signal handlers."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    streams = [tmp_path / "out", tmp_path / "err"]
    process = processes.start(streams, meet, env=env)
    while process.is_alive() and not (streams[0].exists() and streams[0].read_text()):
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, number)
    process.join(15)
    left = process.is_alive()
    process.kill()
    assert not left and process.exitcode == -number


def test_a_process_that_is_asked_to_stop_before_it_meets_the_others_does_not_wait_for_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal(), pytest.raises(Interrupted, match="before the first step"):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.fault(16)
def test_an_error_in_one_process_ends_the_job_and_is_printed_once(tmp_path, figure):
    done, run = launch(tmp_path, event=(-1, 5, 1))
    figure(f"rank raises: all over after {done.seconds:.0f} s, told once")
    assert done.returncode != 0
    assert done.stderr.count("error: process 1: images/broken.png cannot be read") == 1
    assert run.status()["state"] == "failed"


@pytest.mark.fault(8)
def test_another_number_of_processes_is_logged(stopped, tmp_path):
    run = copied(stopped[1], tmp_path)
    assert runs.train(tmp_path).path == run.path
    expected = "resuming with 1 processes x 1 microbatches instead of 2 x 1: same global batch"
    assert expected in (run.path / "log.txt").read_text()


def test_the_command_of_the_readme_runs_two_processes_and_a_mistake_is_reported_once(tmp_path):
    """torchrun and train.py themselves, as a user starts them; the second process comes late to the mistake."""
    late = "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(0.7)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = str(Path(__file__).parents[1] / "train.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, train, "regularizer=dropky"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: regularizer=dropky does not exist") == 1
    assert "regularizer=dropky does not exist" in done.stderr.splitlines()[-2]  # below torchrun's own thirty lines
    assert "NO_OTHER_FAILURES" in done.stderr


# ------------------------------------------------------------------------------------------ more faults: `make faults`


@pytest.mark.fault(17, full=True)
def test_the_command_itself_under_torchrun_is_started_again_when_a_rank_is_killed(tmp_path, figure):
    """Killed from outside; W&B gets the same run again."""
    words = ("trainer.epochs=15", "logger=wandb", "logger.mode=offline")
    done, whole = launch(tmp_path / "whole", *words[:1])
    assert done.returncode == 0, done.stderr
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    train = str(Path(__file__).parents[1] / "train.py")
    with open(tmp_path / "output.txt", "w") as file:
        job = subprocess.Popen(
            [*command, train, *runs.SMALL, f"output={output}", *words], stdout=file, stderr=file, cwd=tmp_path
        )
        run = RunDirectory(run_directory(runs.config(output, *words)))
        deadline = time.monotonic() + 200
        while len(run.records("epoch")) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process_of_rank(1, output), signal.SIGKILL)
        before, began = run.records("epoch")[-1]["epoch"], time.monotonic()
        assert job.wait(300) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert runs.unequal(runs.state(whole), runs.state(run)) is None
    assert runs.records(whole) == runs.records(run)
    tracked = [path.name for path in (run.path / "wandb").glob("offline-run-*")]
    assert len(tracked) == 2 and all(name.endswith(run.summary()["hash"]) for name in tracked)
    figure(f"killed in epoch {before + 1} of 15, over {time.monotonic() - began:.0f} s later, equal to the bit")


def process_of_rank(rank: int, output: Path) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, environment = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if f"output={output}".encode() in words and f"RANK={rank}".encode() in environment:
                return int(path.name)
    raise AssertionError("it is not there")


@pytest.mark.fault(18, full=True)
def test_every_size_of_a_test_split_has_the_figures_of_a_single_process(tmp_path, figure):
    found = []
    for count in (1, 2, 3):
        file = tmp_path / f"{count}.json"
        done = processes.torchrun(fault_runs.evaluate_all_sizes, file, processes=count)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(file.read_text()))
    one, *others = found
    exact = 0
    for other in others:
        for place, result in one.items():
            assert result["samples"] == int(place.split()[0])
            same = [other[place][key] == result[key] for key in ("top1", "top5", "samples", "correct")]
            exact += all(same) and other[place]["loss"] == pytest.approx(result["loss"], rel=1e-6)  # rounded logits
    figure("exact: 12 to 17 images, batches of 1 to 6, 2 and 3 processes", injected=2 * len(one), survived=exact)
    assert exact == 2 * len(one) == 72


@pytest.mark.fault(19, full=True)
def test_two_processes_drop_paths_as_two_microbatches_of_one_process(tmp_path):
    done, two = launch(tmp_path / "two", "model.drop_path=0.5")
    assert done.returncode == 0, done.stderr
    one = runs.train(tmp_path / "one", "model.drop_path=0.5", "trainer.grad_accum_steps=2")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.fault(19)
@pytest.mark.parametrize("allowed", [True, pytest.param(False, marks=pytest.mark.fault(19, full=True))])
def test_parameters_that_no_loss_uses_are_allowed_or_refused_in_one_line(allowed, tmp_path, figure):
    words = (*regression_task.OVERRIDES, "task.name=fault_runs:SparePart", "regularizer=none")
    done, run = launch(tmp_path / "two", *words, f"trainer.find_unused_parameters={str(allowed).lower()}")
    figure("unused parameters: trained where allowed, else refused in one line")
    if allowed:
        assert done.returncode == 0, done.stderr
        assert losses(run) == pytest.approx(losses(runs.train(tmp_path / "one", *words)), rel=1e-5)
    else:
        assert done.returncode == 2
        assert done.stderr.count("error: the model has parameters that no loss uses: trainer.find_unused") == 1


@pytest.mark.fault(21, full=True)
def test_six_simultaneous_starts_train_in_one_directory_once(tmp_path, figure):
    with ThreadPoolExecutor(6) as pool:
        ended = [one.result() for one in [pool.submit(processes.run, fault_runs.command, tmp_path) for _ in range(6)]]
    assert {one.returncode for one in ended} <= {0, 6} and 0 in {one.returncode for one in ended}, ended
    (path,) = tmp_path.glob("vit*")
    assert (path / "log.txt").read_text().count("epoch 3/3") == 1
    (tmp_path / "alone").mkdir()
    assert runs.records(RunDirectory(path)) == runs.records(runs.train(tmp_path / "alone"))
    figure("6 starts at once: 1 directory, trained once", injected=6)


@pytest.mark.fault(21, full=True)
def test_four_ranks_that_start_one_after_another_share_a_directory(tmp_path, figure):
    done = processes.torchrun(fault_runs.command_after_a_while, tmp_path, 0.4, processes=4)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("vit*"))) == 1
    figure("4 ranks, 0.4 s apart: 1 directory", injected=4)


@pytest.mark.fault(22, full=True)
def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_update(tmp_path, figure):
    done = processes.torchrun(fault_runs.poisoned, tmp_path)
    assert done.returncode == 4 and done.stderr.count("error: loss ") == 1
    (path,) = tmp_path.glob("vit*")
    assert RunDirectory(path).status()["state"] == "diverged"
    assert checkpoint.load(path / "checkpoints" / "last.pt")["position"]["global_step"] == 3
    first, second = json.loads((path / "diverged.json").read_text())["processes"]
    assert "nan" not in first["loss"] and second["loss"] == "nan"
    assert len({*first["sample_ids"], *second["sample_ids"]}) == 16
    figure("nan in rank 1 alone: all stop before the update, exit code 4")
