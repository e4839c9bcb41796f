"""A trained METRO in use: the meshes it finds in images, drawn and stored, and what its joints attend to."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dropkey
import runs
import task_runs
from dropkey.analysis import map_figures, mesh_figures, trained
from dropkey.analysis.box_figures import as_pixels
from dropkey.analysis.meshes import found, look_at
from dropkey.commands import export, predict, visualize
from dropkey.datasets import stick_figures
from dropkey.errors import ConfigError
from dropkey.mesh.measures import camera_of, project
from dropkey.weights import load_weights

SIDE = 32  # pixels of an image


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stick_figures, "HELD_OUT", task_runs.HELD_OUT)
        patch.setattr(stick_figures, "TRAIN", 48)
        yield


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    return str(runs.train(tmp_path_factory.mktemp("meshes"), *task_runs.WORDS["mesh"], "trainer.ema_decay=0.5").path)


@pytest.fixture(scope="module")
def opened(run):
    return trained.open_run(run)


@pytest.fixture(scope="module")
def model(run):
    """Loaded where the data cannot be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stick_figures, "read", None)
        return dropkey.load(run, device="cpu")


@pytest.fixture(scope="module")
def pictures(opened) -> list[Image.Image]:
    return [opened.dataset.test.images.picture(number) for number in range(3)]


@pytest.fixture
def files(pictures, tmp_path):
    (tmp_path / "crops").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "crops" / f"{number}.png")
    pictures[0].save(tmp_path / "person.png")
    return tmp_path / "crops"


# --------------------------------------------------------------------------------------------------------- dropkey.load


def test_found_meshes_are_those_of_the_evaluation(model, opened, pictures):
    (batch,) = opened.batches(torch.arange(3))
    with torch.no_grad():
        vertices, camera = opened.task.predict(opened.model, batch)
    answer = model.predict(pictures)
    torch.testing.assert_close(answer.vertices, vertices)
    torch.testing.assert_close(answer.camera, camera)
    body = opened.dataset.body
    torch.testing.assert_close(answer.joints, body.joints(vertices))
    assert torch.equal(answer.faces, body.faces) and len(answer) == 3
    torch.testing.assert_close(answer.points, (project(answer.joints, camera) + 1) * SIDE / 2)
    torch.testing.assert_close(answer[1].points, answer.points[1])


def test_points_are_in_pixels_of_the_original_image_whatever_is_around_its_middle(model, pictures):
    wide = Image.new("L", (SIDE + 20, SIDE), 200)
    wide.paste(pictures[0], (10, 0))
    alone, within = model.predict(pictures[0]), model.predict(wide)
    torch.testing.assert_close(within.vertices, alone.vertices)
    torch.testing.assert_close(within.points, alone.points + torch.tensor([10.0, 0.0]))
    large = model.predict(pictures[0].resize((3 * SIDE, 3 * SIDE)))
    torch.testing.assert_close(large.points, 3 * alone.points, atol=1.0, rtol=0)


def test_monte_carlo_is_the_mean_mesh_and_the_spread_of_its_joints(model, pictures):
    answer = model.predict(pictures, monte_carlo=3, batch_size=2)
    with torch.inference_mode(), model.regularized():
        passes = [[one[0] for one in some] for some, _ in model.outputs(pictures, 3, 2)]
    meshes = torch.stack([torch.cat(each) for each in zip(*passes, strict=True)])
    assert not torch.equal(meshes[0], meshes[1])
    torch.testing.assert_close(answer.vertices, meshes.mean(0))
    joints = model.task.body.joints(meshes)
    torch.testing.assert_close(answer.spread, joints.var(0).sum(-1).sqrt(), atol=1e-7, rtol=1e-3)
    assert answer.top(1)[2][0]["spread"] == pytest.approx(answer.spread[2, 0].item())


def test_a_run_made_before_weights_had_the_body_is_drawn_but_not_loaded(run, opened, model, tmp_path):
    weights = {name: value for name, value in opened.model.state_dict().items() if not name.startswith("body.")}
    torch.save(weights, tmp_path / "old.pt")
    assert load_weights(opened.model, tmp_path / "old.pt") == []
    with pytest.raises(ConfigError, match="missing or of another shape, first body"):
        dropkey.load(run, tmp_path / "old.pt", device="cpu")


@pytest.mark.parametrize("wrong", [{"levels": [2, 3]}, {"levels": 3}, {"joints": "x"}, {"faces": None}], ids=str)
def test_damaged_notes_of_a_model_are_told(model, wrong):
    assert model.task.info_fault(model.info) == ""
    assert model.task.info_fault(model.info | {"model_args": model.info["model_args"] | wrong})


# -------------------------------------------------------------------------------------------------- cameras and turns


def test_the_camera_that_fits_is_the_one_that_projected():
    points, camera = torch.randn(4, 9, 3), torch.tensor([[0.9, 0.1, -0.2]]).expand(4, 3)
    confidence = (torch.arange(9) > 2).float()[:, None].expand(4, 9, 1)
    flat = project(points, camera) + 5 * (1 - confidence)  # wrong where nobody is sure
    torch.testing.assert_close(camera_of(points, flat, confidence), camera, atol=1e-5, rtol=1e-4)
    assert camera_of(points, flat, 0 * confidence).isnan().all()


def test_the_truth_is_where_the_joints_are_in_the_image(opened):
    (batch,) = opened.batches(torch.arange(5))
    answer = opened.task.meshes(opened.task.predict(opened.model, batch), batch)
    truth = opened.task.truth(batch, answer)
    torch.testing.assert_close(truth.points, (batch.points[..., :2] + 1) * SIDE / 2, atol=1e-3, rtol=0)
    batch.points[..., 2] = 0
    assert torch.equal(opened.task.truth(batch, answer).camera, answer.camera)


def test_turned_by_90_degrees_what_was_to_the_right_is_nearest(model, pictures):
    one = model.predict(pictures)[0]
    side = one.turned(90)
    torch.testing.assert_close(side.vertices[:, 2], -one.vertices[:, 0])
    torch.testing.assert_close(side.vertices[:, 1], one.vertices[:, 1])
    torch.testing.assert_close(side.flat(torch.zeros(1, 3))[0, 0].item(), SIDE / 2)
    torch.testing.assert_close(side.turned(270).joints, one.joints)


# ------------------------------------------------------------------------------------------------------ dropkey predict


def test_predict_stores_joints_cameras_and_meshes(run, model, files, tmp_path):
    names = sorted(map(str, files.glob("*.png")))
    given = [f"run={run}", "device=cpu", str(files)]
    predict.main([*given, f"output={tmp_path / 'found.json'}", f"meshes={tmp_path / 'objects'}"])
    answer, stored = model.predict(names), json.loads((tmp_path / "found.json").read_text())
    assert [one["image"] for one in stored] == names
    assert [one["joints"] for one in stored] == answer.top() and len(stored[0]["joints"]) == 14
    assert [one["camera"] for one in stored] == answer.camera.tolist()
    lines = [line.split() for line in (tmp_path / "objects" / "1-mesh.obj").read_text().splitlines()]
    vertices = torch.tensor([list(map(float, line[1:])) for line in lines if line[0] == "v"])
    torch.testing.assert_close(vertices * torch.tensor([1, -1, -1]), answer.vertices[1], atol=1e-6, rtol=0)
    faces = torch.tensor([list(map(int, line[1:])) for line in lines if line[0] == "f"])
    assert torch.equal(faces - 1, answer.faces)
    predict.main([*given, "k=2", f"output={tmp_path / 'found.csv'}"])
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert len(rows) == 6 and rows[1]["label"] == "joint 1"
    assert [float(rows[1][f"position_{axis}"]) for axis in "xyz"] == pytest.approx(answer.joints[0, 1].tolist())
    assert float(rows[1]["point_y"]) == pytest.approx(answer.points[0, 1, 1].item())


def test_predict_prints_millimetres_and_pixels(run, model, files, capsys):
    predict.main([f"run={run}", "device=cpu", "k=1", "monte_carlo=2", str(files / "0.png")])
    ((joint,),) = model.predict(files / "0.png", monte_carlo=2).top(1)
    line = capsys.readouterr().out.splitlines()[0]
    assert len(line) <= predict.WIDTH
    values = [f"{1000 * value:.0f}" for value in joint["position"]]
    assert line.split()[1:6] == ["joint", "0", *values]
    assert line.endswith("{:.0f},{:.0f}".format(*joint["point"])) and f"±{1000 * joint['spread']:5.1f}" in line


# -------------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def truth(opened):
    """Of one image, and its picture."""
    (batch,) = opened.batches(torch.tensor([3]))
    with torch.no_grad():
        answer = opened.task.meshes(opened.task.predict(opened.model, batch), batch)
    return opened.task.truth(batch, answer)[0], opened.task.pictures(batch)[0]


def colored(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.amax(-1) - pixels.amin(-1) > 0.1


def test_a_body_covers_the_figure_in_the_image(truth):
    mesh, picture = truth
    pixels = as_pixels(mesh_figures.drawn(picture, mesh))
    assert pixels.shape == (480, 960, 3)
    covered = colored(pixels[:, :480])
    figure = picture[0].repeat_interleave(15, 0).repeat_interleave(15, 1) > 0
    assert (covered & ~figure).sum() < 0.01 * covered.sum()  # whose pixels are 15 wide here
    assert (covered & figure).sum() > 0.5 * figure.sum()
    assert colored(pixels[:, 480:]).any() and (pixels[0, 480:] > 0.99).all()  # beside it, on white


def test_triangles_that_face_away_are_not_drawn_in_whatever_direction_corners_run(truth):
    mesh, picture = truth
    one, other = (as_pixels(mesh_figures.drawn(picture, one)) for one in (mesh, replaced(mesh, mesh.faces.flip(-1))))
    assert ((one - other).abs().amax(-1) > 0.02).float().mean() < 0.01
    figure = mesh_figures.drawn(picture, mesh)
    assert 0.3 < len(figure.axes[0].collections[0].get_paths()) / len(mesh.faces) < 0.7


def test_a_body_without_triangles_is_drawn_as_points(truth):
    mesh, picture = truth
    points = mesh_figures.drawn(picture, replaced(mesh, mesh.faces[:0])).axes[0].collections[0].get_offsets()
    order = mesh.vertices[:, 2].argsort(descending=True)
    np.testing.assert_allclose(points, mesh.flat(mesh.vertices)[order], rtol=1e-5)


def replaced(mesh, faces):
    return type(mesh)(mesh.vertices, mesh.joints, mesh.camera, mesh.size, faces)


# ------------------------------------------------------------------------------------------------------------ attention


def test_the_map_of_a_joint_is_its_attention_to_the_nearest_coarse_vertices(opened):
    attention, kept = opened.model.blocks[1].layers[0].attention, []
    handle = attention.register_forward_pre_hook(lambda _, args: kept.append(args))
    (batch,) = opened.batches(torch.tensor([4]))
    with torch.no_grad():
        opened.model(batch.images)
    handle.remove()
    with torch.no_grad():
        _, weights = attention(*kept[0], need_weights=True, average_attn_weights=False)
    maps, points, (mesh,) = look_at(opened, [(4, 7)], "all", 1)
    body = opened.dataset.body
    assert maps.layer == 1 and maps.values[0].shape == (2, 220)
    torch.testing.assert_close(maps.values[0][:, body.coarse], weights[0, :, 7, 14:])
    assert points[0] == pytest.approx((mesh.points[7] / SIDE).tolist())
    (mean,), _, _ = look_at(opened, [(4, 7)], layer=1)[0].values, None, None
    torch.testing.assert_close(mean[0], maps.values[0].mean(0))


def shown(monkeypatch, module, *words):
    kept = []
    monkeypatch.setattr(module, "save", lambda figure, path: kept.append(figure))
    visualize.main(list(words))
    return kept[0]


def test_meshes_have_the_error_of_each_image(run, opened, monkeypatch):
    figure = shown(monkeypatch, mesh_figures, "meshes", f"run={run}", "images=0,5")
    assert len(figure.axes) == 2 * 3
    errors = [one.error for one in found(opened, torch.arange(13))]
    assert sum(errors) / 13 == pytest.approx(json.loads((Path(run) / "summary.json").read_text())["mpve"], rel=1e-4)
    assert [axis.get_xlabel() for axis in figure.axes[1::3]] == [f"MPVE {errors[n]:.1f} mm" for n in (0, 5)]
    assert all(len(axis.collections) == 2 for axis in figure.axes[2::3])  # the truth, and what is found


def test_each_image_shows_another_joint_and_its_place(run, monkeypatch):
    figure = shown(monkeypatch, map_figures, "maps", f"run={run}", "images=0,1")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["test 0: joint 0", "test 1: joint 7"]
    figure = shown(monkeypatch, map_figures, "maps", f"run={run}", "images=0,1", "joint=3,5", "head=all")
    assert len(figure.axes) == 4 * 3


# ------------------------------------------------------------------------------------------------- commands and exports

PAGE = (Path(__file__).parents[1] / "docs" / "mesh.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)[1:] for line in re.findall(r"^python scripts/.*run=\$METRO.*$", PAGE, re.M)
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_page_on_meshes_work(words, run, files, tmp_path, monkeypatch, capsys):
    if "format=onnx" in words:
        pytest.importorskip("onnxscript", reason="comes with pip install 'dropkey[export]'")
    monkeypatch.chdir(tmp_path)
    script, *given = [word.replace("$METRO", run).replace("layer=3", "layer=1") for word in words]
    main = {"predict": predict.main, "visualize": visualize.main, "export": export.main}[Path(script).stem]
    assert not main(given)
    kind, _, file = capsys.readouterr().out.splitlines()[-1].partition(" ")
    assert kind not in ("picture", "page") or Path(file).stat().st_size > 5000
    if "draw=drawn" in given:
        assert np.asarray(Image.open("drawn/0-mesh.png")).shape[:2] == (480, 960)


def test_python_of_the_page_on_meshes_runs(run, files, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    shutil.copytree(run, tmp_path / "runs" / Path(run).name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "mesh.md", "exec"), {})
    assert "torch.Size([1, 220, 3]) torch.Size([1, 14, 3]) torch.Size([1, 3])" in capsys.readouterr().out
    assert Path("person.obj").read_text().count("\nf ") == 400


def test_the_exported_weights_are_read_by_timm_with_the_body(run, model, tmp_path, capsys):
    export.main([f"run={run}", "format=safetensors", f"output={tmp_path / 'metro.safetensors'}"])
    (line,) = re.findall(r"^use    (timm.*)$", capsys.readouterr().out, re.M)
    read, images = eval(line, {"timm": timm}).eval(), torch.randn(2, 1, SIDE, SIDE)
    assert torch.equal(read.body.regressor, model.model.body.regressor)
    torch.testing.assert_close(read(images)[1][-1], model.model(images)[1][-1])


def test_an_exported_program_gives_meshes_joints_and_cameras(run, model, tmp_path):
    export.main([f"run={run}", "format=torch_export", f"output={tmp_path / 'metro.pt2'}"])
    images = torch.randn(4, 1, SIDE, SIDE)
    vertices, joints, camera = torch.export.load(tmp_path / "metro.pt2").module()(images)
    torch.testing.assert_close(joints, model.task.body.joints(vertices))
    torch.testing.assert_close(camera, model.model(images)[2])


REFUSED = {
    "boxes run=RUN": "finds no boxes; choose maps or compare",
    "maps run=RUN joint=14": "joint=14: the body has 14 joints, 0 to 13",
    "maps run=RUN layer=3": "the layers that look at the image are 0, 1, 2",
    "maps run=RUN head=5": "head=5: the layer has 2 heads",
    "maps run=RUN head=rollout": "joints have no rollout",
    "compare run=RUN point=3,4": "point= is for runs that find boxes",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_drawn_is_one_line(words, run):
    with pytest.raises(ConfigError) as error:
        visualize.main(words.replace("RUN", run).split())
    assert REFUSED[words] in str(error.value) and "\n" not in str(error.value)


def test_what_predict_and_export_cannot_do_is_one_line(run, files, tmp_path):
    with pytest.raises(ConfigError, match=r"threshold=0\.3 is for runs that find boxes"):
        predict.main([f"run={run}", "threshold=0.3", "device=cpu", str(files)])
    with pytest.raises(ConfigError, match=r"format=timm is for classifiers.*finds meshes"):
        export.main([f"run={run}", "format=timm", f"output={tmp_path / 'out'}"])
