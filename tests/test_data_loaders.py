"""Loaders: order, augmentation and evaluation are exact for any processes, workers, microbatches, interruptions."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_samples import (
    HEAVY,
    LIGHT,
    MIXED,
    assert_equal,
    batches,
    counted,
    digits_config,
    folder_config,
    image_folder,
    joined,
    merged,
    write_images,
)
from dropkey.config.schema import AugmentConfig
from dropkey.data import Split, epoch_order, eval_loader, train_loader
from dropkey.data.images import resize_center_crop, to_tensor
from dropkey.datasets import load
from dropkey.errors import ConfigError, DataError

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
    batch = batches(digits_config(), replace(LIGHT, aug_repeats=2))[0]
    assert torch.equal(batch.ids[0::2], batch.ids[1::2])
    assert (batch.images[0::2] != batch.images[1::2]).flatten(1).any(1).all()


def test_length_is_whole_batches_and_batches_follow_the_order():
    data = digits_config()
    dataset = load(data)
    loader = train_loader(dataset, data, AugmentConfig(), batch_size=100, grad_accum_steps=2, seed=3)
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
@pytest.mark.parametrize(("world", "grad_accum_steps"), [(2, 1), (1, 4), (4, 1), (2, 2)])
def test_batches_do_not_depend_on_processes_and_chunks(folder, augment, world, grad_accum_steps):
    data = folder_config(folder)
    whole = batches(data, augment)
    ranks = [
        batches(data, augment, world_size=world, rank=rank, grad_accum_steps=grad_accum_steps) for rank in range(world)
    ]
    assert_equal(merged(ranks, grad_accum_steps), whole)


def test_two_processes_mix_what_one_process_mixes_in_two_chunks():
    data = digits_config()
    ranks = [batches(data, MIXED, world_size=2, rank=rank) for rank in range(2)]
    assert_equal(merged(ranks, 1), batches(data, MIXED, grad_accum_steps=2))


@pytest.mark.fault(20)
@pytest.mark.parametrize("augment", [LIGHT, HEAVY, MIXED], ids=["light", "heavy", "mixed"])
def test_batches_do_not_depend_on_workers(folder, augment):
    data = folder_config(folder, in_memory=False)
    expected = batches(data, augment)
    for workers in (1, 2):
        assert_equal(batches(replace(data, num_workers=workers), augment), expected)


@pytest.mark.parametrize("augment", [LIGHT, MIXED, replace(LIGHT, rand_augment="rand-m9-mstd0.5-inc1")])
def test_batches_do_not_depend_on_keeping_images_in_memory(folder, augment):
    data = folder_config(folder)
    assert_equal(batches(replace(data, in_memory=False), augment), batches(data, augment))


@pytest.mark.fault(2)
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("augment", [LIGHT, HEAVY, replace(MIXED, aug_repeats=3)], ids=["light", "heavy", "mixed"])
def test_resuming_within_an_epoch_continues_it(folder, augment, in_memory):
    data = folder_config(folder, in_memory=in_memory)
    whole = batches(data, augment, batch_size=4, grad_accum_steps=2)
    for start in (1, 4, 6):
        rest = batches(data, augment, batch_size=4, grad_accum_steps=2, start=start)
        assert len(rest) == 2 * (6 - start)
        if rest:
            assert_equal(rest, whole[2 * start :])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_no_trace_in_the_next(folder, workers):
    data = folder_config(folder, in_memory=False, num_workers=workers)
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


@pytest.mark.fault(20)
@pytest.mark.parametrize("augment", [LIGHT, HEAVY], ids=["light", "heavy"])
def test_epochs_seeds_and_positions_are_augmented_differently(folder, augment):
    data = folder_config(folder)
    dataset = load(data)
    one = Split(dataset.train.images, torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
    dataset = replace(dataset, train=one)  # the same image 16 times
    loaders = [train_loader(dataset, data, augment, batch_size=16, seed=seed) for seed in (0, 1)]
    shown = torch.cat([next(loader.epoch(epoch)).images for loader in loaders for epoch in (0, 1)])
    distinct = {image.numpy().tobytes() for image in shown}
    assert len(distinct) > 48  # of 64; half of the light ones are one of 50 crops and mirrors, without erasing


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [MIXED, replace(HEAVY, mixup=0.5)], ids=["mixed", "heavy"])
def test_random_state_of_the_main_process_is_left_as_found(folder, augment, workers):
    data = folder_config(folder, in_memory=False, num_workers=workers)

    def state():
        return random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()

    torch.manual_seed(3)
    before = state()
    batches(data, augment)
    list(eval_loader(load(data), "test", data, batch_size=5))
    assert state() == before


# --------------------------------------------------------------------------------------------- evaluation


def evaluated(size, batch_size, world, in_memory=True):
    """All ranks' batches, per rank."""
    dataset, data = counted(size, in_memory)
    loaders = [
        eval_loader(dataset, "test", data, batch_size=batch_size, rank=r, world_size=world) for r in range(world)
    ]
    found = [list(loader) for loader in loaders]
    assert {len(loader) for loader in loaders} == {len(part) for part in found} == {-(-size // batch_size)}
    return found


@pytest.mark.fault(18)
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
            for step in zip(*per_rank, strict=True):
                assert sum(map(len, step)) <= batch_size
                assert max(map(len, step)) - min(map(len, step)) <= 1
                assert all(batch.images.shape[1:] == (1, 4, 4) for batch in step)


def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre(folder):
    data = folder_config(
        folder, in_memory=False, image_size=8, crop_pct=0.8, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]
    )
    dataset = load(data)
    (batch,) = eval_loader(dataset, "test", data, batch_size=100)
    pixels = torch.stack([to_tensor(resize_center_crop(dataset.test.images.picture(row), 8, 0.8)) for row in range(24)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(batch.images, (pixels / 255 - mean) / std, atol=1e-5)
    one = replace(data, mean=[0.5], std=[0.25])
    (batch,) = eval_loader(dataset, "train", one, batch_size=100)
    assert batch.images.max() <= 2 and batch.images.min() >= -2


def test_an_evaluation_can_be_repeated_and_broken_off(folder):
    data = folder_config(folder, in_memory=False, num_workers=2)
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
    words = ["trainer.batch_size=10", "2 process", "trainer.grad_accum_steps=3", "multiple of 6"]
    refused(ConfigError, words, data, LIGHT, batch_size=10, world_size=2, grad_accum_steps=3)
    words = ["trainer.batch_size=6", "microbatches of 3", "mixup", "multiple of 4"]
    refused(ConfigError, words, data, MIXED, batch_size=6, world_size=2)
    assert batches(data, replace(MIXED, mixup_prob=0.0), batch_size=6, world_size=2)
    refused(ConfigError, ["rand_augment=random"], data, AugmentConfig(rand_augment="random"))


@pytest.mark.fault(24)
def test_fewer_images_than_a_batch_and_missing_splits_are_refused(folder):
    data = folder_config(folder)
    refused(DataError, ["24 images", "batch of 32", "trainer.batch_size=24"], data, LIGHT, batch_size=32)
    assert len(batches(data, LIGHT, batch_size=24)) == 1
    with pytest.raises(DataError, match=r"no val split.*val_fraction"):
        eval_loader(load(data), "val", data, batch_size=4)


@pytest.mark.fault(25)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_training_and_evaluation_with_its_name(tmp_path, workers):
    root = image_folder(tmp_path / "images")
    broken = [root / split / "b" / "004.png" for split in ("train", "test")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    data = folder_config(root, in_memory=False, num_workers=workers)
    refused(DataError, [f"cannot read image {broken[0]}"], data, HEAVY)
    with pytest.raises(DataError) as caught:
        list(eval_loader(load(data), "test", data, batch_size=5))
    assert str(broken[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_seeded_pictures_differ_from_their_neighbours(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images" / "train" / "a", 7, (16, 16))
    for place in ("train/b", "test/a", "test/b"):
        write_images(tmp_path / "images" / place, 1, (16, 16), seed=1)
    data = folder_config(tmp_path / "images")
    first = batches(data, HEAVY, seed=1)[0]
    assert len({image.numpy().tobytes() for image in first.images}) == 8
