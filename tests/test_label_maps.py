"""`dropkey label-maps`: what a teacher sees at each place, as files that a VOLO is trained with."""

import json
import os

import pytest
import timm
import torch

import runs
from data_samples import image_folder
from dropkey.commands import label_maps as command
from dropkey.data.token_labels import read_map
from dropkey.errors import ConfigError, DataError
from dropkey.tasks.label_maps import dense_logits, maps_of

VIT = ("model=vit_4x64", "model.depth=1", "data=folder", "data.image_size=16", "data.val_fraction=0")
TINY = {"num_classes": 7, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def images(tmp_path):
    return image_folder(tmp_path / "images", size=(40, 30))


@pytest.fixture
def teacher(images, tmp_path):
    words = (*VIT, f"data.root={images}", "data.max_train_samples=null", "trainer.batch_size=8", *runs.ONE_EPOCH)
    return runs.train(tmp_path / "teacher", *words, "data.num_workers=0", "data.in_memory=false")


def label(teacher, images, output, *words):
    own = [f"teacher={getattr(teacher, 'path', teacher)}", f"output={output}", "device=cpu"]
    command.main([*own, "data=folder", f"data.root={images}", "data.num_workers=0", *words])
    return sorted(path for path in output.rglob("*.pt"))


# -------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("name", ["resnet10t", "regnety_002", "swin_tiny_patch4_window7_224"])
def test_the_mean_of_all_places_is_what_an_averaging_model_says(name):
    arguments = {"img_size": 64, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)} if "swin" in name else {}
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = dense_logits(model, images)
        assert dense.shape[0] == 2 and dense.shape[1] == dense.shape[2] > 1
        torch.testing.assert_close(dense.mean((1, 2)), model(images), rtol=1e-4, atol=1e-5)


def test_a_token_is_classified_as_the_class_token_is():
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.head(model.fc_norm(model.forward_features(images)[:, 1:]))
        torch.testing.assert_close(dense_logits(model, images), expected.view(2, 4, 4, 7))


def test_the_place_of_a_logit_is_that_of_what_was_seen():
    """Rows come before columns: a bright spot in the upper right changes most the logits there."""
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 0}).eval()
    plain, spot = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    spot[:, :, 0:8, 24:32] = 3.0
    with torch.no_grad():
        change = (dense_logits(model, spot) - dense_logits(model, plain)).abs().sum(-1)[0]
    assert change.nonzero().tolist() == [[0, 3]]


def test_volo_is_asked_through_its_classifier_of_tokens(tiny_volo):
    model = timm.create_model("volo_d1_224", num_classes=7, img_size=32, patch_size=4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        whole = model.head(features[:, 0]) + 0.5 * dense_logits(model, images).flatten(1, 2).max(1)[0]
        torch.testing.assert_close(whole, model(images))


def test_a_teacher_without_places_is_refused():
    with pytest.raises(ConfigError, match="CeiT has no features of places"):
        dense_logits(timm.create_model("ceit_tiny", img_size=32, patch_size=4).eval(), torch.randn(1, 3, 32, 32))


def test_maps_keep_the_largest_logits_and_their_classes():
    logits = torch.randn(2, 3, 4, 9)
    maps = maps_of(logits)
    assert maps.shape == (2, 2, 5, 3, 4) and maps.dtype == torch.float16
    values, ids = logits[1, 2, 3].topk(5)
    assert maps[1, 1, :, 2, 3].tolist() == ids.tolist()
    assert maps[1, 0, :, 2, 3].tolist() == values.half().tolist()


# -------------------------------------------------------------------------------------------------------- the command


def test_a_volo_is_trained_with_the_maps_of_a_run(teacher, images, tmp_path, tiny_volo):
    files = label(teacher, images, tmp_path / "maps")
    assert [str(path.relative_to(tmp_path / "maps")) for path in files][:2] == ["a/000.pt", "a/001.pt"]
    assert len(files) == 24  # of the training images alone
    assert read_map(files[0], 3).shape == (2, 3, 8, 8)  # 16 px in patches of 2, and there are but 3 classes
    words = [
        *("model=volo_d1", "model.args={use_aux_head: true, use_mix_token: true}", "data=folder", "augment=deit"),
        *("data.image_size=32", "data.in_memory=false", "data.val_fraction=0", "data.max_train_samples=null"),
        *("augment.mixup=0", "augment.cutmix=0", "model.depth=null", "model.embed_dim=null", "model.num_heads=null"),
        *("trainer.batch_size=8", "trainer.max_steps=2", "optim.warmup_epochs=0", "data.num_workers=0"),
    ]
    run = runs.train(tmp_path, *words, f"data.root={images}", f"data.token_labels={tmp_path / 'maps'}")
    assert run.finished and [record["loss"] > 0 for record in run.records("step")] == [True, True]


def test_a_teacher_that_is_neither_a_model_nor_a_run_is_told(images, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher=resnet10x is no model of timm; teacher=resnet10x means no run"):
        label("resnet10x", images, tmp_path / "maps")


def test_a_model_of_timm_labels_with_weights_of_a_file(images, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    with pytest.raises(ConfigError, match=r"teacher=resnet10t"):  # of 1000 classes without them
        label("resnet10t", images, tmp_path / "maps", f"weights={weights}")
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    with pytest.raises(ConfigError, match="knows 1000 classes, which are not the 3"):
        label("resnet10t", images, tmp_path / "maps", f"weights={weights}")


def test_the_same_command_makes_what_is_missing_and_nothing_twice(teacher, images, tmp_path, capsys):
    files = label(teacher, images, tmp_path / "maps")
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    files[3].unlink()
    assert label(teacher, images, tmp_path / "maps") == files
    assert all(path.read_bytes() == content for path, (content, _) in first.items())
    assert [path for path, (_, time) in first.items() if path.stat().st_mtime_ns != time] == [files[3]]
    assert "24 maps" in capsys.readouterr().out


def test_an_interrupted_command_leaves_whole_files_alone_and_goes_on(teacher, images, tmp_path, monkeypatch):
    whole = {path.name: path.read_bytes() for path in label(teacher, images, tmp_path / "whole")}
    save, left = torch.save, [5]

    def failing(value, file, *args):
        left[0] -= 1
        if left[0] < 0:
            file.write(b"half")
            raise KeyboardInterrupt
        save(value, file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(KeyboardInterrupt):
            label(teacher, images, tmp_path / "cut", "batch_size=4")
    assert len(list((tmp_path / "cut").rglob("[!.]*.pt"))) == 5
    assert {path.name: path.read_bytes() for path in label(teacher, images, tmp_path / "cut")} == whole


def test_maps_of_two_teachers_are_not_mixed(teacher, images, tmp_path):
    label(teacher, images, tmp_path / "maps")
    facts = json.loads((tmp_path / "maps" / "teacher.json").read_text())
    assert facts == {"teacher": teacher.path.name, "size": 16}
    (tmp_path / "maps" / "teacher.json").write_text(json.dumps({**facts, "teacher": "another"}))
    with pytest.raises(ConfigError, match="take another folder"):
        label(teacher, images, tmp_path / "maps")


def test_images_that_cannot_be_labelled_are_named(teacher, images, tmp_path):
    os.rename(images / "train" / "a" / "001.png", images / "train" / "a" / "000.jpg")
    with pytest.raises(ConfigError, match=r"two images would have the label map a/000\.pt"):
        label(teacher, images, tmp_path / "maps")
    (images / "train" / "a" / "000.jpg").unlink()
    (images / "train" / "a" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*a/000\.png"):
        label(teacher, images, tmp_path / "maps")
    with pytest.raises(ConfigError, match="label maps belong to image files"):
        command.main([f"teacher={teacher.path}", f"output={tmp_path / 'maps'}", "data=digits"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["output=x"], "teacher= is missing"),
        (["teacher=resnet10t"], "output= is missing"),
        (["teacher=no_such_run", "output=x"], "teacher=no_such_run"),
        (["teacher=resnet10t", "output=x", "batch_size=0"], "batch_size=0 must be above 0"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(ConfigError, match=message):
        command.main(words)
