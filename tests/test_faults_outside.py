"""What the world around a run does to it: links and pipes among the images, full and read-only disks, readers that
leave, signals, servers and workers that are gone. Each ends in one line and a documented exit code, or is passed by."""

import errno
import os
import stat

import pytest
import torch

from data_samples import folder_config, image_folder, write_images
from dropkey.data import cache
from dropkey.data.images import open_image
from dropkey.datasets import load
from dropkey.errors import DataError, StorageError
from dropkey.records import RunDirectory, replace_file, write_json

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
