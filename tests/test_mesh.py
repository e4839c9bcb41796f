"""Mesh recovery: errors by hand and against others' code; losses. What all tasks have in common: test_every_task.py and
test_task_faults.py."""

import numpy as np
import pytest
import scipy.spatial
import torch
from scipy.spatial.transform import Rotation

import runs
import task_runs
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError
from dropkey.mesh import measures
from dropkey.mesh.measures import aligned, errors, mesh_losses, project
from dropkey.mesh.samples import Body, MeshBatch

ALONE = DistContext(0, 1, torch.device("cpu"))

# ---------------------------------------------------------------------------------------------------- errors by hand


@pytest.fixture(scope="module")
def body():
    """Six vertices; the root is the first, joints are vertices 1 to 5, hips the vertices 1 and 2."""
    template = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return Body(template, torch.eye(6), [0, 1], [0, 2, 4], [0, 3]).exact()


def meshes(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(points: torch.Tensor, mirrored: bool = False, scale: float = 1.0) -> torch.Tensor:
    """Rotated about some axis, scaled and moved."""
    matrix = torch.from_numpy(Rotation.from_rotvec([0.3, -1.1, 2.0]).as_matrix())
    mirror = torch.tensor([1.0, 1.0, -1.0 if mirrored else 1.0], dtype=torch.float64)
    return scale * (points * mirror) @ matrix.T + torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)


def test_a_mesh_has_no_error_to_itself_moved(body):
    true = meshes(3)
    found = errors(true + torch.tensor([1.0, 2.0, 3.0]), true, body)
    torch.testing.assert_close(found, torch.zeros(3, 3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_turning_and_scaling_count_but_not_after_alignment(body):
    true = meshes(3)
    found = errors(turned(true, scale=1.7), true, body)
    assert (found[:, :2] > 0.5).all() and (found[:, 2] < 1e-9).all()


def test_a_mirror_image_is_no_alignment(body):
    true = meshes(3)
    assert (errors(turned(true, mirrored=True), true, body)[:, 2] > 0.1).all()


def test_each_error_is_centred_in_its_own_way(body):
    """Only the root moves, by 6 cm: to the others it looks as if all of the five moved, and joints see nothing. Only a
    hip moves, by 10: its middle moves by 5, as do the three other joints and, in the other direction, the hip."""
    true = meshes(1)
    root, hip = true.clone(), true.clone()
    root[:, 0, 0] += 0.06
    hip[:, 1, 0] += 0.10
    assert errors(root, true, body)[0].tolist() == pytest.approx([0.06 * 5 / 6, 0, 0], abs=1e-12)
    mpve, mpjpe, _ = errors(hip, true, body)[0].tolist()
    assert mpve == pytest.approx(0.10 / 6) and mpjpe == pytest.approx(0.05)


def test_alignment_is_what_scipy_finds():
    """Its Procrustes analysis allows mirror images: compared is where the best one is none."""
    one, other = meshes(20), meshes(20)
    other = turned(one) + 0.3 * meshes(20, seed=2)
    found = aligned(one, other)
    for a, b, ours in zip(one.numpy(), other.numpy(), found.numpy(), strict=True):
        _, fitted, _ = scipy.spatial.procrustes(b, a)
        size = np.linalg.norm(b - b.mean(0))
        np.testing.assert_allclose(ours, fitted * size + b.mean(0), atol=1e-9)
        rotation, _ = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))
        x = rotation.apply(a - a.mean(0))
        scale = (x * (b - b.mean(0))).sum() / (x**2).sum()
        np.testing.assert_allclose(ours, scale * x + b.mean(0), atol=1e-6)


def test_alignment_of_mirror_images_is_the_best_rotation():
    """scipy's `align_vectors` allows rotations alone."""
    one = meshes(20)
    other = turned(one, mirrored=True) + 0.1 * meshes(20, seed=2)
    for a, b, ours in zip(one.numpy(), other.numpy(), aligned(one, other).numpy(), strict=True):
        rotation, _ = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))
        x = rotation.apply(a - a.mean(0))
        np.testing.assert_allclose(ours, (x * (b - b.mean(0))).sum() / (x**2).sum() * x + b.mean(0), atol=1e-6)


def test_points_that_all_coincide_are_put_at_the_middle(body):
    found = aligned(torch.zeros(2, 5, 3), meshes(2)[:, :5].float())
    torch.testing.assert_close(found, meshes(2)[:, :5].float().mean(1, keepdim=True).expand_as(found))


# ------------------------------------------------------------------------------------------------------------ losses


def batch_of(vertices: torch.Tensor, points: torch.Tensor) -> MeshBatch:
    return MeshBatch(torch.zeros(len(vertices), 1, 8, 8), vertices, points, torch.arange(len(vertices)))


def perfect(body: Body, vertices: torch.Tensor, camera: torch.Tensor):
    """What a model would give that is right, and its batch."""
    centred = vertices - body.root(vertices)
    points = torch.cat([project(body.joints(centred), camera), torch.ones(len(vertices), 5, 1)], -1)
    levels = [centred[:, body.coarse], centred[:, body.middle], centred]
    return (body.joints(centred), levels, camera), batch_of(vertices, points)


def test_losses_vanish_where_all_is_right(body):
    found, batch = perfect(body, meshes(4), torch.tensor([[1.5, 0.1, -0.2]]).double().expand(4, 3))
    assert all(abs(value.item()) < 1e-12 for value in mesh_losses(*found, batch, body).values())


def test_losses_have_the_official_weights(body):
    (joints, levels, camera), batch = perfect(body, meshes(2), torch.tensor([[1.5, 0.1, -0.2]]).double().expand(2, 3))
    moved = joints.clone()
    moved[0, 4, 0] += 0.3  # of the first of two samples, one coordinate of 15
    found = mesh_losses(moved, levels, camera, batch, body)
    assert found["joints"].item() == pytest.approx(1000 * 0.09 / 15)
    assert found["projection"].item() == pytest.approx(100 * (1.5 * 0.3) ** 2 / 10) and found["vertices"] < 1e-12
    levels = [level + 0.2 for level in levels]  # all moved: joints are centred, but not meshes
    found = mesh_losses(joints, levels, camera, batch, body)
    assert found["vertices"].item() == pytest.approx(2 * 100 * 0.33 * 3 * 0.2) and found["joints"] < 1e-12


def test_joints_without_confidence_have_no_place_in_the_image(body):
    (joints, levels, camera), batch = perfect(body, meshes(2), torch.tensor([[1.5, 0.1, -0.2]]).double().expand(2, 3))
    batch.points[:] += torch.tensor([5.0, 5.0, -1.0])
    assert mesh_losses(joints, levels, camera, batch, body)["projection"] == 0


# ------------------------------------------------------------------------------------------------- scores of the task


@pytest.fixture(scope="module")
def opened():
    with task_runs.few():
        yield task_runs.opened("mesh")


def test_scores_are_in_millimetres(opened):
    task, data = opened
    scores = task.scores()
    batch = next(iter(task.eval_loader(data, "test", ALONE)))
    far = batch.vertices.clone()
    far[:, data.body.regressor[0].argmin()] += 0.22  # one of 220 vertices, which hardly counts in the root: 22 cm
    scores.update((far, None), batch)
    assert scores.compute(ALONE)["mpve"] == pytest.approx(1000 * 0.22 * 3**0.5 / 220, rel=1e-3)


def test_a_windowed_regularizer_finds_no_grid(tmp_path):
    words = ("regularizer=dropkey_block", "regularizer.window=3", *task_runs.WORDS["mesh"])
    with pytest.raises(ConfigError, match="keys fit neither"):
        runs.train(tmp_path, *words)


def test_the_weights_of_the_losses_are_those_of_the_paper():
    assert (measures.JOINTS, measures.VERTICES, measures.LEVELS, measures.PROJECTION) == (1000, 100, 0.33, 100)
