"""Augmentation: each operation against a plain computation of the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from data_samples import LIGHT, MIXED, batches, digits_config, folder_config
from dropkey.config.schema import AugmentConfig
from dropkey.data.augment import BatchAugment, Normalize


@pytest.mark.parametrize("border", ["reflect", "black"])
@pytest.mark.parametrize(("hflip", "padding"), [(0.5, 0), (0.0, 3), (0.5, 3), (0.8, 11)])
def test_flip_and_padded_crop_equal_a_loop_over_single_images(hflip, padding, border):
    data = digits_config(image_size=12, channels=3)
    images = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = AugmentConfig(hflip=hflip, crop_padding=padding, border=border)
    augment = BatchAugment(data, options, 0, torch.device("cpu"))
    draws = augment.draw(0, 0, 40)
    expected = []
    for image, (mirror, down, right, _) in zip(images.numpy(), draws.tolist(), strict=True):
        mode = {"black": "constant"}.get(border, border)
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        window = padded[:, top : top + 12, left : left + 12]
        expected.append(torch.from_numpy((window[:, :, ::-1] if mirror < hflip else window).copy()))
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
    augment = BatchAugment(data, AugmentConfig(random_erasing=0.25), 0, torch.device("cpu"))
    draws = augment.draw(0, 0, 2000)
    result = augment.erase_some(augment(images, draws), draws, 0, 0)
    changed = (result != result.new_tensor(128 / 127.5 - 1)).all(1) & ((result - 128 / 127.5 + 1).abs() > 1e-5).all(1)
    erased = changed.flatten(1).any(1)
    assert abs(erased.double().mean() - 0.25) < 0.03
    areas = []
    for mask in changed[erased]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert mask.sum() >= 0.98 * area  # a noise value may come close to the grey
        areas.append(area.item() / 1024)
    assert min(areas) > 0.01 and max(areas) < 0.36  # timm's limits are 0.02 and 1/3, before rounding
    noise = result[changed[:, None].expand_as(result)]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(augment.erase_some(augment(images, draws), draws, 0, 0), result)


def test_erasing_after_mixing_leaves_the_noise_at_full_strength():
    """Before, mixup halves it with the partner."""
    data, spread = digits_config(), {}
    for late in (False, True):
        options = AugmentConfig(mixup=50.0, random_erasing=1.0, erase_mixed=late)  # weights of about a half
        plain = batches(data, replace(options, random_erasing=0.0))[0].images
        erased = batches(data, options)[0].images
        spread[late] = (erased - plain)[erased != plain].std()
    assert spread[True] > 1.3 * spread[False]


def test_random_interpolation_is_bilinear_or_bicubic_for_each_picture(folder):
    found = {}
    for name in ("bicubic", "random"):
        options = AugmentConfig(crop_scale=[0.3, 0.9], interpolation=name)
        found[name] = torch.cat([batch.images for batch in batches(folder_config(folder), options, batch_size=24)])
    same = [torch.equal(a, b) for a, b in zip(found["bicubic"], found["random"], strict=True)]
    assert 0.2 < sum(same) / len(same) < 0.8


def test_mixed_targets_sum_to_one_and_are_those_of_the_mixed_images():
    data = digits_config()
    soft = batches(data, replace(MIXED, hflip=0.0, crop_padding=0, cutmix=0.0))
    plain = batches(data, AugmentConfig())
    assert len({batch.targets.max(1).values[0].item() for batch in soft}) > len(soft) // 2  # a lambda per batch
    for mixed, batch in zip(soft, plain, strict=True):
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
    smooth, plain = batches(data, AugmentConfig(label_smoothing=0.1)), batches(data, AugmentConfig())
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


@pytest.mark.parametrize("other", [(1, 0), (0, 1)], ids=["epoch", "step"])
def test_every_epoch_and_step_draws_other_crops_and_mirrors(other):
    augment = BatchAugment(digits_config(), LIGHT, 0, torch.device("cpu"))
    assert not torch.equal(augment.draw(0, 0, 16), augment.draw(*other, 16))
