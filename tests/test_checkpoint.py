"""Checkpoint files survive what happens to files (faults 10-14)."""

import os
import pickle
import random
import resource
import signal
import time

import pytest
import torch

from dropkey.engine import checkpoint
from dropkey.errors import StorageError


def content(number: int, size: int = 2000) -> dict:
    return {"number": number, "weights": torch.full((size,), float(number)), "names": ["a", "b"]}


def is_whole(state: dict) -> bool:
    return bool((state["weights"] == state["number"]).all())


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


@pytest.mark.parametrize("percent", [0, 1, 50, 99])
def test_a_truncated_file_is_noticed_and_the_previous_one_taken(saved, percent):
    file = saved / "last.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * percent // 100])
    said = []
    assert checkpoint.load_last(saved, said.append)["number"] == 1
    assert "going back to previous.pt" in said[0]


def test_no_flipped_bit_changes_what_is_loaded(saved):
    """Of 100 random flips each is either noticed, or in padding that holds nothing."""
    file = saved / "last.pt"
    whole, dice, noticed = file.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        state = checkpoint.load_last(saved, lambda text: None)
        noticed += state["number"] == 1
        assert is_whole(state)
    print(f"noticed {noticed} of 100 flipped bits, the others changed nothing")
    assert noticed >= 80


@pytest.mark.fault(12)
def test_two_damaged_files_end_in_one_line(saved):
    for name in ("last.pt", "previous.pt"):
        (saved / name).write_bytes(b"nothing")
    with pytest.raises(StorageError, match="no intact checkpoint is left"):
        checkpoint.load_last(saved, print)


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


def test_killed_at_any_instant_there_is_a_checkpoint_at_most_one_save_old(tmp_path):
    dice, survived, newest = random.Random(1), 0, 0
    marker = tmp_path / "finished"
    for _ in range(100):
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
    print(f"survived {survived} of 100 kills, {newest} saves")
    assert survived == 100
    assert newest > 20
    checkpoint.remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*")) == ["finished", "last.pt", "previous.pt"]
    assert not list(tmp_path.glob(".*"))


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
