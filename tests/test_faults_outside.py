"""What the world around a run does to it: links and pipes among the images, full and read-only disks, readers that
leave, signals, servers and workers that are gone. Each ends in one line and a documented exit code, or is passed by."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import processes
import runs
from data_samples import LIGHT, folder_config, image_folder, write_images
from dropkey import cli, evaluation, records
from dropkey.analysis.entropy import record_entropy
from dropkey.commands import predict, train
from dropkey.config import compose
from dropkey.config.check import check_evaluation
from dropkey.config.schema import DataConfig, EvalConfig
from dropkey.config.script_args import run_script
from dropkey.data import TrainLoader, cache, train_loader
from dropkey.data.images import open_image
from dropkey.datasets import load
from dropkey.engine import tracking
from dropkey.engine.distributed import StopSignal, pick_device
from dropkey.errors import ConfigError, DataError, Interrupted, StorageError
from dropkey.records import RunDirectory, replace_file, write_json
from dropkey.tasks.classification import Classification

# ------------------------------------------------------------------------------------------- links among the images


def counts(data) -> list[int]:
    dataset = load(data)
    return [len(dataset.train), len(dataset.test)]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../b"])
def test_a_link_that_leads_back_adds_no_image(tmp_path, target, in_memory):
    data = folder_config(image_folder(tmp_path / "images"), in_memory=in_memory)
    before = counts(data)
    (tmp_path / "images" / "train" / "a" / "back").symlink_to(target)
    assert counts(data) == before


def test_two_names_of_one_folder_below_a_class_are_read_once(tmp_path):
    root = image_folder(tmp_path / "images")
    write_images(tmp_path / "more", 5)
    before = counts(folder_config(root))
    for name in ("one", "two"):
        (root / "train" / "a" / name).symlink_to(tmp_path / "more")
    assert counts(folder_config(root)) == [before[0] + 5, before[1]]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("what", ["image", "folder"])
def test_an_image_of_two_splits_is_refused_with_both_names(tmp_path, what, in_memory):
    root = image_folder(tmp_path / "images")
    source = root / "train" / "b"
    (root / "test" / "b" / "again.png").symlink_to(source / "003.png") if what == "image" else (
        root / "test" / "b" / "again"
    ).symlink_to(source)
    with pytest.raises(DataError, match=r"train/b/00\d.png \(train\) and .*/test/b/.* \(test\) are the same image"):
        load(folder_config(root, in_memory=in_memory))


def test_an_image_that_is_held_out_and_kept_under_another_name_is_refused(tmp_path):
    root = image_folder(tmp_path / "images", ("",), counts=(8, 8, 8))
    for number in range(8):
        (root / "a" / f"again{number}.png").symlink_to(root / "a" / f"00{number}.png")
    with pytest.raises(DataError, match="are the same image"):
        load(folder_config(root, test_fraction=0.5))


def test_hard_links_are_files_of_their_own(tmp_path):
    root = image_folder(tmp_path / "images")
    os.link(root / "train" / "a" / "000.png", root / "test" / "a" / "linked.png")
    assert counts(folder_config(root)) == [24, 25]


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    root = image_folder(tmp_path / "images")
    for split in ("train", "test"):
        (root / split / "d").symlink_to("a")
    with pytest.raises(DataError, match="train/d leads to a folder that has its name already"):
        load(folder_config(root))


def dangling(path):
    path.symlink_to("nowhere.png")


def circular(path):
    path.symlink_to(path.name)


SPECIAL = {"a pipe": os.mkfifo, "a dangling link": dangling, "a circular link": circular}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_by_its_name_before_it_is_opened(tmp_path, kind, in_memory):
    root = image_folder(tmp_path / "images")
    SPECIAL[kind](root / "train" / "b" / "odd.png")
    with pytest.raises(DataError) as refused:
        load(folder_config(root, in_memory=in_memory))
    assert str(root / "train" / "b" / "odd.png") in str(refused.value) and "\n" not in str(refused.value)


def test_a_class_folder_that_is_a_dangling_link_is_no_missing_class(tmp_path):
    root = image_folder(tmp_path / "images")
    for split in ("train", "test"):
        (root / split / "d").symlink_to("nowhere")
    with pytest.raises(DataError, match="train/d is a link that leads nowhere"):
        load(folder_config(root))


def test_a_pipe_that_took_the_place_of_an_image_does_not_block_its_reader(tmp_path):
    os.mkfifo(tmp_path / "odd.png")
    with pytest.raises(DataError, match=r"odd\.png: it is no regular file"):
        open_image(str(tmp_path / "odd.png"), 3)


def test_a_data_set_of_one_class_is_refused(tmp_path):
    write_images(tmp_path / "train" / "only", 20)
    with pytest.raises(DataError, match=r"one class.*: only; a classifier needs two or more"):
        load(folder_config(tmp_path))


# ------------------------------------------------------------------------------------ files that somebody else placed


def test_a_link_in_the_place_of_a_lock_or_cache_file_changes_no_other_file(tmp_path, own_cache, caplog):
    data = folder_config(image_folder(tmp_path / "images"))
    expected = load(data).train.images.images.clone()
    letter = tmp_path / "letter"
    letter.write_text("dear all")
    for path in list(own_cache.iterdir()):
        path.unlink()
        path.symlink_to(letter)
    assert torch.equal(load(data).train.images.images, expected)
    assert letter.read_text() == "dear all" and "cannot lock" in caplog.text


def test_the_lock_of_a_run_is_not_taken_through_a_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), RunDirectory(tmp_path).lock():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_cache_is_made_for_its_user_alone(tmp_path, own_cache):
    load(folder_config(image_folder(tmp_path / "images")))
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700


def test_the_cache_of_another_user_is_not_used(tmp_path, own_cache, monkeypatch, caplog):
    data = folder_config(image_folder(tmp_path / "images"))
    expected = load(data).train.images.images.clone()
    files = {path: path.read_bytes() for path in own_cache.iterdir()}
    monkeypatch.setattr(os, "geteuid", lambda: own_cache.stat().st_uid + 1)
    monkeypatch.setattr(cache, "_read", None)
    assert torch.equal(load(data).train.images.images, expected)
    assert "belongs to another user" in caplog.text
    assert files == {path: path.read_bytes() for path in own_cache.iterdir()}


# ------------------------------------------------------------------------------------------------------- full disks


class Full:
    """A file on a disk that is full after 1,000 bytes."""

    def __init__(self, file):
        self.file, self.left = file, 1000

    def write(self, content) -> int:
        if len(content) > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(content)
        return self.file.write(content)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_called_so_and_only_a_file_that_was_there_is_intact(tmp_path, exists):
    path = tmp_path / "last.pt"
    if exists:
        path.write_text("old")
    with pytest.raises(StorageError) as refused:
        replace_file(path, lambda file: torch.save({"weights": torch.zeros(9999)}, Full(file)))
    message = str(refused.value)
    assert str(path) in message and "No space left on device; make room" in message and "\n" not in message
    assert ("the old file is intact" in message) == exists
    assert [file.read_text() for file in tmp_path.iterdir()] == (["old"] if exists else [])


@pytest.mark.parametrize("place", ["file/run.json", "/proc/nowhere/run.json", "loop/run.json", "x" * 300, "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    circular(tmp_path / "loop")
    with pytest.raises(StorageError) as refused:
        write_json(tmp_path / place, {})
    assert str(tmp_path / place) in str(refused.value) and "\n" not in str(refused.value)
    assert (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- decoding processes


def pictures(root, workers: int) -> TrainLoader:
    data = folder_config(root, in_memory=False, num_workers=workers)
    return train_loader(load(data), data, LIGHT, batch_size=2, seed=0)


def test_thousands_of_workers_are_refused(folder):
    with pytest.raises(ConfigError, match=r"data.num_workers=5000: at most \d+ processes .* take 2 to 8"):
        pictures(folder, 5000)


def test_more_workers_than_files_may_be_open_are_refused(folder, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (40, 40))
    with pytest.raises(ConfigError, match=r"data.num_workers=8 takes 48 files at once.*ulimit -n 4096"):
        next(pictures(folder, 8).epoch(0))


def lose_a_worker(root) -> None:
    with cli.job():
        for number, _ in enumerate(pictures(root, 2).epoch(0)):
            if number == 0:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(0.2)


@pytest.mark.fault(16)
def test_a_killed_worker_ends_in_one_line(folder):
    done = processes.run(lose_a_worker, folder)
    assert done.returncode == 3, done.stderr
    assert "DataLoader worker (pid" in done.stderr and "lower data.num_workers" in done.stderr
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.fault(15)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_exit_code_names_it(tmp_path, monkeypatch, number, code):
    runs.on_step(monkeypatch, 2, runs.send(number))
    with pytest.raises(Interrupted, match="all saved") as stopped:
        runs.train(tmp_path)
    assert stopped.value.exit_code == code
    monkeypatch.undo()
    assert runs.train(tmp_path).finished


@pytest.mark.fault(15)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_is_blocked_before_training(tmp_path, monkeypatch, number):
    """A pipe that nobody writes to stands for a hung file server."""
    os.mkfifo(tmp_path / "pipe")

    def read(task):
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        return (tmp_path / "pipe").read_bytes()

    monkeypatch.setattr(Classification, "load_data", read)
    with pytest.raises(Interrupted, match="interrupted before the first step, nothing is lost"):
        runs.train(tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    assert RunDirectory(run).state() == ("interrupted", "")


def test_a_process_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------- the edge of the commands


def in_a_job(function, *args) -> None:
    with cli.job():
        function(*args)


def train_into(output) -> None:
    with cli.command():
        in_a_job(runs.train, Path(output), *runs.ONE_EPOCH)


@pytest.mark.parametrize(
    "place", ["file", "file/below", "/proc/nowhere", "/sys", "loop", "x" * 300, "y/" * 2400, "a\0b"]
)
def test_an_output_that_cannot_be_had_is_one_line(tmp_path, place, capfd):
    (tmp_path / "file").write_text("mine")
    circular(tmp_path / "loop")
    with pytest.raises(SystemExit) as end:
        train_into(tmp_path / place)
    told = capfd.readouterr().err
    assert end.value.code in (2, 5) and told.startswith("error: ") and told.count("\n") == 1 and len(told) < 1000
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_is_deleted_in_training_is_one_line(tmp_path, monkeypatch, capfd):
    runs.on_step(monkeypatch, 2, lambda loop: shutil.rmtree(loop.run.path))
    with pytest.raises(SystemExit) as end:
        train_into(tmp_path)
    told = capfd.readouterr().err
    assert end.value.code == 5 and told.count("\n") == 1
    assert "metrics.jsonl: No such file or directory; it is missing, or was removed meanwhile" in told
    assert not list(tmp_path.rglob("status.json"))


def edge_of(lines: int, stdout: str) -> None:
    """A command whose output goes to `stdout`."""
    if stdout == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    run_script(lambda words: [print("x" * 100) for _ in range(lines)] and None)


@pytest.mark.parametrize("lines", [1, 9999])
@pytest.mark.parametrize(("stdout", "code"), [("closed pipe", 141), ("/dev/full", 5)])
def test_an_output_that_nobody_reads_or_that_is_full_is_told_at_once(lines, stdout, code):
    done = processes.run(edge_of, lines, stdout)
    assert done.returncode == code
    assert ("No space left on device" in done.stderr) == (code == 5) and done.stderr.count("\n") == (code == 5)


def train_unread(output) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.argv = ["train.py", *runs.SMALL, *runs.ONE_EPOCH, f'output="{output}"']
    train.start()


def test_a_training_goes_on_without_its_output_and_says_so_once(tmp_path):
    done = processes.run(train_unread, tmp_path)
    assert (done.returncode, done.stderr.count("the output is lost"), done.stderr.count("\n")) == (0, 1, 1)
    (run,) = tmp_path.glob("vit*")
    assert RunDirectory(run).finished and "epoch 1/1" in (run / "log.txt").read_text()


def speak(text: str) -> None:
    for name in ("stdout", "stderr"):
        setattr(sys, name, io.TextIOWrapper(getattr(sys, name).buffer, encoding="ascii"))

    def main(words):
        print(text)
        raise DataError(text)

    run_script(main)


def test_a_terminal_without_the_letters_of_a_path_shows_their_numbers():
    done = processes.run(speak, "dätä\udcff")
    assert (done.returncode, done.stdout) == (3, "d\\xe4t\\xe4\\udcff\n")
    assert done.stderr == "error: d\\xe4t\\xe4\\udcff\n"


def test_a_path_that_is_no_unicode_is_kept_in_the_log(tmp_path):
    run = runs.train(tmp_path / "odd\udcff", *runs.ONE_EPOCH)
    assert str(run.path).encode(errors="surrogateescape") in (run.path / "log.txt").read_bytes()


def test_a_result_that_cannot_be_stored_is_shown(tmp_path, monkeypatch, capsys):
    run = runs.train(tmp_path, *runs.ONE_EPOCH)

    def read_only(path, *args):
        raise StorageError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(records, "replace_file", read_only)
    capsys.readouterr()
    cfg = check_evaluation(EvalConfig(run=str(run.path)))
    with pytest.raises(StorageError, match="the result above is not stored: cannot write"):
        evaluation.evaluate_run(cfg, compose.load(run.config), run.path)
    assert capsys.readouterr().out.startswith("test   top-1 ")
    record, _ = record_entropy(run.path)
    assert record["mean"] > 0 and "is not stored: cannot write" in capsys.readouterr().err


def test_predictions_that_cannot_be_stored_are_shown(tmp_path, capsys):
    with pytest.raises(StorageError, match=r"predictions above are not stored: .*/proc/nowhere"):
        predict.store("photo.jpg,cat\n", Path("/proc/nowhere/found.csv"))
    assert capsys.readouterr().out == "photo.jpg,cat\n"


@pytest.mark.parametrize("key", ["trainer.device", "eval.device", "device"])
def test_a_missing_device_is_told_by_the_key_that_asked_for_it(key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"^{key}=cuda: torch finds no such device"):
        pick_device("cuda", key=key)


# ------------------------------------------------------------------------------------------------- Weights & Biases


def serve(answer: bytes) -> socket.socket:
    """A server that takes connections, reads a little and says `answer`, or nothing for ever."""
    server, taken = socket.create_server(("127.0.0.1", 0)), []

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(server.accept()[0])
                if answer:
                    taken[-1].recv(2**16)
                    taken[-1].sendall(answer)
                    taken[-1].close()

    threading.Thread(target=work, daemon=True).start()
    return server


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "does not answer within 5 s"),
        (b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\n\r\n", "answers with error 501"),
    ],
)
def test_a_server_that_is_no_use_leaves_an_offline_run(tmp_path, answer, reason):
    done = processes.run(track, tmp_path, answer)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout and "wandb sync" in done.stdout
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def track(directory, answer: bytes) -> None:
    server = serve(answer)
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}", WANDB_API_KEY="0" * 40)
    os.environ["HOME"] = str(directory)
    tracking.start(runs.config(directory, "logger=wandb", "logger.mode=online"), directory, print).finish(None)


def test_no_server_is_waited_for_longer_than_promised(monkeypatch):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 0.5)
    server, began = serve(b""), time.monotonic()
    with pytest.raises(TimeoutError, match="does not answer within"):
        tracking.require_answer(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - began < 3  # the import of requests is in it


def test_an_option_that_does_not_exist_is_a_mistake_of_the_config_and_not_of_the_disk(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "regularizer=dropky"])
    with pytest.raises(SystemExit) as end:
        train.start()
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("error: regularizer=dropky does not exist; did you mean dropkey?")


@pytest.mark.parametrize("words", [["--nope"], ["--cfg", "nope"], ["-c"]], ids=" ".join)
def test_an_unknown_option_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        train.start()
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and words[0] in told and "--help" in told


@pytest.mark.parametrize("name", ["os:getcwd", "builtins:dict", "test_faults_outside:no_splits"])
def test_what_reads_no_data_set_is_refused(name):
    with pytest.raises(ConfigError, match=f"data.name={name}"):
        load(DataConfig(name=name))


def no_splits(data):
    return ["a", "b"], None, None, None
