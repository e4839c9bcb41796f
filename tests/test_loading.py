"""A trained run as a model: dropkey.load, dropkey predict, dropkey export. For docs/models.md see test_readme.py."""

import csv
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import dropkey
import regression_task
import runs
from data_samples import digits_config, folder_config, image_folder
from dropkey import evaluation, exporting, tasks
from dropkey.commands import export, predict
from dropkey.config import compose
from dropkey.config.schema import EvalConfig, EvaluationConfig
from dropkey.data import eval_loader
from dropkey.datasets import load as load_data
from dropkey.errors import ConfigError, DataError, RunError, StorageError
from dropkey.tasks.preprocessing import ImageTransform

T2T = ("model=t2t_vit_small_image", "model.mlp_ratio=2", "data.image_size=16", "trainer.max_steps=1")
FOLDER = ("data=folder", "data.image_size=12", "model.patch_size=3", "trainer.batch_size=8", "data.num_workers=0")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("digits"), "regularizer.ratio=0.3", "trainer.ema_decay=0.5")


@pytest.fixture(scope="module")
def t2t(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("t2t"), *T2T)


@pytest.fixture(scope="module")
def of_folder(tmp_path_factory):
    """A run on three classes, whose images are gone; `moved` is where they are now."""
    place = tmp_path_factory.mktemp("of_folder")
    images = image_folder(place / "images")
    run = runs.train(place / "runs", *FOLDER, f"data.root={images}", "data.max_train_samples=null")
    images.rename(place / "moved")
    return run


def test_images(run) -> tuple[list[Image.Image], torch.Tensor]:
    """The pictures of a run's test split, and their class ids."""
    data = tasks.build(compose.load(run.config)).load_data()
    return [data.test.images.picture(int(row)) for row in data.test.rows], data.test.targets


test_images.__test__ = False


# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory) -> Path:
    """Train and test folders with a class of each kind of image file, of odd sizes."""
    root, random = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
            place = root / split / kind.replace(";", "")
            place.mkdir(parents=True)
            for number in range(2):
                pixels = random.integers(0, 256, (17 + number, 23, 4), dtype=np.uint8)
                if kind == "I;16":
                    picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
                else:
                    picture = Image.fromarray(pixels, "RGBA").convert("RGB" if kind == "CMYK" else "RGBA").convert(kind)
                picture.save(place / f"{number}.{'jpg' if kind == 'CMYK' else 'png'}")
    return root


@pytest.mark.parametrize(
    "changes",
    [
        {"in_memory": True},
        {"in_memory": False},
        {"in_memory": False, "crop_pct": 0.7},
        {"in_memory": True, "channels": 1, "mean": [0.3], "std": [0.2]},
        {"in_memory": False, "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]},
    ],
    ids=str,
)
def test_files_of_all_kinds_become_to_the_bit_what_evaluation_sees(changes, all_kinds):
    config = folder_config(all_kinds, **changes)
    (batch,) = eval_loader(load_data(config), "test", config, batch_size=99)
    files = sorted(all_kinds.glob("test/*/*.*"))
    transform = ImageTransform(config)
    for make in (str, Path, Image.open):
        made = torch.stack([transform(make(file)) for file in files])
        assert len(made) == 16 and torch.equal(made, batch.images)


@pytest.mark.parametrize("changes", [{}, {"image_size": 12}, {"in_memory": False, "image_size": 10, "channels": 3}])
def test_pictures_of_an_array_become_to_the_bit_what_evaluation_sees(changes):
    config = digits_config(**changes)
    original = load_data(digits_config(in_memory=False)).test  # 8 x 8 and grey
    (batch,) = eval_loader(load_data(config), "test", config, batch_size=9999)
    made = [ImageTransform(config)(original.images.picture(int(row))) for row in original.rows]
    assert torch.equal(torch.stack(made), batch.images)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageTransform(digits_config())(tmp_path / "broken.png")


# -------------------------------------------------------------------------------------------------------------- loading


def test_a_run_is_loaded_without_its_images(of_folder):
    trained = dropkey.load(of_folder.path, device="cpu")
    assert trained.classes == ["a", "b", "c"]
    assert trained.config == compose.load(of_folder.config)
    found = trained.predict(of_folder.path.parent.parent / "moved" / "test" / "a" / "000.png")
    assert found.probabilities.shape == (1, 3) and found.probabilities.sum().item() == pytest.approx(1)


def test_predictions_have_the_figures_of_the_summary(digits):
    """The moving average's, on the test split."""
    pictures, targets = test_images(digits)
    probabilities = dropkey.load(digits.path, device="cpu").predict(pictures).probabilities
    summary = digits.summary()
    assert 100 * (probabilities.argmax(1) == targets).float().mean().item() == pytest.approx(summary["top1"], abs=1e-3)
    loss = torch.nn.functional.nll_loss(probabilities.log(), targets).item()
    assert loss == pytest.approx(summary["loss"], abs=1e-5)


def test_a_run_is_found_by_the_beginning_of_its_name_and_by_its_hash(digits, monkeypatch):
    monkeypatch.chdir(digits.path.parent.parent)
    root = digits.path.parent.name
    for word in ("vit", digits.path.name[-10:], "*-digits-*"):
        assert dropkey.load(f"{root}/{word}", device="cpu").weights.samefile(digits.checkpoints / "last.pt")


@pytest.mark.parametrize("name", ["last", "best"])
def test_the_weights_are_those_that_were_asked_for(name, digits):
    kept = torch.load(digits.checkpoints / f"{name}.pt", weights_only=True)["ema"]
    for weights in (name, digits.checkpoints / f"{name}.pt"):
        trained = dropkey.load(digits.path, weights, device="cpu")
        assert runs.unequal(dict(trained.model.state_dict()), dict(kept)) is None


def test_the_model_is_plain_and_in_evaluation_mode(digits):
    trained = dropkey.load(digits.path, device="cpu")
    assert not trained.model.training
    assert all(type(module).__module__.startswith(("timm.", "torch.")) for module in trained.model.modules())


def test_a_trained_model_prints_as_one_line(digits):
    model = dropkey.load(digits.path, device="cpu")
    assert repr(model).startswith(
        f"<TrainedModel {model.config.model.name}: classification with 10 labels (0, 1, 2, ...), cpu, from"
    )
    assert str(model.weights) in repr(model)


def test_loading_draws_no_random_numbers(digits):
    before = torch.get_rng_state()
    dropkey.load(digits.path, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_one_image_several_and_tensors_are_predicted_alike(digits):
    trained = dropkey.load(digits.path, device="cpu")
    pictures, _ = test_images(digits)
    together = trained.predict(pictures[:5], batch_size=2).probabilities
    tensors = torch.stack([trained.transform(picture) for picture in pictures[:5]])
    torch.testing.assert_close(trained.predict(tensors).probabilities, together)
    torch.testing.assert_close(trained.predict(pictures[3]).probabilities, together[3:4])
    with pytest.raises(DataError, match="no images"):
        trained.predict([])


def test_the_top_classes_come_in_order_with_their_names(digits):
    found = dropkey.load(digits.path, device="cpu").predict(test_images(digits)[0][:4])
    for row, top in zip(found.probabilities, found.top(3), strict=True):
        assert [choice["score"] for choice in top] == row.sort(descending=True).values[:3].tolist()
        assert [row[int(choice["label"])].item() for choice in top] == [choice["score"] for choice in top]
    assert len(found.top(99)[0]) == 10


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ("lats", ConfigError, "weights=lats is no file; it may also be last or best"),
        ("missing.pt", ConfigError, "weights=missing.pt is no file"),
    ],
)
def test_weights_that_are_not_there_end_in_one_line(weights, error, text, digits):
    with pytest.raises(error, match=text):
        dropkey.load(digits.path, weights)


def test_weights_for_other_classes_or_of_another_model_are_refused(digits, of_folder, t2t):
    with pytest.raises(ConfigError, match="other classes than the 10 of the run"):
        state = torch.load(digits.checkpoints / "last.pt", weights_only=True)["model"]
        state["head.weight"], state["head.bias"] = state["head.weight"][:3], state["head.bias"][:3]
        torch.save(state, digits.path / "three.pt")
        dropkey.load(digits.path, digits.path / "three.pt")
    with pytest.raises(ConfigError, match="does not fit the model"):
        dropkey.load(digits.path, t2t.checkpoints / "last.pt")


def test_a_run_that_has_not_trained_says_so(digits, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "model.json"):
        shutil.copy(digits.path / name, run)
    with pytest.raises(StorageError, match=r"holds no checkpoints/last\.pt"):
        dropkey.load(run)


def test_a_task_that_does_not_say_how_its_model_is_used_is_named(tmp_path):
    run = runs.train(tmp_path, *regression_task.OVERRIDES, "trainer.epochs=1", "optim.warmup_epochs=0")
    with pytest.raises(ConfigError, match=r"regression_task:Regression does not say how its model is used"):
        dropkey.load(run.path)


# -------------------------------------------------------------------------------------- runs made before model.json


def test_a_run_without_model_json_gets_it_from_its_data(digits, tmp_path):
    run = tmp_path / "old"
    shutil.copytree(digits.path, run)
    (run / "model.json").unlink()
    assert dropkey.load(run).classes == [str(digit) for digit in range(10)]
    now, before = (json.loads((path / "model.json").read_text()) for path in (run, digits.path))
    assert now == {key: value for key, value in before.items() if key != "origin"}


def test_where_its_data_are_gone_it_says_how_to_proceed(of_folder, tmp_path):
    run = tmp_path / "old"
    shutil.copytree(of_folder.path, run)
    (run / "model.json").unlink()
    with pytest.raises(ConfigError, match=r"can be read once from its images: root=<where these are now> \(no folder"):
        dropkey.load(run)
    assert dropkey.load(run, root=of_folder.path.parent.parent / "moved").classes == ["a", "b", "c"]
    assert dropkey.load(run).classes == ["a", "b", "c"]  # without them


def test_data_of_other_classes_leave_no_model_json(of_folder, tmp_path):
    run = tmp_path / "old"
    shutil.copytree(of_folder.path, run)
    (run / "model.json").unlink()
    other = image_folder(tmp_path / "other")
    for split in ("train", "test"):
        shutil.copytree(other / split / "a", other / split / "d")
    with pytest.raises(ConfigError, match="other classes"):
        dropkey.load(run, root=other)
    assert not (run / "model.json").exists()


# ---------------------------------------------------------------------------------------------------------- Monte Carlo


def test_monte_carlo_is_that_of_the_evaluation(digits):
    cfg = EvalConfig(run=str(digits.path), eval=EvaluationConfig(monte_carlo=3, device="cpu"))
    result, _ = evaluation.evaluate_run(cfg, compose.load(digits.config), digits.path)
    pictures, targets = test_images(digits)
    found = dropkey.load(digits.path, device="cpu").predict(pictures, monte_carlo=3, batch_size=256)
    loss = torch.nn.functional.nll_loss(found.probabilities.log(), targets).item()
    assert loss == pytest.approx(result["loss"], abs=1e-5)
    assert loss != pytest.approx(digits.summary()["loss"], abs=1e-5)


def test_monte_carlo_leaves_the_model_plain_and_repeats_itself(digits):
    trained = dropkey.load(digits.path, device="cpu")
    pictures = test_images(digits)[0][:6]
    before = trained.predict(pictures).probabilities
    first, second = (trained.predict(pictures, monte_carlo=4) for _ in range(2))
    assert torch.equal(first.probabilities, second.probabilities) and torch.equal(first.spread, second.spread)
    assert torch.equal(trained.predict(pictures).probabilities, before)
    assert all(type(module).__module__.startswith(("timm.", "torch.")) for module in trained.model.modules())


def test_the_spread_is_the_deviation_over_the_passes(digits):
    trained = dropkey.load(digits.path, device="cpu")
    batch = torch.stack([trained.transform(picture) for picture in test_images(digits)[0][:6]])
    found = trained.predict(batch, monte_carlo=5)
    with torch.inference_mode(), trained.regularized():
        ((logits, _),) = trained.outputs(batch, 5, batch_size=6)
    passes = torch.stack(logits).softmax(-1)
    assert (passes[0] != passes[1]).any()
    torch.testing.assert_close(found.spread, ((passes - passes.mean(0)).square().sum(0) / 4).sqrt())
    assert trained.predict(batch).spread is None


@pytest.mark.parametrize("passes", [1, -1])
def test_a_number_of_passes_without_a_spread_is_refused(passes, digits):
    with pytest.raises(ConfigError, match=f"monte_carlo={passes} has no spread"):
        dropkey.load(digits.path, device="cpu").predict(test_images(digits)[0][0], monte_carlo=passes)


@pytest.mark.parametrize(("part", "changes"), [("regularizer", {"name": "none"}), ("schedule", {"over": "training"})])
def test_monte_carlo_needs_a_regularizer_that_acted_at_the_end_of_training(part, changes, digits):
    trained = dropkey.load(digits.path, device="cpu")
    setattr(trained.config, part, dataclasses.replace(getattr(trained.config, part), **changes))
    with pytest.raises(ConfigError, match="no regularizer"):
        trained.predict(test_images(digits)[0][0], monte_carlo=2)


# ---------------------------------------------------------------------------------------------------- dropkey predict


@pytest.fixture
def pictures(digits, tmp_path) -> Path:
    """photo.png, and pictures/ with four images and a broken one, one of them in a folder with a long name."""
    place = tmp_path / "pictures"
    (place / ("deep" * 12)).mkdir(parents=True)
    images, _ = test_images(digits)
    images[0].save(tmp_path / "photo.png")
    for number, name in enumerate(("0.png", "1.PNG", "2.bmp", f"{'deep' * 12}/3.png")):
        images[number].save(place / name)
    (place / ".4.png").write_bytes(b"what a Mac leaves")
    (place / "notes.txt").write_text("no image")
    (place / "broken.png").write_bytes(b"no image")
    return place


def predicted(capsys, digits, *words) -> tuple[int, list[str], list[str]]:
    code = predict.main([f"run={digits.path}", "device=cpu", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("words", [[], ["monte_carlo=3"]], ids=str)
def test_the_table_has_aligned_columns_within_80_characters(words, digits, pictures, capsys):
    _, lines, _ = predicted(capsys, digits, pictures, *words)
    assert len(lines) == 4 * 5
    assert max(map(len, lines)) <= 80 and len({line.index(" %") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert sum(not line.startswith(" ") for line in lines) == 4
    assert any(line.startswith("…") and "/3.png" in line for line in lines)


def test_images_that_cannot_be_read_are_named_and_the_others_classified(digits, pictures, capsys):
    code, lines, errors = predicted(capsys, digits, pictures, "missing.png", "k=1")
    assert code == 3 and len(lines) == 4
    assert "broken.png" in errors[0] and "missing.png" in errors[1]
    assert errors[2:] == ["error: 2 of 6 images could not be read"]


def test_json_and_csv_hold_the_predictions_of_load(digits, pictures, capsys):
    files = [str(pictures / name) for name in ("0.png", "1.PNG")]
    top = dropkey.load(digits.path, device="cpu").predict(files).top(2)
    code, lines, _ = predicted(capsys, digits, *files, "format=json", "k=2")
    assert code == 0
    assert json.loads("\n".join(lines)) == [{"image": f, "top": t} for f, t in zip(files, top, strict=True)]
    _, lines, _ = predicted(capsys, digits, *files, "format=csv", "k=2")
    rows = list(csv.DictReader(lines))
    assert [row["image"] for row in rows] == [files[0], files[0], files[1], files[1]]
    assert [row["rank"] for row in rows] == ["1", "2"] * 2
    assert [float(row["score"]) for row in rows] == [choice["score"] for each in top for choice in each]


def test_predictions_are_written_to_a_file_of_the_kind_its_name_says(digits, pictures, tmp_path, capsys):
    for name in ("p.csv", "p.json"):
        _, lines, _ = predicted(capsys, digits, pictures / "0.png", f"output={tmp_path / name}")
        assert lines == [f"wrote  {tmp_path / name}  (1 images)"]
    (one,) = json.loads((tmp_path / "p.json").read_text())
    (first, *_) = csv.DictReader((tmp_path / "p.csv").open())
    assert float(first["score"]) == one["top"][0]["score"]


def test_a_pattern_an_image_named_twice_and_a_name_with_an_equals_sign(digits, pictures, monkeypatch, capsys):
    shutil.copy(pictures / "0.png", pictures / "k=2.png")
    monkeypatch.chdir(pictures)
    _, lines, _ = predicted(capsys, digits, "[0-2].*", "0.png", "k=2.png", "k=1")
    assert [line.split()[0] for line in lines] == ["0.png", "1.PNG", "2.bmp", "k=2.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no images: name files, folders or patterns"),
        (["nothing*.png"], r"nothing\*.png fits no file"),
        (["."], r"\. holds no image"),
        (["x.png", "k=0"], "k=0 must be above 0"),
        (["x.png", "output=x.txt"], r"must end in \.json or \.csv"),
        (["x.png", "montecarlo=3"], "did you mean monte_carlo"),
        (["x.png", "format=xml"], "choices: table, json, csv"),
    ],
)
def test_what_predict_cannot_do_ends_in_one_line(words, message, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        predict.main([f"run={digits.path}", *words])


# ----------------------------------------------------------------------------------------------------- dropkey export

READERS = {
    "timm": lambda path: timm.create_model(f"local-dir:{path}", pretrained=True).eval(),
    "torch_export": lambda path: torch.export.load(path).module(),
}


def read_again(run, format: str, path: Path):
    """The exported model as a function of images, read by other means than dropkey's where it can be."""
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    if format == "safetensors":
        info = json.loads(path.with_suffix(".json").read_text())
        arguments = {"num_classes": info["num_classes"], **info["model_args"]}
        return timm.create_model(info["architecture"], checkpoint_path=path, **arguments).eval()
    return READERS[format](path)


def needs_onnx(format: str) -> None:
    if format == "onnx":
        for package in exporting.NEEDED["onnx"]:
            pytest.importorskip(package, reason=f"{package} comes with pip install 'dropkey[export]'")


@pytest.mark.parametrize("name", ["digits", "t2t"])
@pytest.mark.parametrize("format", export.FORMATS)
def test_an_exported_model_computes_what_the_loaded_one_does(format, name, request, tmp_path, capsys):
    needs_onnx(format)
    run, path = request.getfixturevalue(name), tmp_path / ("out" + exporting.SUFFIXES[format])
    export.main([f"run={run.path}", f"format={format}", f"output={path}"])
    out = capsys.readouterr().out
    assert float(re.search(r"differ from the model's by (\S+) at most", out)[1]) < 1e-5
    assert ("import dropkey.models" in out) == (name == "t2t" and format in ("timm", "safetensors"))
    trained, written = dropkey.load(run.path, device="cpu"), read_again(run, format, path)
    images = torch.randn(5, 1, *[trained.config.data.image_size] * 2)
    with torch.inference_mode():
        for count in (5, 1):
            torch.testing.assert_close(written(images[:count]), trained.model(images[:count]), rtol=0, atol=1e-5)


def test_the_files_of_an_export_may_be_read_by_all_and_nothing_else_is_left(digits, tmp_path):
    exporting.export(dropkey.load(digits.path, device="cpu"), "timm", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "out").iterdir())


def test_timm_makes_the_same_preprocessing_of_an_export(of_folder, tmp_path):
    trained = dropkey.load(of_folder.path, device="cpu")
    exporting.export(trained, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))
    torch.testing.assert_close(transform(image), trained.transform(image), rtol=0, atol=1e-5)
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_an_export_for_timm_starts_a_model_of_other_classes(digits, tmp_path):
    exporting.export(dropkey.load(digits.path, device="cpu"), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert model.head.weight.shape[0] == 3
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], kept["blocks.1.attn.qkv.weight"])


def test_the_weights_that_are_exported_are_those_that_were_asked_for(digits, tmp_path):
    for weights in ("last", "best"):
        export.main([f"run={digits.path}", "format=safetensors", f"output={tmp_path / weights}", f"weights={weights}"])
        kept = torch.load(digits.checkpoints / f"{weights}.pt", weights_only=True)["ema"]
        assert runs.unequal(load_file(tmp_path / f"{weights}.safetensors"), dict(kept)) is None


def test_an_existing_file_is_kept_unless_told_otherwise(digits, tmp_path):
    trained, file = dropkey.load(digits.path, device="cpu"), tmp_path / "model.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists; choose another output=, or overwrite=true"):
        exporting.export(trained, "safetensors", file)
    assert file.read_bytes() == b"mine"
    exporting.export(trained, "safetensors", file, overwrite=True)
    assert load_file(file).keys() == trained.model.state_dict().keys()
    file.unlink()
    file.with_suffix(".json").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.json exists"):
        exporting.export(trained, "safetensors", file)


def test_an_export_that_is_another_model_is_not_kept(digits, tmp_path, monkeypatch):
    original = exporting.save_weights

    def spoiled(trained, file):
        with torch.no_grad():
            trained.model.head.bias += 1
            original(trained, file)
            trained.model.head.bias -= 1

    monkeypatch.setattr(exporting, "save_weights", spoiled)
    with pytest.raises(RunError, match="the exported model is another one: its logits differ by 1; it is not kept"):
        exporting.export(dropkey.load(digits.path, device="cpu"), "timm", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_package_is_named_with_the_extra_that_brings_it(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys.modules["json"])
    with pytest.raises(ConfigError, match=r"format=onnx needs onnxscript: pip install 'dropkey\[export\]'"):
        exporting.export(dropkey.load(digits.path, device="cpu"), "onnx", tmp_path / "out.onnx")


def test_a_model_that_torch_cannot_capture_ends_in_one_line(digits, tmp_path):
    trained = dropkey.load(digits.path, device="cpu")
    trained.model.forward = lambda x: x if x.sum() > 0 else -x
    with pytest.raises(ConfigError, match=r"torch\.export cannot capture vit_tiny_patch16_224: \S.*"):
        exporting.export(trained, "torch_export", tmp_path / "out.pt2")
