"""What the world around a run does to it: links and pipes among the images, full and read-only disks, readers that
leave, signals, servers and workers that are gone. Each ends in one line and a documented exit code, or is passed by."""

import os

import pytest

from data_samples import folder_config, image_folder, write_images
from dropkey.data.images import open_image
from dropkey.datasets import load
from dropkey.errors import DataError

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
