"""Loaders: order, augmentation and evaluation are exact, whatever the processes, workers, chunks or interruptions."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import HEAVY, LIGHT, MIXED, digits_config, folder_config, image_folder, write_images
from timm.data.mixup import mixup_target

from dropkey.config.schema import AugmentConfig
from dropkey.data import Dataset, Split, epoch_order, eval_loader, load, train_loader
from dropkey.data.augment import BatchAugment, Normalize
from dropkey.data.images import Pixels, fit, to_tensor
from dropkey.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images of 15 x 20 pixels in 3 classes; the module's cache beside them."""
    root = tmp_path_factory.mktemp("loaders")
    os.environ["DROPKEY_CACHE"] = str(root / "cache")
    yield image_folder(root / "images", size=(20, 15))
    del os.environ["DROPKEY_CACHE"]


def batches(data, augment, *, batch_size=8, epoch=1, start=0, seed=5, **named):
    dataset = load(data)
    loader = train_loader(dataset, data, augment, batch_size=batch_size, seed=seed, **named)
    found = list(loader.epoch(epoch, start))
    loader.close()
    return found


def joined(parts):
    return [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "targets", "ids")]


def assert_equal(left, right):
    for one, other in zip(joined(left), joined(right), strict=True):
        assert one.shape == other.shape
        assert (one != other).sum() == 0


def merged(per_rank, accumulate):
    """The chunks of all ranks in the order of the global batch."""
    steps = len(per_rank[0]) // accumulate
    spans = [slice(step * accumulate, (step + 1) * accumulate) for step in range(steps)]
    return [batch for span in spans for rank in per_rank for batch in rank[span]]


# ------------------------------------------------------------------------------------------------- order


def test_order_is_a_permutation_that_follows_from_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert all(order.sort().values.tolist() == list(range(100)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    torch.manual_seed(9)
    assert torch.equal(epoch_order(100, 1, 1), orders[1, 1])
    assert orders[0, 0][:4].tolist() == [48, 44, 8, 1]  # other values would change every run


@pytest.mark.parametrize(("images", "repeats"), [(90, 3), (100, 3), (7, 2)])
def test_repeats_keep_the_epoch_length_and_show_fewer_images_more_often(images, repeats):
    order = epoch_order(images, 0, 0, repeats)
    times = Counter(Counter(order.tolist()).values())
    assert len(order) == images
    assert times[repeats] == images // repeats
    assert sum(times.values()) == -(-images // repeats)


def test_repeats_are_augmented_differently():
    batch = batches(digits_config(), replace(LIGHT, repeats=2))[0]
    assert torch.equal(batch.ids[0::2], batch.ids[1::2])
    assert (batch.images[0::2] != batch.images[1::2]).flatten(1).any(1).all()


def test_length_is_whole_batches_and_batches_follow_the_order():
    data = digits_config()
    dataset = load(data)
    loader = train_loader(dataset, data, AugmentConfig(), batch_size=100, accumulate=2, seed=3)
    found = list(loader.epoch(4))
    assert len(loader) == len(dataset.train) // 100 == 12
    assert [len(batch) for batch in found] == [50] * 24
    images, targets, ids = joined(found)
    assert torch.equal(ids, epoch_order(len(dataset.train), 3, 4)[:1200])
    assert torch.equal(targets, dataset.train.targets[ids])
    pixels = dataset.train.images.images[dataset.train.rows[ids]]
    assert torch.allclose(images, pixels / 255 * 2 - 1, atol=1e-6)


# ------------------------------------------------------------------------------------------ independence


@pytest.mark.parametrize("augment", [LIGHT, HEAVY], ids=["light", "heavy"])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 4), (4, 1), (2, 2)])
def test_batches_do_not_depend_on_processes_and_chunks(folder, augment, world, accumulate):
    data = folder_config(folder)
    whole = batches(data, augment)
    ranks = [batches(data, augment, world=world, rank=rank, accumulate=accumulate) for rank in range(world)]
    assert_equal(merged(ranks, accumulate), whole)


def test_two_processes_mix_what_one_process_mixes_in_two_chunks():
    data = digits_config()
    ranks = [batches(data, MIXED, world=2, rank=rank) for rank in range(2)]
    assert_equal(merged(ranks, 1), batches(data, MIXED, accumulate=2))


@pytest.mark.parametrize("augment", [LIGHT, HEAVY, MIXED], ids=["light", "heavy", "mixed"])
def test_batches_do_not_depend_on_workers(folder, augment):
    data = folder_config(folder, in_memory=False)
    expected = batches(data, augment)
    for workers in (1, 2):
        assert_equal(batches(replace(data, workers=workers), augment), expected)


@pytest.mark.parametrize("augment", [LIGHT, MIXED, replace(LIGHT, rand_augment="rand-m9-mstd0.5-inc1")])
def test_batches_do_not_depend_on_keeping_images_in_memory(folder, augment):
    data = folder_config(folder)
    assert_equal(batches(replace(data, in_memory=False), augment), batches(data, augment))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("augment", [LIGHT, HEAVY, replace(MIXED, repeats=3)], ids=["light", "heavy", "mixed"])
def test_resuming_within_an_epoch_continues_it(folder, augment, in_memory):
    data = folder_config(folder, in_memory=in_memory)
    whole = batches(data, augment, batch_size=4, accumulate=2)
    for start in (1, 4, 6):
        rest = batches(data, augment, batch_size=4, accumulate=2, start=start)
        assert len(rest) == 2 * (6 - start)
        if rest:
            assert_equal(rest, whole[2 * start :])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_no_trace_in_the_next(folder, workers):
    data = folder_config(folder, in_memory=False, workers=workers)
    loader = train_loader(load(data), data, HEAVY, batch_size=4, seed=5)
    abandoned = loader.epoch(0)
    next(abandoned)
    assert_equal(list(loader.epoch(1)), batches(data, HEAVY, batch_size=4))
    assert_equal(list(loader.epoch(2)), batches(data, HEAVY, batch_size=4, epoch=2))
    with pytest.raises(RuntimeError, match="abandoned"):
        next(abandoned)
    loader.close()
    assert_equal(list(loader.epoch(1)), batches(data, HEAVY, batch_size=4))
    loader.close()


@pytest.mark.parametrize("augment", [LIGHT, HEAVY], ids=["light", "heavy"])
def test_epochs_seeds_and_positions_are_augmented_differently(folder, augment):
    data = folder_config(folder)
    dataset = load(data)
    one = Split(dataset.train.images, torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
    dataset = replace(dataset, train=one)  # the same image 16 times
    loaders = [train_loader(dataset, data, augment, batch_size=16, seed=seed) for seed in (0, 1)]
    shown = torch.cat([next(loader.epoch(epoch)).images for loader in loaders for epoch in (0, 1)])
    distinct = {image.numpy().tobytes() for image in shown}
    assert len(distinct) > 55


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [MIXED, replace(HEAVY, mixup=0.5)], ids=["mixed", "heavy"])
def test_random_state_of_the_main_process_is_left_as_found(folder, augment, workers):
    data = folder_config(folder, in_memory=False, workers=workers)

    def state():
        return random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()

    torch.manual_seed(3)
    before = state()
    batches(data, augment)
    list(eval_loader(load(data), "test", data, batch_size=5))
    assert state() == before


# ------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize(("flip", "padding"), [(True, 0), (False, 3), (True, 3), (True, 11)])
def test_flip_and_padded_crop_equal_a_loop_over_single_images(flip, padding):
    data = digits_config(image_size=12, channels=3)
    images = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = BatchAugment(data, AugmentConfig(flip=flip, crop_padding=padding), 0, torch.device("cpu"))
    draws = augment.draw(0, 0, 40)
    expected = []
    for image, (mirror, down, right) in zip(images.numpy(), draws[:, :3].tolist()):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        window = padded[:, top : top + 12, left : left + 12]
        expected.append(torch.from_numpy((window[:, :, ::-1] if flip and mirror < 0.5 else window).copy()))
    assert torch.equal(augment(images, draws), Normalize(data, torch.device("cpu"))(torch.stack(expected)))


def test_flips_and_shifts_are_uniform():
    data = digits_config()
    draws = BatchAugment(data, LIGHT, 0, torch.device("cpu")).draw(0, 0, 20000)
    assert abs((draws[:, 0] < 0.5).double().mean() - 0.5) < 0.02
    assert ((draws[:, 1] * 5).long().bincount() / 20000 - 0.2).abs().max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_puts_noise_into_one_rectangle_of_so_many_images(channels):
    data = digits_config(image_size=32, channels=channels)
    images = torch.full((2000, channels, 32, 32), 128, dtype=torch.uint8)
    augment = BatchAugment(data, AugmentConfig(erasing=0.25), 0, torch.device("cpu"))
    result = augment(images, augment.draw(0, 0, 2000))
    changed = (result != result.new_tensor(128 / 127.5 - 1)).all(1) & ((result - 128 / 127.5 + 1).abs() > 1e-5).all(1)
    erased = changed.flatten(1).any(1)
    assert abs(erased.double().mean() - 0.25) < 0.03
    areas = []
    for mask in changed[erased]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert mask.sum() >= 0.98 * area  # a noise value may come close to the grey
        areas.append(area.item() / 1024)
    assert 0.01 < min(areas) and max(areas) < 0.36
    noise = result[changed[:, None].expand_as(result)]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(augment(images, augment.draw(0, 0, 2000)), result)


def test_mixed_targets_sum_to_one_and_are_those_of_the_mixed_images():
    data = digits_config()
    soft = batches(data, replace(MIXED, flip=False, crop_padding=0, cutmix=0.0))
    plain = batches(data, AugmentConfig())
    assert len({batch.targets.max(1).values[0].item() for batch in soft}) > len(soft) // 2  # a lambda per batch
    for mixed, batch in zip(soft, plain):
        assert mixed.targets.dtype == torch.float32
        assert torch.allclose(mixed.targets.sum(1), torch.ones(8), atol=1e-6)
        apart = (batch.targets != batch.targets.flip(0)).nonzero().squeeze(1)
        if len(apart) == 0:
            continue
        share = (mixed.targets[apart[0], batch.targets[apart[0]]] - 0.01) / 0.9
        expected = share * batch.images + (1 - share) * batch.images.flip(0)
        assert torch.allclose(mixed.images, expected, atol=1e-5)


def test_smoothing_alone_gives_soft_targets_and_nothing_gives_class_ids():
    data = digits_config()
    smooth, plain = batches(data, AugmentConfig(smoothing=0.1)), batches(data, AugmentConfig())
    assert plain[0].targets.dtype == torch.int64
    assert torch.equal(smooth[0].targets, mixup_target(plain[0].targets, 10, smoothing=0.1))
    assert torch.equal(smooth[0].images, plain[0].images)
    logits = torch.randn(8, 10)
    cross_entropy = torch.nn.functional.cross_entropy
    built_in = cross_entropy(logits, plain[0].targets, label_smoothing=0.1)
    assert torch.allclose(cross_entropy(logits, smooth[0].targets), built_in)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_survives_its_strongest_settings_on_grey_and_colour(folder, channels):
    data = folder_config(folder, channels=channels)
    for policy in ("rand-m10-n6-p1-inc1", "rand-m10-n6-p1-mstd0.5"):
        found = batches(data, AugmentConfig(rand_augment=policy), batch_size=24)
        assert found[0].images.isfinite().all()


# --------------------------------------------------------------------------------------------- evaluation


def counted(size, in_memory=True):
    """A data set whose test split has `size` images; image i has value i, class i % 3."""
    images = np.arange(size, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(4, 2).repeat(4, 3)
    split = Split(Pixels(images), torch.arange(size), torch.arange(size) % 3)
    return Dataset(split, None, split, ["a", "b", "c"], 1, 4), digits_config(image_size=4, in_memory=in_memory)


def evaluated(size, batch_size, world, in_memory=True):
    """All ranks' batches, per rank."""
    dataset, data = counted(size, in_memory)
    loaders = [eval_loader(dataset, "test", data, batch_size=batch_size, rank=r, world=world) for r in range(world)]
    found = [list(loader) for loader in loaders]
    assert {len(loader) for loader in loaders} == {len(part) for part in found} == {-(-size // batch_size)}
    return found


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_meets_every_image_once_on_any_number_of_processes(world, in_memory):
    for size in range(12, 18):
        for batch_size in range(1, 7):
            per_rank = evaluated(size, batch_size, world, in_memory)
            images, targets, ids = joined(merged(per_rank, 1))
            assert ids.tolist() == list(range(size))
            assert torch.equal(targets, ids % 3)
            assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == ids.tolist()
            for step in zip(*per_rank):
                assert sum(map(len, step)) <= batch_size
                assert max(map(len, step)) - min(map(len, step)) <= 1
                assert all(batch.images.shape[1:] == (1, 4, 4) for batch in step)


def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre(folder):
    data = folder_config(folder, in_memory=False, image_size=8, crop=0.8, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    dataset = load(data)
    (batch,) = eval_loader(dataset, "test", data, batch_size=100)
    pixels = torch.stack([to_tensor(fit(dataset.test.images.picture(row), 8, 0.8)) for row in range(24)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(batch.images, (pixels / 255 - mean) / std, atol=1e-5)
    one = replace(data, mean=[0.5], std=[0.25])
    (batch,) = eval_loader(dataset, "train", one, batch_size=100)
    assert batch.images.max() <= 2 and batch.images.min() >= -2


def test_an_evaluation_can_be_repeated_and_broken_off(folder):
    data = folder_config(folder, in_memory=False, workers=2)
    loader = eval_loader(load(data), "test", data, batch_size=5)
    first = list(loader)
    next(iter(loader))
    assert_equal(list(loader), first)
    loader.close()


# ------------------------------------------------------------------------------------------------ errors


def refused(error, words, data, augment, **named):
    with pytest.raises(error) as caught:
        batches(data, augment, **named)
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_batch_that_cannot_be_cut_is_refused_with_its_numbers():
    data = digits_config()
    words = ["trainer.batch_size=10", "2 process", "trainer.accumulate=3", "multiple of 6"]
    refused(ConfigError, words, data, LIGHT, batch_size=10, world=2, accumulate=3)
    words = ["trainer.batch_size=6", "chunks of 3", "mixup", "multiple of 4"]
    refused(ConfigError, words, data, MIXED, batch_size=6, world=2)
    assert batches(data, replace(MIXED, mix_prob=0.0), batch_size=6, world=2)
    refused(ConfigError, ["rand_augment=random"], data, AugmentConfig(rand_augment="random"))


def test_fewer_images_than_a_batch_and_missing_splits_are_refused(folder):
    data = folder_config(folder)
    refused(DataError, ["24 images", "batch of 32", "trainer.batch_size=24"], data, LIGHT, batch_size=32)
    assert len(batches(data, LIGHT, batch_size=24)) == 1
    with pytest.raises(DataError, match=r"no val split.*val_fraction"):
        eval_loader(load(data), "val", data, batch_size=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_training_and_evaluation_with_its_name(tmp_path, workers):
    root = image_folder(tmp_path / "images")
    broken = [root / split / "b" / "004.png" for split in ("train", "test")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    data = folder_config(root, in_memory=False, workers=workers)
    refused(DataError, [f"cannot read image {broken[0]}"], data, HEAVY)
    with pytest.raises(DataError) as caught:
        list(eval_loader(load(data), "test", data, batch_size=5))
    assert str(broken[1]) in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- workers


def test_workers_outlive_signals_and_end_on_close(folder):
    data = folder_config(folder, in_memory=False, workers=2)
    loader = train_loader(load(data), data, LIGHT, batch_size=2, seed=5)
    others = set(multiprocessing.active_children())
    epoch = loader.epoch(1)
    found = [next(epoch)]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for name in ("INT", "TERM"):  # from another process: our own SIGTERM would end them
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert_equal(found + list(epoch), batches(data, LIGHT, batch_size=2))
    begin = time.perf_counter()
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert time.perf_counter() - begin < 4


PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths}
from data_samples import LIGHT, folder_config
from dropkey.data import load, train_loader
data = folder_config({root!r}, in_memory=False, workers=2)
loader = train_loader(load(data), data, LIGHT, batch_size=2, seed=0)
for batch in loader.epoch(0):
    {event}
"""


@pytest.mark.parametrize("event", ["raise ValueError('as planned')", "os.killpg(0, signal.SIGINT)"])
def test_a_dying_process_takes_its_workers_along_and_they_say_nothing(folder, event):
    paths = [str(ROOT), str(ROOT / "tests")]
    program = PROGRAM.format(paths=paths, root=str(folder), event=event)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert ended.returncode not in (0, None)
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ("as planned" in ended.stderr) != ("KeyboardInterrupt" in ended.stderr)


def test_seeded_pictures_differ_from_their_neighbours(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images" / "train" / "a", 8, (16, 16))
    write_images(tmp_path / "images" / "test" / "a", 1)
    data = folder_config(tmp_path / "images")
    first = batches(data, HEAVY, seed=1)[0]
    assert len({image.numpy().tobytes() for image in first.images}) == 8
