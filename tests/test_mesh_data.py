"""The figure, augmentation, loaders, and what a folder of meshes may not hold."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import task_folders
from dropkey.config.schema import DataConfig
from dropkey.datasets import mesh_folder, stick_figures
from dropkey.engine.distributed import DistContext
from dropkey.errors import DataError
from dropkey.mesh.measures import project
from dropkey.mesh.samples import Augment, EvalLoader

ALONE = DistContext(0, 1, torch.device("cpu"))
DATA = DataConfig(name="stick_figures", image_size=32, channels=1, max_train_samples=40)


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stick_figures, "HELD_OUT", 13)
        yield stick_figures.read(DATA, 0)


# --------------------------------------------------------------------------------------------------------- the figure


def test_the_figure_is_about_a_metre_tall_with_joints_near_its_skeleton():
    body = stick_figures.body()
    height = body.template[:, 1].max() - body.template[:, 1].min()
    assert height == pytest.approx(1, abs=0.05)
    points = torch.tensor(stick_figures.POINTS)
    assert (body.regressor @ body.template - points).norm(dim=-1).max() < 0.03
    torch.testing.assert_close(body.regressor.sum(1), torch.ones(15))


def test_at_rest_nothing_moves_and_bones_keep_their_lengths():
    body = stick_figures.body()
    rest = stick_figures.pose(body.template, torch.zeros(1, 10, 3))[0]
    torch.testing.assert_close(rest, body.template)
    turns = torch.zeros(1, 10, 3)
    turns[0, 0] = torch.tensor([0.0, 2.0, 0.0])  # all turns with the first bone
    posed = stick_figures.pose(body.template, turns)[0]
    torch.testing.assert_close(torch.cdist(posed, posed), torch.cdist(rest, rest), atol=1e-3, rtol=0)


def test_a_bent_limb_moves_what_it_carries_and_nothing_else():
    body, turns = stick_figures.body(), torch.zeros(1, 10, 3)
    knee = next(number for number, bone in enumerate(stick_figures.BONES) if bone[:2] == (4, 5))
    turns[0, knee, 0] = 1.0
    moved = (stick_figures.pose(body.template, turns)[0] - body.template).norm(dim=-1)
    own = torch.arange(len(moved)) // 22 == knee
    assert moved[own].max() > 0.15 and moved[~own].max() < 0.06


def test_what_is_nearer_hides_what_is_behind():
    body, camera = stick_figures.body(), torch.tensor([[1.5, 0.0, 0.0]])
    alone = stick_figures.render(body.template[None], body.faces, camera, 32)
    assert alone[0, 16, 16] > 0 and alone[0, 0, 0] == 0
    behind = body.template.clone()
    arm = torch.arange(220) // 22 == 5  # of a limb beside the trunk, put before and behind it
    pictures = []
    for z in (-0.3, 0.3):
        moved = behind.clone()
        moved[arm] += torch.tensor([-0.33, 0.2, z])
        pictures.append(stick_figures.render(moved[None], body.faces, camera, 32))
    trunk = alone[0] > 0
    assert (pictures[0][0] != alone[0])[trunk].sum() > 5
    assert (pictures[1][0] != alone[0])[trunk].sum() < (pictures[0][0] != alone[0])[trunk].sum()


def test_joints_lie_on_the_figure_in_the_image(data):
    points, images = data.train.points, data.train.images.images[:, 0].float()
    lit = torch.nn.functional.max_pool2d(images[:, None], 3, 1, 1)
    found = torch.nn.functional.grid_sample(lit, points[:, None, :, :2], mode="nearest", align_corners=False)
    assert (points[..., :2].abs() < 1).all() and (found > 0).float().mean() > 0.97


def test_figures_follow_from_the_seed_and_fewer_are_the_first_ones(data, monkeypatch):
    monkeypatch.setattr(stick_figures, "HELD_OUT", 13)
    assert stick_figures.read(DATA, 0).fingerprint() == data.fingerprint()
    other = stick_figures.read(DATA, 1)
    assert other.fingerprint() != data.fingerprint()
    assert torch.equal(other.test.vertices, data.test.vertices) and not torch.equal(
        other.val.vertices, data.val.vertices
    )
    assert stick_figures.read(dataclasses.replace(DATA, val_fraction=0.0), 0).val is None


# ------------------------------------------------------------------------------------------- augmentation and loaders


def test_the_mesh_turns_with_the_image():
    """A figure that is turned and rendered is the rendered figure turned, but for its shading."""
    body, camera = stick_figures.body(), torch.tensor([[1.2, 0.0, 0.0]])
    vertices = stick_figures.pose(
        body.template, 0.5 * torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(0))
    )
    points = torch.cat([project(body.joints(vertices), camera), torch.ones(1, 14, 1)], -1)
    image = stick_figures.render(vertices, body.faces, camera, 96)[:, None]
    augment = Augment(rotation=30, scale=0.2)
    seed = next(seed for seed in range(99) if 0.4 < augment.draw(1, seed)[0] < 1 and augment.draw(1, seed)[1] < 0.95)
    turned, moved, flat = augment(image, vertices, points, [seed])
    scale = augment.draw(1, seed)[1]
    again = stick_figures.render(moved, body.faces, camera * torch.tensor([scale, 1, 1]), 96)[0] > 0
    overlap = (again & (turned[0, 0] > 20)).sum() / (again | (turned[0, 0] > 20)).sum()
    assert overlap > 0.85
    torch.testing.assert_close(flat[..., :2], project(body.joints(moved), camera * torch.tensor([scale, 1, 1])))


def test_colour_changes_the_image_alone():
    images, vertices, points = (
        torch.full((2, 3, 4, 4), 100, dtype=torch.uint8),
        torch.rand(2, 5, 3),
        torch.rand(2, 2, 3),
    )
    made, same, flat = Augment(colour=0.4)(images, vertices, points, [1, 2])
    torch.testing.assert_close((same, flat), (vertices, points))
    assert 60 <= made.min() < made.max() <= 140 and made.std((2, 3)).max() < 1e-3


# ----------------------------------------------------------------------------------------------------- your own folder


@pytest.fixture
def folder(tmp_path, data):
    """Ten of the figures as files."""
    return task_folders.meshes(tmp_path, data, 6, 4)


def save(folder, **arrays):
    np.savez(folder / "meshes.npz", **arrays)


def content(folder) -> dict:
    with np.load(folder / "meshes.npz") as file:
        return dict(file)


def config(folder, **keys) -> DataConfig:
    return DataConfig(**{"name": "mesh_folder", "root": str(folder), "image_size": 32, "channels": 1} | keys)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_holds_what_was_written(folder, data, in_memory, monkeypatch, tmp_path):
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "cache"))
    cfg = config(folder, in_memory=in_memory, val_fraction=0.34, num_workers=0)
    found = mesh_folder.read(cfg, 0)
    assert (len(found.train), len(found.val), len(found.test)) == (4, 2, 4)
    rows = torch.cat([found.train.rows, found.val.rows])
    assert sorted(rows.tolist()) == list(range(6)) and found.test.rows.tolist() == [6, 7, 8, 9]
    batch = next(iter(EvalLoader(found.test, cfg, 4, ALONE)))
    expected = next(iter(EvalLoader(data.train.subset(torch.arange(6, 10)), cfg, 4, ALONE)))
    for key in ("images", "vertices", "points"):
        torch.testing.assert_close(getattr(batch, key), getattr(expected, key))
    assert len(mesh_folder.read(dataclasses.replace(cfg, max_train_samples=3), 0).train) == 3


def test_points_faces_and_a_validation_split_are_optional(folder):
    arrays = content(folder)
    del arrays["points"], arrays["faces"]
    arrays["split"][0] = "val"
    save(folder, **arrays)
    found = mesh_folder.read(config(folder, in_memory=False), 0)
    assert found.val.rows.tolist() == [0] and (found.train.points == 0).all()


def change(key, value):
    def changed(folder):
        arrays = content(folder)
        arrays[key] = value(arrays[key]) if callable(value) else value
        save(folder, **arrays)

    return changed


def without(key):
    def changed(folder):
        arrays = content(folder)
        del arrays[key]
        save(folder, **arrays)

    return changed


FAULTS = {
    "no folder": (lambda folder: (folder / "meshes.npz").unlink(), "no file .*meshes.npz; docs/mesh.md"),
    "no archive": (lambda folder: (folder / "meshes.npz").write_text("x"), "damaged"),
    "cut": (lambda folder: (folder / "meshes.npz").write_bytes((folder / "meshes.npz").read_bytes()[:999]), "damaged"),
    "objects": (change("files", np.array([None] * 10)), "damaged"),
    "no template": (without("template"), "lacks the array template"),
    "no files": (without("files"), "lacks the array files"),
    "other vertices": (change("vertices", lambda old: old[:, :-1]), r"vertices is float32 of shape \(10, 219, 3\)"),
    "other joints": (change("points", lambda old: old[:, :-1]), "points is .*it must be floating-point numbers"),
    "integers": (change("template", lambda old: old.astype(int)), "template is int64"),
    "scalar": (change("template", np.float32(1)), "template is float32 of shape"),
    "fewer splits": (change("split", lambda old: old[:-1]), "split is .*it must be text, 10"),
    "not finite": (change("vertices", lambda old: old * np.nan), "vertices has a value that is no finite number"),
    "an index too large": (change("coarse", np.array([0, 220])), "coarse has indices from 0 to 220; there are 220"),
    "a hip that is none": (change("hips", np.array([0, 14])), "hips has indices from 0 to 14; there are 14"),
    "nothing coarse": (change("coarse", np.array([], dtype=int)), "coarse is empty"),
    "nothing at all": (change("files", np.array([], dtype=str)), "files is empty"),
    "another split": (change("split", np.array(["train"] * 9 + ["held"])), "split has 'held'"),
    "one image twice": (change("files", lambda old: old[[0, *range(9)]]), r"names images/0.png 2 times"),
    "no test": (change("split", np.array(["train"] * 10)), "0 for test"),
    "no image": (lambda folder: (folder / "images/3.png").unlink(), "cannot read image .*3.png"),
    "no picture": (lambda folder: (folder / "images/3.png").write_text("x"), "cannot read image .*3.png"),
    "not square": (lambda folder: Image.new("L", (32, 20)).save(folder / "images/3.png"), "32 x 20 pixels"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_file_is_one_line(folder, case):
    action, message = FAULTS[case]
    action(folder)
    with pytest.raises(DataError, match=message) as caught:
        mesh_folder.read(config(folder, in_memory=False), 0)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_too_many_samples_are_one_line(folder):
    with pytest.raises(DataError, match="no folder"):
        mesh_folder.read(config(folder / "none"), 0)
    with pytest.raises(DataError, match="max_train_samples=7"):
        mesh_folder.read(config(folder, max_train_samples=7, in_memory=False), 0)
