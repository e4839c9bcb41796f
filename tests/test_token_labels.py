"""Token labels: maps whose cells say where they are, so that the right target of every crop is known."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

import runs
from data_samples import HEAVY, assert_equal, batches, folder_config, image_folder, merged
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.data import token_labels as labelling
from dropkey.data.augment import Normalize
from dropkey.data.images import to_tensor
from dropkey.data.token_labels import (
    Labelled,
    LabelledFiles,
    TokenLabelPicture,
    cropped,
    moved,
    together,
    token_targets,
)
from dropkey.datasets import load
from dropkey.errors import ConfigError, DataError, Interrupted

HUGE = 50.0  # a logit whose class is certain


def numbered(rows: int, columns: int) -> torch.Tensor:
    """A map in which each cell is of the class that is its number, from 1 on."""
    ids = torch.arange(1, rows * columns + 1).view(1, rows, columns)
    return torch.stack([torch.full_like(ids, HUGE, dtype=torch.float64), ids]).half()


def picture_of(labels: torch.Tensor, cell: int) -> Image.Image:
    """Each cell as `cell` x `cell` pixels of its class's grey."""
    grey = labels[1, 0].byte().numpy()
    return Image.fromarray(grey.repeat(cell, 0).repeat(cell, 1))


def found(labels, box, side, classes):
    """The certain class of the image and of each of its tokens, as a list of rows."""
    targets = token_targets(labels[None], torch.tensor([box]), classes, side, 0.0)[0]
    assert torch.allclose(targets.sum(-1), torch.ones(len(targets)))
    return targets[1:].argmax(-1).view(side, side).tolist()


# ------------------------------------------------------------------------------------------------------- the crop


def test_the_whole_picture_has_the_cells_of_the_map():
    assert found(numbered(4, 4), [0.0, 0.0, 1.0, 1.0], 4, 17) == numbered(4, 4)[1, 0].tolist()


@pytest.mark.parametrize("left, top", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_quadrant_has_its_cells(left, top):
    """Left and top mistaken for each other would give the other corner."""
    box = [left / 2, top / 2, left / 2 + 0.5, top / 2 + 0.5]
    expected = numbered(4, 4)[1, 0, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2]
    assert found(numbered(4, 4), box, 2, 17) == expected.tolist()


def test_rows_and_columns_of_a_map_that_is_no_square_are_its_own():
    expected = numbered(4, 6)[1, 0, 2:4, 3:5]
    assert found(numbered(4, 6), [3 / 6, 2 / 4, 5 / 6, 1.0], 2, 25) == expected.tolist()


def test_between_cells_logits_are_interpolated():
    """A map whose logits are the coordinates of its cells: each token must have those of its own centre."""
    y, x = torch.meshgrid(torch.arange(18) + 0.5, torch.arange(18) + 0.5, indexing="ij")
    box = torch.tensor([[0.13, 0.31, 0.77, 0.82]])
    tokens = cropped(torch.stack([x, y])[None], box, 14)[0]
    steps = (torch.arange(14) + 0.5) / 14
    across, down = 18 * (0.13 + 0.64 * steps), 18 * (0.31 + 0.51 * steps)
    torch.testing.assert_close(tokens[1:, 0].view(14, 14), across.expand(14, 14))
    torch.testing.assert_close(tokens[1:, 1].view(14, 14), down[:, None].expand(14, 14))
    torch.testing.assert_close(tokens[0], 18 * torch.tensor([0.45, 0.565]))


def test_targets_are_softmax_of_five_logits_and_zeros_then_smoothed():
    labels = torch.randn(3, 2, 5, 6, 6)
    labels[:, 1] = torch.stack([torch.randperm(20)[:5] for _ in range(108)], 1).view(5, 3, 6, 6).transpose(0, 1)
    targets = token_targets(labels.half(), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3), 20, 6, 0.1)
    expected = torch.zeros(20)
    expected[labels[1, 1, :, 2, 3].long()] = labels.half().float()[1, 0, :, 2, 3]
    torch.testing.assert_close(targets[1, 1 + 2 * 6 + 3], expected.softmax(0) * 0.9 + 0.1 / 20)


# --------------------------------------------------------------------------------------------- moved with the picture


@pytest.mark.parametrize(
    "operation, amount",
    [
        (auto_augment.shear_x, 0.25),
        (auto_augment.shear_x, -0.3),
        (auto_augment.shear_y, 0.3),
        (auto_augment.translate_x_abs, 40),
        (auto_augment.translate_y_abs, -20),
        (auto_augment.translate_x_rel, 0.3),
        (auto_augment.translate_y_rel, 0.45),
        (auto_augment.rotate, 27.0),
        (auto_augment.rotate, -90),
        (auto_augment.solarize, 256),
    ],
)
@pytest.mark.parametrize("rows, columns", [(12, 12), (10, 14)])
def test_the_map_moves_as_pil_moves_the_picture(operation, amount, rows, columns):
    labels = numbered(rows, columns)
    picture = picture_of(labels, 21)  # odd, so that each cell has a pixel at its centre
    options = {"resample": Image.Resampling.NEAREST, "fillcolor": 0}
    after = together(operation, Labelled(picture, labels), amount, **options)
    centres = np.array(after.picture)[10::21, 10::21]
    assert after.labels[1, 0].tolist() == centres.tolist()
    assert (after.labels[0, 0] == HUGE * (after.labels[1, 0] > 0)).all()


def test_a_shear_by_one_cell_shifts_each_row_by_one_more():
    labels = numbered(4, 4)
    after = moved(labels, (1, 1, 0, 0, 1, 0), 80, 80)[1, 0]  # centre of row r: (r + 1/2) cells to the left
    before = labels[1, 0]
    after_half = moved(labels, (1, 1, -10, 0, 1, 0), 80, 80)[1, 0]
    assert after_half[0].tolist() == before[0].tolist()
    assert after_half[1].tolist() == [*before[1, 1:].tolist(), 0]
    assert after_half[2].tolist() == [*before[2, 2:].tolist(), 0, 0]
    assert after.shape == before.shape


def test_every_operation_of_rand_augment_that_moves_the_picture_moves_the_map():
    operations = set(auto_augment.NAME_TO_OP.values())
    moves = {one for one in operations if {"transform", "rotate"} & {*one.__code__.co_names}}
    assert labelling.MATRICES.keys() == moves and len(moves) == 7


class Seen(TokenLabelPicture):
    """Bilinear and bicubic pictures cannot be compared cell by cell, nearest ones can."""

    def __init__(self, data, augment):
        super().__init__(data, augment)
        self.crop.interpolation = Image.Resampling.NEAREST
        for operation in self.rand_augment.ops if self.rand_augment else ():
            operation.kwargs.update(resample=Image.Resampling.NEAREST, fillcolor=0)


@pytest.mark.parametrize("key", range(8))
def test_targets_show_what_the_picture_shows(key):
    """Through mirror, three moves and crop: of a fine map of large fields, each token has what the picture shows."""
    labels = numbered(3, 4)
    picture = picture_of(labels, 60).point(lambda grey: 20 * grey)
    fine = labels.repeat_interleave(30, -1).repeat_interleave(30, -2)
    policy = "rand-m9-n3-p1-mstd0.5"
    transform = Seen(
        folder_config(Path("."), image_size=240, channels=1),
        replace(HEAVY, crop_scale=[0.3, 0.9], rand_augment=policy),
    )
    moves = [op for op in transform.rand_augment.ops if op.aug_fn.args[0] in labelling.MATRICES]
    transform.rand_augment.ops = moves
    transform.rand_augment.choice_weights = None
    shown, moved_labels, box = transform(Labelled(picture, fine), (0, key))
    targets = token_targets(moved_labels[None], box[None], 13, 24, 0.0)[0, 1:]
    pixels = torch.from_numpy(np.array(shown) // 20).long().unfold(0, 10, 10).unfold(1, 10, 10).flatten(2).flatten(0, 1)
    inside = (pixels == pixels[:, :1]).all(1)  # of one field, or uncovered
    seen, bare = pixels[inside, 0], pixels[inside, 0] == 0
    assert inside.sum() > 200 and (~bare).sum() > 50
    assert (targets[inside].argmax(-1) == seen)[~bare].float().mean() > 0.98
    assert (targets[inside][bare].max(-1).values < 0.1).float().mean() > 0.9 if bare.any() else True


def test_a_mirrored_picture_has_a_mirrored_map():
    labels = numbered(4, 4)
    whole = replace(HEAVY, rand_augment=None, crop_scale=[1.0, 1.0], hflip=1.0)
    shown, after, box = Seen(folder_config(Path("."), image_size=40), whole)(
        Labelled(picture_of(labels, 10), labels), (0,)
    )
    assert after[1, 0].tolist() == labels[1, 0].flip(-1).tolist()
    assert np.array(shown)[5::10, 5::10].shape == (4, 4) and box.tolist() == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------- files and runs


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """48 images in 3 classes with a map of each training image; the folder of maps."""
    place = tmp_path_factory.mktemp("labelled")
    images, maps = image_folder(place / "images", size=(40, 30)), place / "maps"
    draw = random.Random(0)
    for path in sorted((images / "train").rglob("*.png")):
        target = maps / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        ids = torch.tensor([[draw.sample(range(3), 2) for _ in range(6)] for _ in range(6)]).permute(2, 0, 1)
        torch.save(torch.stack([torch.randn(2, 6, 6) * 3, ids]).half(), target)
    return images, maps


AUGMENT = replace(HEAVY, label_smoothing=0.1)


def read(labelled, **named):
    images, maps = labelled
    workers = named.pop("num_workers", 0)
    data = folder_config(images, image_size=32, in_memory=False, num_workers=workers, token_labels=str(maps))
    return batches(data, AUGMENT, token_side=4, **named)


def test_batches_have_a_target_for_the_image_and_each_token(labelled):
    for batch in read(labelled):
        assert batch.targets.shape == (8, 17, 3) and batch.images.shape == (8, 3, 32, 32)
        torch.testing.assert_close(batch.targets.sum(-1), torch.ones(8, 17))


def test_pictures_are_mirrored_and_augmented_together_with_their_maps_and_not_again(labelled):
    images, maps = labelled
    augment = replace(AUGMENT, hflip=1.0, random_erasing=0.0)
    data = folder_config(images, image_size=32, in_memory=False, num_workers=0, token_labels=str(maps))
    first, dataset = batches(data, augment, token_side=4, epoch=0, seed=5)[0], load(data)
    store, transform = LabelledFiles(dataset.train, maps, 3), TokenLabelPicture(data, augment)
    rows = dataset.train.rows[first.ids].tolist()
    shown = [transform(store.picture(row), (5, "augment picture", 0, place))[0] for place, row in enumerate(rows)]
    expected = Normalize(data, torch.device("cpu"))(torch.stack([to_tensor(one) for one in shown]))
    torch.testing.assert_close(first.images, expected)


@pytest.mark.parametrize("world, accumulate, workers", [(2, 1, 0), (1, 4, 0), (2, 2, 0), (1, 1, 2)])
def test_labels_do_not_depend_on_processes_microbatches_and_workers(labelled, world, accumulate, workers):
    named = {"world_size": world, "grad_accum_steps": accumulate, "num_workers": workers}
    ranks = [read(labelled, rank=rank, **named) for rank in range(world)]
    assert_equal(merged(ranks, accumulate), read(labelled))


def test_resuming_within_an_epoch_continues_its_labels(labelled):
    assert_equal(read(labelled, start=1), read(labelled)[1:])


def write(value):
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (Path.unlink, r"no label map .*a/003\.pt; dropkey label-maps makes"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"cannot read label map .*a/003\.pt"),
        (write(torch.zeros(2, 5, 6, 6)), r"a/003\.pt is not one of these images: it is no float16 tensor"),
        (write({"labels": 1}), r"a/003\.pt is not one of these images: it is no float16 tensor"),
        (write(torch.full((2, 2, 6, 6), 3).half()), r"it names class 3, and there are 3 from 0"),
        (write(torch.full((2, 2, 6, 6), torch.nan).half()), r"not finite"),
        (write(torch.zeros(2, 2, 7, 7).half()), r"a/003\.pt is \(2, 2, 7, 7\), others \(2, 2, 6, 6\)"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_damaged_or_other_map_is_one_line(labelled, tmp_path, damage, message, workers):
    images, maps = labelled
    shutil.copytree(maps, tmp_path / "maps")
    damage(tmp_path / "maps" / "a" / "003.pt")
    with pytest.raises(DataError, match=message) as caught:
        read((images, tmp_path / "maps"), num_workers=workers)
    assert "\n" not in str(caught.value)


VOLO = (
    *("model=volo_d1", "model.args={use_aux_head: true, use_mix_token: true}", "data=folder"),
    *("data.image_size=32", "data.in_memory=false", "data.val_fraction=0", "data.max_train_samples=null"),
    *("data.crop_pct=1", "augment=deit", "augment.mixup=0", "augment.cutmix=0", "trainer.batch_size=8"),
    *("trainer.max_steps=2", "optim.warmup_epochs=0", "model.depth=null", "model.embed_dim=null"),
    *("model.num_heads=null", "trainer.device=cpu", "data.num_workers=0"),
)


def of(labelled, *words):
    return (*VOLO, f"data.root={labelled[0]}", f"data.token_labels={labelled[1]}", *words)


def test_a_run_with_token_labels_resumes_bitwise(labelled, tiny_volo, tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole", *of(labelled))
    runs.on_step(monkeypatch, 1, runs.send())
    with pytest.raises(Interrupted):
        runs.train(tmp_path / "cut", *of(labelled, "data.num_workers=1"))
    cut = runs.train(tmp_path / "cut", *of(labelled))
    assert runs.unequal(runs.state(whole), runs.state(cut)) is None
    assert f"labels of tokens from {labelled[1]}" in (whole.path / "log.txt").read_text()


def test_other_labels_are_another_training(labelled, tiny_volo, tmp_path):
    labels = runs.state(runs.train(tmp_path, *of(labelled)))
    plain = runs.state(runs.train(tmp_path, *of(labelled, "data.token_labels=null")))
    assert not torch.equal(labels["model"]["head.weight"], plain["model"]["head.weight"])


@pytest.mark.parametrize(
    "word, message",
    [
        ("model.args.use_mix_token=false", "only VOLO with MixToken"),
        ("data.in_memory=true", "data.in_memory=false"),
        ("augment.crop_scale=null", "augment.crop_scale"),
        ("augment.mixup=0.8", "augment.mixup=0.8 does not go with"),
    ],
)
def test_what_does_not_go_with_token_labels_is_refused(labelled, word, message):
    with pytest.raises(ConfigError, match=message):
        check(compose([*of(labelled), word]))


def test_images_that_are_no_files_are_refused(tiny_volo, tmp_path):
    words = [word for word in VOLO if not word.startswith("data=")]
    with pytest.raises(ConfigError, match="maps belong to image files"):
        runs.train(tmp_path, *words, "data=digits", "data.image_size=32", f"data.token_labels={tmp_path}")
