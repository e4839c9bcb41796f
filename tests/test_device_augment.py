"""Batched augmentation on the device gives what timm gives picture by picture: each operation, and how often."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation

from data_samples import batches, folder_config
from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data import operations
from dropkey.data.augment import TrainPicture, posterize_to_black, rand_augment, resized_crop, seeded
from dropkey.data.device_augment import ARGUMENTS, BatchRandAugment, DeviceAugment
from dropkey.data.images import to_picture, to_tensor
from dropkey.errors import ConfigError
from dropkey.seeds import derive_seed

CPU, SIZE = torch.device("cpu"), 33
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
BLURS = ("GaussianBlur", "GaussianBlurRand")
EXACT = sorted((set(ARGUMENTS) | {"AutoContrast", "Equalize", "Invert"}) - set(GEOMETRIC) - set(BLURS))


def config(channels=3, size=SIZE):
    return DataConfig(image_size=size, channels=channels, mean=[0.4914, 0.4822, 0.4465][:channels])


def samples(channels: int) -> torch.Tensor:
    """uint8 B C H W: noise, faint noise, ramps, even grey, one bright pixel."""
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (6, channels, SIZE, SIZE))
    faint = 90 + torch.randint(0, 25, (6, channels, SIZE, SIZE))
    ramp = torch.linspace(3, 251, SIZE).expand(2, channels, SIZE, SIZE).clone()
    ramp[1] = ramp[1].mT.flip(1)
    even, spot = torch.full((2, 1, channels, SIZE, SIZE), 77)
    spot[:, :, 5, 9] = 200
    return torch.cat([noise, faint, ramp.int(), even, spot]).byte()


def both(name: str, channels: int, magnitude: float = 9, interpolation: str = "bicubic"):
    """A batch after one operation, at arguments that timm draws: ours and Pillow's."""
    data, images, arguments, pictures = config(channels), samples(channels), [], []
    policy = rand_augment("rand-p1", data)
    kwargs = policy.ops[0].kwargs | {"resample": Image.Resampling[interpolation.upper()]}
    random.seed(1)
    for image in images:
        level = random.uniform(0, magnitude)
        (argument,) = LEVEL_TO_ARG[name](level, policy.ops[0].hparams) if LEVEL_TO_ARG[name] else (0,)
        function = NAME_TO_OP[name]
        if function.__name__ == "gaussian_blur_rand":
            function = NAME_TO_OP["GaussianBlur"]
        function = posterize_to_black if function.__name__ == "posterize" else function
        call = () if LEVEL_TO_ARG[name] is None else (argument,)
        pictures.append(to_tensor(function(to_picture(image.numpy()), *call, **kwargs)))
        arguments.append(1 - argument if name == "Desaturate" else argument)
    ours = BatchRandAugment(data, AugmentConfig(rand_augment="rand-p1"), CPU)
    ours.functions = [NAME_TO_OP[name].__name__]
    ours.groups = ours.grouped()
    plan = torch.tensor([[0, argument, interpolation == "bicubic"] for argument in arguments], dtype=torch.float64)
    found = images.clone()
    ours(found, plan)
    return found.int(), torch.stack(pictures).int()


# ------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EXACT)
def test_an_operation_on_pixel_values_is_pillows(name, channels):
    ours, theirs = both(name, channels, magnitude=10)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_geometric_operation_is_pillows_but_for_rounding(name, channels, interpolation):
    ours, theirs = both(name, channels, interpolation=interpolation)
    difference = (ours - theirs).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 0.001


@pytest.mark.parametrize("name", BLURS)
def test_a_blur_is_close_to_pillows(name):
    ours, theirs = both(name, 3)
    assert (ours - theirs).abs().max() <= 4 and (ours - theirs).abs().double().mean() < 0.1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_is_resized_as_pillow_does(channels, interpolation):
    images = samples(channels)
    boxes = torch.tensor([(i % 7, i % 5, 3 + 2 * (i % 12), SIZE - 5 - i) for i in range(len(images))])
    ours = operations.resized_crop(images, boxes, SIZE, torch.full((len(images),), interpolation == "bicubic"))
    resample = Image.Resampling[interpolation.upper()]
    theirs = []
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        box = to_picture(image.numpy()).crop((left, top, left + width, top + height))
        theirs.append(to_tensor(box.resize((SIZE, SIZE), resample)))
    difference = (ours.int() - torch.stack(theirs).int()).abs()
    assert difference.max() <= 2 and (difference > 0).double().mean() < 0.02


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_arguments_follow_from_the_magnitude_as_in_timm(name, monkeypatch):
    hparams = rand_augment("rand-m9", config()).ops[0].hparams
    magnitudes = torch.linspace(0, 14, 57, dtype=torch.float64)
    for draw in (0.2, 0.8):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        ours = ARGUMENTS[name](magnitudes / 10, torch.full_like(magnitudes, draw), hparams)
        theirs = [LEVEL_TO_ARG[name](one, hparams)[0] for one in magnitudes.tolist()]
        if name == "Desaturate":  # timm turns it over in the operation
            theirs = [min(1, max(0, 1 - one)) for one in theirs]
        if name == "GaussianBlurRand":
            theirs = [0.1 + (2 * one - 0.1) * draw for one in theirs]
        assert np.allclose(ours, theirs, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------- distributions


def drawn(policy: str, count: int = 40_000) -> tuple[BatchRandAugment, torch.Tensor]:
    augment = DeviceAugment(config(), AugmentConfig(rand_augment=policy), 0, CPU, crop=True)
    return augment.layers, torch.stack(augment.draw(0, 0, count), 1)  # count, layers, columns


@pytest.mark.parametrize(("policy", "happens"), [("rand-m9-mstd0.5-inc1", 0.5), ("rand-m5-n3-p0.8", 0.8)])
def test_operations_are_drawn_alike_and_happen_as_often_as_the_policy_says(policy, happens):
    part, plan = drawn(policy)
    number = plan[:, :, 0]
    assert plan.shape[1] == part.layers == (3 if "n3" in policy else 2)
    assert abs((number >= 0).double().mean() - happens) < 0.005
    share = torch.stack([(number == one).double().mean(0) for one in range(len(part.ops))])
    assert (share * len(part.ops) - happens).abs().max() < 0.05


def test_operations_with_odds_are_drawn_without_replacement_as_numpy_does():
    part, plan = drawn("rand-tweights-p1")
    count = len(part.ops)
    ours = torch.bincount((plan[:, 0, 0] * count + plan[:, 1, 0]).long(), minlength=count**2) / len(plan)
    np.random.seed(0)
    theirs = [np.random.choice(count, 2, replace=False, p=part.odds) for _ in range(len(plan))]
    theirs = np.bincount([a * count + b for a, b in theirs], minlength=count**2) / len(plan)
    assert np.abs(ours.numpy() - theirs).max() < 0.006
    assert (ours.view(count, count).diagonal() == 0).all()


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-p1", "rand-m9-mstd2-p1", "rand-m12-mmax15-mstd1-p1", "rand-m8-mstd101-p1"]
)
def test_magnitudes_have_timms_distribution(policy):
    part, plan = drawn(policy)
    number = next(i for i, one in enumerate(part.ops) if one.name == "Color")
    ours = (plan[plan[:, :, 0] == number][:, 1] - 0.1) / 0.18
    operation, seen = part.ops[number], []
    operation.aug_fn = lambda picture, factor, **unused: seen.append((factor - 0.1) / 0.18)
    random.seed(0)
    for _ in range(20_000):
        operation(None)
    at = np.linspace(0.02, 0.98, 25)
    assert np.abs(np.quantile(ours, at) - np.quantile(seen, at)).max() < 0.03 * (np.std(seen) + 4)


@pytest.mark.parametrize("scale", [[0.08, 1.0], [0.9, 1.0]])
def test_boxes_have_timms_distribution(scale):
    augment = DeviceAugment(config(size=32), AugmentConfig(crop_scale=scale), 0, CPU, crop=True)
    (ours,) = augment.draw(0, 0, 20_000)
    picture = Image.new("RGB", (32, 32))
    random.seed(0)
    theirs = [RandomResizedCropAndInterpolation.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(20_000)]
    theirs = np.array(theirs, dtype=np.float64)
    assert np.abs(ours[:, :4].numpy().mean(0) - theirs.mean(0)).max() < 0.15
    assert np.abs(ours[:, :4].numpy().std(0) - theirs.std(0)).max() < 0.15
    both = [np.prod(one[:, 2:4], 1) for one in (ours.numpy(), theirs)]
    at = np.linspace(0.05, 0.95, 19)
    assert np.abs(np.quantile(both[0], at) - np.quantile(both[1], at)).max() < 40  # pixels of 1,024
    assert ((ours[:, 2] == 32) & (ours[:, 3] == 32)).double().mean() == pytest.approx(
        (theirs[:, 2:] == 32).all(1).mean(), abs=0.01
    )
    assert (ours[:, :2] + ours[:, 2:4]).max() <= 32 and ours[:, :2].min() >= 0


def test_augmented_images_have_timms_mean_and_spread():
    data, count = config(), 1500
    options = AugmentConfig(crop_scale=[0.3, 1.0], rand_augment="rand-m9-mstd0.5-inc1")
    image = samples(3)[12]
    augment = DeviceAugment(data, options, 0, CPU, crop=True)
    ours = augment(image.repeat(count, 1, 1, 1), augment.draw(0, 0, count), slice(None)).double()
    policy, picture = rand_augment(options.rand_augment, data), to_picture(image.numpy())
    crop = RandomResizedCropAndInterpolation(SIZE, (0.3, 1.0), interpolation="bicubic")
    with seeded(0):
        theirs = torch.stack([to_tensor(policy(crop(picture))) for _ in range(count)]).double()
    assert (ours.mean(0) - theirs.mean(0)).abs().mean() < 5  # of levels; the mean's own error is 2
    assert (ours.std(0) - theirs.std(0)).abs().mean() < 5
    at = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    means = [torch.quantile(one.mean((1, 2, 3)), at) for one in (ours, theirs)]
    assert (means[0] - means[1]).abs().max() < 12


def test_interpolation_is_drawn_for_each_image_and_operation():
    for name, share in (("bicubic", 1.0), ("random", 0.5)):
        options = AugmentConfig(crop_scale=[0.3, 1.0], rand_augment="rand-m9", interpolation=name)
        plans = DeviceAugment(config(), options, 0, CPU, crop=True).draw(0, 0, 10_000)
        assert [abs(plan[:, -1].mean() - share) < 0.02 for plan in plans] == [True] * 3


# ---------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_from_a_file_is_cropped_as_timm_does(channels, interpolation):
    noise = np.random.default_rng(0).integers(60, 200, (80, 120, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert("L" if channels == 1 else "RGB")
    for box in ((3, 5, 70, 100), (0, 0, 12, 9), (40, 60, 33, 33)):
        ours = resized_crop(picture, box, SIZE, interpolation).int()
        small = picture.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        theirs = to_tensor(small.resize((SIZE, SIZE), Image.Resampling[interpolation.upper()])).int()
        assert ours.shape == (channels, SIZE, SIZE)
        assert (ours - theirs).abs().max() <= 2 and (ours - theirs).abs().double().mean() < 0.05


def test_a_picture_from_a_file_meets_timms_box(folder):
    picture, options = Image.open(folder / "train" / "a" / "000.png"), AugmentConfig(crop_scale=[0.3, 1.0])
    crop = RandomResizedCropAndInterpolation(12, (0.3, 1.0), interpolation="bicubic")
    for key in ((0, 1), (0, 2), (3, 4)):
        with seeded(derive_seed(*key)):
            theirs = to_tensor(crop(picture)).int()
        assert (TrainPicture(folder_config(folder), options)(picture, key).int() - theirs).abs().double().mean() < 1


def test_pictures_in_files_meet_the_same_operations_as_pixels_in_memory(folder):
    """Their crop alone is made where they are decoded."""
    options = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1-p1")
    found = [batches(folder_config(folder, in_memory=kept), options)[0].images for kept in (True, False)]
    assert torch.equal(*found)


def test_a_policy_that_asks_for_too_much_is_refused():
    with pytest.raises(ConfigError, match=r"rand-n40-tweights: it has 1. operations"):
        BatchRandAugment(config(), AugmentConfig(rand_augment="rand-n40-tweights"), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1-p1-n4", "rand-m9-mstd0.5-t3a-p1"])
def test_a_gpu_augments_as_the_cpu_does(policy):
    options, images = AugmentConfig(crop_scale=[0.3, 1.0], rand_augment=policy, interpolation="random"), samples(3)
    found = []
    for device in (CPU, torch.device("cuda")):
        augment = DeviceAugment(config(), options, 0, device, crop=True)
        found.append(augment(images.to(device), augment.draw(0, 0, len(images)), slice(None)).cpu().int())
    apart = (found[0] - found[1]).abs()
    assert (apart > 1).double().mean() < 0.01  # a level apart may become more where a later operation has a step
