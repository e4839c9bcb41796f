"""Images: conversion of every kind of file, and the cache of decoded ones."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from data_samples import folder_config, image_folder, write_images
from dropkey.data import cache
from dropkey.data.images import Files, Pixels, open_image, resize_center_crop, to_tensor
from dropkey.datasets import load

pytestmark = pytest.mark.usefixtures("own_cache")


# -------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_becomes_grey_or_rgb_of_8_bits(tmp_path, mode, channels, recwarn):
    values = np.arange(28 * 28).reshape(28, 28)
    if mode.startswith("I"):
        picture = Image.fromarray((values * 83).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        picture = Image.fromarray((values % 256).astype(np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.tif" if mode == "I" else "image.png")
    if mode == "P":
        picture.save(path, transparency=bytes(range(256)))
    else:
        picture.save(path)
    tensor = to_tensor(open_image(str(path), channels))
    assert (tensor.shape, tensor.dtype) == ((channels, 28, 28), torch.uint8)
    assert not [str(warning.message) for warning in recwarn.list]
    assert tensor.float().std() > 20


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert to_tensor(open_image(str(tmp_path / "deep.png"), 1)).flatten().tolist() == [0, 1, 128, 255]


def test_fit_leaves_exact_sizes_untouched_and_cuts_the_centre():
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    assert resize_center_crop(exact, 12) is exact
    stripes = np.zeros((10, 30), dtype=np.uint8)
    stripes[:, 10:20] = 200
    assert set(np.asarray(resize_center_crop(Image.fromarray(stripes), 10)).flatten()) == {200}
    assert resize_center_crop(Image.fromarray(stripes), 8, crop=0.8).size == (
        8,
        8,
    )  # out of 10 x 30, nothing is resized
    assert set(np.asarray(resize_center_crop(Image.fromarray(stripes), 8, crop=0.8)).flatten()) == {200}


# ------------------------------------------------------------------------------------------------- cache


def cached_file(folder):
    (path,) = folder.glob("*.npy")
    return path


def only_train(root, **changes):
    return folder_config(root, test_fraction=0.5, **changes)


def forbid_decoding(*given):
    raise AssertionError("decoded again")


def test_second_load_reads_the_cache_instead_of_the_files(tmp_path, own_cache, monkeypatch):
    root = image_folder(tmp_path / "images", ("train",), size=(20, 15))
    first = load(only_train(root)).train.images.images.clone()
    monkeypatch.setattr(cache, "_decode", forbid_decoding)
    assert torch.equal(load(only_train(root)).train.images.images, first)
    assert [path.suffix for path in sorted(own_cache.iterdir())] == [".lock", ".npy"]


def test_cached_pixels_equal_decoded_ones(tmp_path):
    root = image_folder(tmp_path / "images", ("train",), size=(20, 15))
    split = load(only_train(root, num_workers=2)).train
    files = load(only_train(root, in_memory=False)).train.images
    expected = torch.stack([to_tensor(resize_center_crop(files.picture(row), 12)) for row in range(len(files))])
    assert torch.equal(split.images.images, expected)


def test_cache_is_keyed_by_files_size_and_channels(tmp_path, own_cache):
    root = image_folder(tmp_path / "images", ("train",))
    load(only_train(root))
    for count, changes in enumerate(({"image_size": 16}, {"channels": 1}), start=2):
        load(only_train(root, **changes))
        assert len(list(own_cache.glob("*.npy"))) == count
    write_images(root / "train" / "a", 1, seed=77)  # another 000.png
    changed = load(only_train(root)).train.images.images
    assert len(list(own_cache.glob("*.npy"))) == 4
    assert torch.equal(changed[0], to_tensor(open_image(str(root / "train" / "a" / "000.png"), 3)))


@pytest.mark.parametrize("damage", ["nothing left", "half", "short", "flipped bit", "other file"])
def test_damaged_cache_is_rebuilt(tmp_path, own_cache, damage, caplog):
    root = image_folder(tmp_path / "images", ("train",))
    expected = load(only_train(root)).train.images.images.clone()
    path = cached_file(own_cache)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    cut = {"nothing left": b"", "half": good[: len(good) // 2], "short": good[:-1]}
    path.write_bytes({**cut, "flipped bit": bytes(flipped), "other file": b"PK\x03\x04" * 900}[damage])
    assert torch.equal(load(only_train(root)).train.images.images, expected)
    assert "damaged" in caplog.text
    assert path.read_bytes() == good


def test_failed_write_leaves_no_cache_file_and_does_not_stop_the_run(tmp_path, own_cache, monkeypatch, caplog):
    root = image_folder(tmp_path / "images", ("train",))

    def disk_full(file, array, **named):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", disk_full)
    assert len(load(only_train(root)).train.images.images) == 24
    assert "No space left" in caplog.text
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"]


def test_cache_directory_that_cannot_be_made_only_costs_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "file" / "below"))
    assert len(load(only_train(image_folder(tmp_path / "images", ("train",)))).train) == 12
    assert "cannot write" in caplog.text


def test_names_that_are_not_utf8_are_found_again(tmp_path):
    files = Files(tmp_path, ["a/b\udcff.png", "ä/longer name.png"], 3)
    assert [files.path(row) for row in (0, 1)] == [f"{tmp_path}/a/b\udcff.png", f"{tmp_path}/ä/longer name.png"]


def test_copies_on_a_device_are_not_sent_to_workers():
    pixels = Pixels(np.zeros((2, 1, 4, 4), dtype=np.uint8))
    assert pixels.on(torch.device("meta")).device.type == "meta"
    assert pickle.loads(pickle.dumps(pixels))._on == {}
