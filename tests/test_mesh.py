"""Mesh recovery: errors by hand and against others' code, exact over processes; losses; the loop's promises."""

import numpy as np
import pytest
import scipy.spatial
import torch
from scipy.spatial.transform import Rotation

import mesh_run
import processes
import runs
from dropkey import evaluation, tasks
from dropkey.config.schema import EvalConfig, EvaluationConfig
from dropkey.datasets import stick_figures
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError, Interrupted
from dropkey.mesh import measures
from dropkey.mesh.measures import aligned, errors, mesh_losses, project
from dropkey.mesh.samples import Body, MeshBatch
from dropkey.records import RunDirectory

ALONE = DistContext(0, 1, torch.device("cpu"))
METRICS = ("mpve", "mpjpe", "pa_mpjpe")

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
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stick_figures, "HELD_OUT", mesh_run.HELD_OUT)
        yield


@pytest.fixture(scope="module")
def task(few, tmp_path_factory):
    return tasks.build(runs.config(tmp_path_factory.mktemp("task"), *mesh_run.WORDS))


@pytest.fixture(scope="module")
def data(task):
    found = task.load_data()
    task.body = found.body
    return found


def scored(task, data, world_size: int, batch_size: int) -> dict:
    """As so many processes would, of meshes that are off by other amounts in each sample."""
    totals, scores = 0, None
    for rank in range(world_size):
        scores = task.scores()
        for batch in task.eval_loader(data, "test", DistContext(rank, world_size, torch.device("cpu")), batch_size):
            if len(batch):
                noise = torch.stack(
                    [torch.randn(220, 3, generator=torch.Generator().manual_seed(i)) for i in batch.ids.tolist()]
                )
                scores.update((batch.vertices + 0.01 * batch.ids[:, None, None] * noise, None), batch)
        totals = totals + scores.totals
    scores.totals = totals
    return scores.compute(ALONE)


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 5), (3, 5), (3, 1)])
def test_scores_are_the_same_for_any_processes_and_batches(task, data, world_size, batch_size):
    one = scored(task, data, 1, 99)
    assert scored(task, data, world_size, batch_size) == pytest.approx(one, rel=1e-12)
    assert one["samples"] == mesh_run.HELD_OUT and one["mpve"] > one["pa_mpjpe"] > 0


def test_scores_are_in_millimetres(task, data):
    scores = task.scores()
    batch = next(iter(task.eval_loader(data, "test", ALONE)))
    far = batch.vertices.clone()
    far[:, data.body.regressor[0].argmin()] += 0.22  # one of 220 vertices, which hardly counts in the root: 22 cm
    scores.update((far, None), batch)
    assert scores.compute(ALONE)["mpve"] == pytest.approx(1000 * 0.22 * 3**0.5 / 220, rel=1e-3)


def test_monte_carlo_averages_meshes_and_cameras(task):
    one, other = (torch.rand(2, 9, 3), torch.rand(2, 3)), (torch.rand(2, 9, 3), torch.rand(2, 3))
    for mean, *each in zip(task.average([one, other]), one, other, strict=True):
        torch.testing.assert_close(mean, (each[0] + each[1]) / 2)


def test_pictures_are_the_images_of_those_samples(task, data):
    (batch,) = task.samples(data, "test", torch.tensor([5, 2]), ALONE)
    torch.testing.assert_close(task.pictures(batch) * 255, data.test.images.images[[5, 2]].float(), atol=0.01, rtol=0)
    assert torch.equal(batch.vertices, data.test.vertices[[5, 2]])


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("mesh"), *mesh_run.WORDS)


def test_a_run_says_how_far_it_is_off(finished):
    summary = finished.summary()
    assert [(metric["key"], metric["unit"]) for metric in summary["metrics"]] == [(key, "mm") for key in METRICS]
    assert summary["samples"] == mesh_run.HELD_OUT and summary["best_mpve"] > 0
    assert summary["code"].keys() >= {"task/mesh", "mesh", "dataset/stick_figures", "model/metro"}
    assert "missing" not in summary["code"].values()
    log = (finished.path / "log.txt").read_text()
    assert "dropkey (decreasing) at 3 attention layers" in log
    assert "48 training, 13 validation, 13 test images with meshes of 220 vertices and 14 joints" in log
    losses = [record["loss"] for record in finished.records("step")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("step", [2, 3], ids=["mid-epoch", "epoch end"])
def test_an_interrupted_run_resumes_bitwise_identically(finished, tmp_path, monkeypatch, step):
    """Hidden tokens and masks too."""
    with monkeypatch.context() as patch:
        runs.on_step(patch, step, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, *mesh_run.WORDS)
    resumed = runs.train(tmp_path, *mesh_run.WORDS)
    assert runs.unequal(runs.state(finished), runs.state(resumed)) is None
    assert runs.records(finished) == runs.records(resumed)


def test_two_processes_give_the_losses_and_the_errors_of_one(tmp_path, few):
    """Of two microbatches each: the tokens that are hidden follow from the place of the microbatch."""
    words = ("regularizer=none", "optim=sgd", "optim.lr=1e-3", "task.args={rotation: 20, scale: 0.1}")
    done = processes.torchrun(mesh_run.main, str(tmp_path / "two"), words)
    assert done.returncode == 0, done.stderr
    two = RunDirectory(next(path for path in (tmp_path / "two").iterdir() if (path / "config.yaml").exists()))
    one = runs.train(tmp_path / "one", *mesh_run.WORDS, *words, "trainer.grad_accum_steps=2")
    losses = [[record["loss"] for record in run.records("step")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for key in (*METRICS, "samples"):
        assert two.summary()[key] == pytest.approx(one.summary()[key], rel=1e-4)


def test_bf16_and_augmentation_train(tmp_path, few):
    words = ("trainer.amp=bf16", "task.args={rotation: 30, scale: 0.25, colour: 0.4}", "trainer.epochs=3")
    run = runs.train(tmp_path, *mesh_run.WORDS, *words)
    losses = [record["loss"] for record in run.records("step")]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"monte_carlo": 2}], ids=str)
def test_a_run_is_evaluated(finished, options):
    cfg = EvalConfig(run=str(finished.path), eval=EvaluationConfig(**options))
    result, _ = evaluation.evaluate_run(cfg, runs.config(finished.path.parent, *mesh_run.WORDS), finished.path)
    assert result["samples"] == mesh_run.HELD_OUT
    if "batch_size" in options:
        assert result["mpve"] == pytest.approx(finished.summary()["mpve"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "task=mesh model=metro_figures data=stick_figures augment.hflip=0.5": "augment.hflip=0.5 is for classification",
    "model=metro_figures data=stick_figures": "add task=mesh",
    "task=mesh model=metro_figures data=digits": "data.name=digits is none for this task",
    "task=mesh model=vit_4x64 data=stick_figures": "finds no meshes",
    "task=mesh model=metro_figures data=stick_figures model.drop_path=0.1": "no stochastic depth",
    "task=mesh model=metro_figures data=stick_figures model.embed_dim=8": "embed_dim",
    "task=mesh model=metro_figures data=stick_figures task.args.turn=3": "turn",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_one_line(words, tmp_path, few):
    none = [] if "embed_dim" in words or "vit" in words else ["model.embed_dim=null"]
    with pytest.raises(ConfigError, match=REFUSED[words]):
        cfg = runs.config(tmp_path, *none, "model.depth=null", "data.max_train_samples=8", *words.split())
        task = tasks.build(cfg)
        task.build_model(task.load_data(), pretrained=False, fused=True)


def test_a_windowed_regularizer_finds_no_grid(tmp_path, few):
    words = ("regularizer=dropkey_block", "regularizer.window=3", *mesh_run.WORDS)
    with pytest.raises(ConfigError, match="keys fit neither"):
        runs.train(tmp_path, *words)


def test_the_weights_of_the_losses_are_those_of_the_paper():
    assert (measures.JOINTS, measures.VERTICES, measures.LEVELS, measures.PROJECTION) == (1000, 100, 0.33, 100)
