"""Checkpoint files survive what happens to files (faults 10-14)."""

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import runs
import task_runs
from dropkey.config.identity import run_directory
from dropkey.engine import checkpoint
from dropkey.errors import Interrupted, StorageError
from dropkey.records import RunDirectory


def content(number: int, size: int = 2000) -> dict:
    return {"number": number, "weights": torch.full((size,), float(number)), "names": ["a", "b"]}


def is_whole(state: dict) -> bool:
    return bool((state["weights"] == state["number"]).all())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A real run, interrupted at step 4; its previous checkpoint is of step 3, the end of the first epoch."""
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Interrupted):
            runs.train(output)
    (path,) = output.iterdir()
    return RunDirectory(path)


def step_of(state: dict) -> int:
    return state["position"]["global_step"]


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints 1 (previous) and 2 (last)."""
    for number in (1, 2):
        checkpoint.save(content(number), tmp_path / "last.pt", keep_previous=True)
    return tmp_path


def test_what_is_saved_is_loaded(saved):
    assert checkpoint.load(saved / "last.pt")["number"] == 2
    assert checkpoint.load(saved / "previous.pt")["number"] == 1


def test_a_directory_without_checkpoints_has_none(tmp_path):
    assert checkpoint.load_last(tmp_path / "nowhere", print) is None


@pytest.mark.fault(12)
@pytest.mark.parametrize("percent", [0, 1, 50, 99])
def test_a_truncated_file_is_noticed_and_the_previous_one_taken(interrupted, percent, tmp_path, figure):
    place = Path(shutil.copytree(interrupted.checkpoints, tmp_path / "checkpoints"))
    file = place / "last.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * percent // 100])
    said = []
    assert step_of(checkpoint.load_last(place, said.append)) == 3
    assert "going back to previous.pt" in said[0]
    figure("of a file cut to 0, 1, 50, 99 % the previous one is taken")


@pytest.mark.fault(12)
def test_no_flipped_bit_changes_what_is_loaded(interrupted, tmp_path, every_fault, figure):
    """Of random flips each is either noticed, or in padding that holds nothing."""
    place = Path(shutil.copytree(interrupted.checkpoints, tmp_path / "checkpoints"))
    last, previous = (checkpoint.load(place / name) for name in ("last.pt", "previous.pt"))
    file = place / "last.pt"
    whole, dice, noticed, flips = file.read_bytes(), random.Random(0), 0, 100 if every_fault else 20
    for _ in range(flips):
        damaged, said = bytearray(whole), []
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        state = checkpoint.load_last(place, said.append)
        noticed += bool(said)
        assert runs.unequal(state, previous if said else last) is None
    figure(f"{noticed} of {flips} flipped bits noticed, the others in padding", injected=flips)
    assert noticed >= 0.8 * flips


@pytest.mark.fault(12)
def test_two_damaged_files_end_in_one_line(saved):
    for name in ("last.pt", "previous.pt"):
        (saved / name).write_bytes(b"nothing")
    with pytest.raises(StorageError, match="no intact checkpoint is left"):
        checkpoint.load_last(saved, print)


@pytest.mark.fault(12, 14)
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_previous_one(interrupted, tmp_path, monkeypatch):
    """And keeps that one until there is another intact one, whenever it is killed."""
    run = RunDirectory(Path(shutil.copytree(interrupted.path, tmp_path / interrupted.path.name)))
    (run.checkpoints / "last.pt").write_bytes(b"nothing")
    replaced = []

    def killed(source, target):
        replaced.append(Path(target).name)
        if Path(target).suffix == ".pt":  # where it would be killed now
            assert checkpoint.load_last(run.checkpoints, lambda text: None)["position"]["global_step"] >= 3
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    runs.train(tmp_path)
    monkeypatch.undo()
    assert "going back to previous.pt" in (run.path / "log.txt").read_text()
    assert {"last.pt", "previous.pt"} <= set(replaced)
    whole = runs.train(tmp_path / "whole")
    assert runs.unequal(runs.state(whole), runs.state(run)) is None


@pytest.mark.fault(14)
def test_what_cannot_be_deleted_stops_no_training(interrupted, tmp_path):
    """Folders in the place of leftovers: `unlink` refuses them, to root as well."""
    run = RunDirectory(Path(shutil.copytree(interrupted.path, tmp_path / interrupted.path.name)))
    (run.checkpoints / ".last.pt.killed").mkdir()
    (run.checkpoints / "previous.pt").unlink()
    (run.checkpoints / "previous.pt").mkdir()
    assert runs.train(tmp_path).finished
    assert checkpoint.load(run.checkpoints / "best.pt")["epoch"] == run.summary()["best_epoch"]


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/payload-has-run",)


@pytest.mark.fault(13)
@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, old_format):
    file, payload = tmp_path / "last.pt", tmp_path / "ran"
    Malice.__reduce__ = lambda self: (os.system, (f"touch {payload}",))
    if old_format:
        file.write_bytes(pickle.dumps({"model": Malice()}, protocol=2))
    else:
        torch.save({"model": Malice()}, file)
    with pytest.raises(StorageError, match="is refused"):
        checkpoint.load(file)
    assert not payload.exists()


@pytest.mark.fault(10)
def test_killed_at_any_instant_there_is_a_checkpoint_at_most_one_save_old(tmp_path, every_fault, figure):
    dice, survived, newest, kills = random.Random(1), 0, 0, 100 if every_fault else 20
    marker = tmp_path / "finished"
    for _ in range(kills):
        child = os.fork()
        if child == 0:  # saves as fast as it can, noting each save that is complete
            number = newest
            while True:
                number += 1
                checkpoint.save(content(number, 20_000), tmp_path / "last.pt", keep_previous=True)
                marker.write_text(str(number))
        time.sleep(dice.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = checkpoint.load_last(tmp_path, print) if marker.exists() else None
        if state is None:  # killed before the first save was complete
            survived += not marker.exists()
            continue
        finished = int(marker.read_text() or newest)
        survived += is_whole(state) and state["number"] >= finished
        newest = state["number"]
    figure(f"{newest} saves of a process that does nothing else", injected=kills, survived=survived)
    assert survived == kills
    assert newest > kills / 5
    checkpoint.remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*")) == ["finished", "last.pt", "previous.pt"]
    assert not list(tmp_path.glob(".*"))


class Training:
    """Of many steps, a checkpoint after each, in a process that is forked from this one and can be killed."""

    def __init__(self, output: Path, task: str):
        self.words = (*task_runs.WORDS.get(task, ()), "trainer.epochs=1000", "trainer.checkpoint_minutes=1e-9")
        self.run, self.output = RunDirectory(run_directory(runs.config(output, *self.words))), output

    def start(self) -> None:
        self.child = os.fork()
        if self.child == 0:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                runs.train(self.output, *self.words)
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        assert os.waitpid(self.child, 0)[1] == signal.SIGKILL  # it was still training

    def steps(self) -> int:
        """That it has recorded; the checkpoint of a step follows its record."""
        return max((record["step"] for record in self.run.records("step")), default=0)


@pytest.fixture
def few():
    with task_runs.few():
        yield


@pytest.mark.fault(10, full=True)
@pytest.mark.parametrize(
    ("task", "lives"), [("classification", 100), ("detection", 20), ("interaction", 20), ("mesh", 20)]
)
def test_a_training_killed_around_its_saves_never_loses_more_than_a_step(few, tmp_path, task, lives, figure):
    dice, survived, oldest = random.Random(2), 0, 0
    training = Training(tmp_path / "killed", task)
    with pytest.MonkeyPatch.context() as patch:  # imports everything, for all children
        runs.on_step(patch, 2, runs.send())
        with pytest.raises(Interrupted):
            runs.train(training.output, *training.words)
    for _ in range(lives):
        before = training.run.metrics.stat().st_size
        training.start()
        if dice.random() < 0.9:  # the others die while they begin
            while training.run.metrics.stat().st_size <= before:
                time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.15))
        training.kill()
        found = checkpoint.load_last(training.run.checkpoints, print)
        oldest = max(oldest, training.steps() - step_of(found))
        survived += training.steps() - step_of(found) <= 1
    reached = step_of(found)
    figure(f"{task}: {reached} steps, oldest checkpoint {oldest} step behind", injected=lives, survived=survived)
    assert survived == lives and reached > lives / 2
    assert_equal_to_a_run_that_was_not_killed(found, Training(tmp_path / "whole", task))


def assert_equal_to_a_run_that_was_not_killed(state: dict, training: Training) -> None:
    with pytest.MonkeyPatch.context() as patch:
        runs.on_step(patch, step_of(state), runs.send())
        with pytest.raises(Interrupted):
            runs.train(training.output, *training.words)
    weights = [runs.without_clocks(one) for one in (state, checkpoint.load(training.run.checkpoints / "last.pt"))]
    assert runs.unequal(*weights) is None


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount a small tmpfs to fill")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.fault(11, full=True)
def test_a_training_on_a_disk_that_fills_up_says_so_and_goes_on_when_there_is_room(small_disk, tmp_path, figure):
    whole, survived = runs.train(tmp_path / "whole"), 0
    place = small_disk / whole.path.name
    spaces = [0, 4, 8, 16, 32, 64, 96, 128, 160, 192]  # KiB that are left; a checkpoint has some 300

    def fill(space: int) -> None:
        with open(small_disk / "ballast", "wb") as file:
            free = shutil.disk_usage(small_disk).free - 1024 * space
            file.write(bytes(max(free, 0)))

    for number, space in enumerate(spaces):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError) as full:
            runs.on_step(patch, 3 + number % 3, lambda loop, space=space: fill(space))
            runs.train(small_disk)
        message, files = str(full.value), sorted(path.name for path in (place / "checkpoints").iterdir())
        assert full.value.exit_code == 5 and str(place) in message and "No space left" in message
        assert not [name for name in files if name.startswith(".")]
        if number % 3:  # filled after the first save
            assert step_of(checkpoint.load(place / "checkpoints" / "last.pt")) == 3
        (small_disk / "ballast").unlink()
        run = runs.train(small_disk)
        assert runs.unequal(runs.state(whole), runs.state(run)) is None and runs.records(whole) == runs.records(run)
        survived += 1
        shutil.rmtree(place)
    figure("tmpfs of 2 MiB; then resumed, equal to the bit", injected=len(spaces), survived=survived)


@pytest.mark.fault(11)
def test_a_full_disk_leaves_the_old_file_and_says_what_and_where(saved):
    """RLIMIT_FSIZE stands for the full disk: writing beyond it fails in the same way."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpoint.save(content(3), saved / "last.pt", keep_previous=True)
        except StorageError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    message = os.read(read, 4000).decode()
    assert str(saved / "last.pt") in message
    assert "bytes" in message
    assert checkpoint.load(saved / "last.pt")["number"] == 2
    assert sorted(p.name for p in saved.iterdir()) == ["last.pt", "previous.pt"]
