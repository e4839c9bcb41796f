"""Boxes move exactly with their image; scenes of digits; loaders that do not depend on how a batch is shared out."""

import dataclasses

import pytest
import torch

from dropkey.config.schema import DataConfig
from dropkey.datasets import digit_scenes
from dropkey.detection.boxes import Augment, Sample, fitted

CPU = torch.device("cpu")
DATA = DataConfig(name="digit_scenes", image_size=48, channels=1, max_train_samples=24)
AUGMENT = Augment(hflip=0.5, scales=(40, 48, 64), max_size=80, crop_scales=(44, 50), crop_sides=(24, 40))


@pytest.fixture(scope="module")
def scenes():
    return digit_scenes.read(DATA, 0)


# ------------------------------------------------------------------------------------------------------ augmentation

BOXES = torch.tensor([[2.0, 3, 10, 7], [12, 8, 15, 18], [17, 0, 24, 5]])


def painted() -> Sample:
    """One channel for each box, bright where the box is."""
    image = torch.zeros(3, 20, 24, dtype=torch.uint8)
    for channel, (left, top, right, bottom) in zip(image, BOXES.int().tolist(), strict=True):
        channel[top:bottom, left:right] = 255
    return Sample(image, BOXES, torch.arange(3))


def bright(image: torch.Tensor) -> torch.Tensor:
    """The rectangle that is bright, of each channel that has one."""
    places = [(channel > 127).nonzero() for channel in image]
    found = [torch.cat([at.min(0).values.flip(0), at.max(0).values.flip(0) + 1]) for at in places if len(at)]
    return torch.stack(found).float()


MOVES = {
    "flip": lambda sample: sample.flipped(),
    "larger": lambda sample: sample.resized(60, 48),
    "crop within": lambda sample: sample.cropped(0, 1, 19, 23),
    "crop through boxes": lambda sample: sample.cropped(4, 5, 12, 8),
    "crop without a box": lambda sample: sample.cropped(8, 0, 12, 14),
    "all": lambda sample: sample.flipped().cropped(2, 3, 14, 20).resized(28, 40),
}


@pytest.mark.parametrize("move", MOVES)
def test_boxes_move_exactly_with_the_image(move):
    moved = MOVES[move](painted())
    torch.testing.assert_close(moved.boxes, bright(moved.image), rtol=0, atol=1e-4)
    seen = [label for label, channel in enumerate(moved.image) if (channel > 127).any()]
    assert moved.labels.tolist() == seen


def test_a_flip_twice_is_none():
    sample, twice = painted(), painted().flipped().flipped()
    assert torch.equal(sample.image, twice.image) and torch.equal(sample.boxes, twice.boxes)


def test_a_box_of_which_a_crop_leaves_nothing_is_gone():
    assert painted().cropped(0, 10, 20, 14).labels.tolist() == [1, 2]  # the first box ends where the crop begins


@pytest.mark.parametrize("seed", range(12))
def test_the_whole_augmentation_moves_boxes_with_the_image(seed):
    moved = AUGMENT(painted(), seed)
    for label, box in zip(moved.labels.tolist(), moved.boxes, strict=True):
        error = (bright(moved.image[label : label + 1])[0] - box).abs().max()
        assert error <= 1.0  # pixels: scaled boxes end between pixels


def test_augmentation_draws_all_of_its_moves():
    sizes = {AUGMENT(painted(), seed).size for seed in range(60)}
    assert {min(size) for size in sizes} >= {40, 48, 64} and len(sizes) > 10  # crops have many shapes
    assert max(max(size) for size in sizes) <= 80
    assert Augment()(painted(), 0).size == (20, 24)
    flips = [torch.equal(Augment(hflip=0.5)(painted(), seed).image, painted().image) for seed in range(40)]
    assert 8 < sum(flips) < 32


def test_sizes_are_those_of_the_official_resize():
    assert fitted((480, 640), 800, 1333) == (800, 1066)
    assert fitted((640, 427), 800, 1333) == (1199, 800)
    assert fitted((300, 900), 800, 1333) == (444, 1332)
    assert fitted((500, 500), 600, None) == (600, 600)


def test_targets_are_shares_of_the_image():
    sample = Sample(torch.zeros(1, 10, 20, dtype=torch.uint8), torch.tensor([[2.0, 1, 6, 9]]), torch.tensor([4]))
    torch.testing.assert_close(sample.targets(), torch.tensor([[0.2, 0.5, 0.2, 0.8]]))


# ------------------------------------------------------------------------------------------------ scenes of digits


def test_scenes_are_a_function_of_the_seed(scenes):
    assert digit_scenes.read(DATA, 0).fingerprint() == scenes.fingerprint()
    other = digit_scenes.read(DATA, 1)
    assert other.train.records != scenes.train.records and other.test.records == scenes.test.records


def test_each_digit_lies_within_its_box_and_nothing_outside(scenes):
    for position in range(len(scenes.train)):
        sample = scenes.train.sample(position)
        outside = sample.image[0].clone()
        for left, top, right, bottom in sample.boxes.int().tolist():
            assert 0 <= left < right <= 48 and 12 <= right - left == bottom - top <= 18
            window = sample.image[0, top:bottom, left:right]
            assert window.max() > 150
            outside[top:bottom, left:right] = 0
        assert 1 <= len(sample.boxes) <= 3 and not outside.any()


def test_digits_overlap_by_two_pixels_at_most(scenes):
    for record in scenes.test.records:
        boxes = [one["bbox"] for one in record["annotations"]]
        for number, (x, y, size, _) in enumerate(boxes):
            for left, top, other, _ in boxes[:number]:
                across = min(x + size, left + other) - max(x, left)
                down = min(y + size, top + other) - max(y, top)
                assert min(across, down) <= 2


def test_no_scan_is_in_two_splits(monkeypatch):
    used = {}

    def paste(scans, *others):
        used[len(used)] = {scan.numpy().tobytes() for scan in scans}
        return original(scans, *others)

    original = digit_scenes.paste
    monkeypatch.setattr(digit_scenes, "paste", paste)
    digit_scenes.read(DATA, 0)
    assert [len(one) for one in used.values()] == [1260, 140, 397]
    assert len(set.union(*used.values())) == 1797


def test_digits_grow_with_the_canvas_and_all_classes_occur(scenes):
    large = digit_scenes.read(dataclasses.replace(DATA, image_size=128, channels=3), 0)
    assert large.train.sample(0).image.shape == (3, 128, 128)
    assert {one["area"] >= 32**2 for record in large.test.records for one in record["annotations"]} == {True}
    labels = {one["category_id"] for record in scenes.test.records for one in record["annotations"]}
    assert labels == set(range(10)) and scenes.labels == 10


def test_annotations_outside_the_image_empty_or_of_groups_are_no_targets(scenes):
    """As the official loader does; the evaluation still knows them."""
    split = scenes.train.subset([0])
    boxes = [[-5, -5, 10, 10], [40, 40, 20, 20], [60, 3, 5, 5], [3, 3, 0, 5], [1, 1, 30, 30]]
    flags = [0, 0, 0, 0, 1]
    annotations = [
        {"bbox": b, "category_id": i, "iscrowd": f} for i, (b, f) in enumerate(zip(boxes, flags, strict=True))
    ]
    split.records[0] = {**split.records[0], "annotations": annotations}
    sample = split.sample(0)
    assert sample.labels.tolist() == [0, 1]
    assert sample.boxes.tolist() == [[0, 0, 5, 5], [40, 40, 48, 48]]


def test_pairs_follow_their_boxes_and_go_with_them():
    """Of three boxes the first is cropped away: its pairs are gone, the others point to where their boxes now are."""
    pairs = torch.tensor([[0, 1, 7], [1, 2, 8], [2, 1, 9]])
    boxes = torch.tensor([[0.0, 0, 4, 4], [8, 2, 12, 6], [10, 4, 18, 9]])
    sample = Sample(torch.zeros(1, 10, 20, dtype=torch.uint8), boxes, torch.arange(3), pairs)
    cropped = sample.flipped().cropped(0, 0, 10, 13)
    assert cropped.labels.tolist() == [1, 2]
    assert cropped.pairs.tolist() == [[0, 1, 8], [1, 0, 9]]


def test_colours_change_and_boxes_stay():
    """As torchvision's ColorJitter: each factor is drawn, and their order."""
    sample = Sample(torch.randint(60, 180, (3, 20, 24), dtype=torch.uint8), BOXES, torch.arange(3))
    jitter = Augment(color_jitter=0.4)
    found = [jitter(sample, seed) for seed in range(40)]
    assert torch.equal(found[0].image, jitter(sample, 0).image) and torch.equal(found[0].boxes, BOXES)
    means = torch.stack([one.image.float().mean() for one in found]) / sample.image.float().mean()
    assert 0.59 < means.min() < 0.75 and 1.25 < means.max() < 1.41 and found[0].image.dtype == torch.uint8
    spread = torch.stack([one.image.float().std(0).mean() for one in found]) / sample.image.float().std(0).mean()
    assert (spread / means).min() < 0.75 and (spread / means).max() > 1.25  # saturation and contrast besides
