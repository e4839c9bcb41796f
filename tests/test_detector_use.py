"""A trained detector in use: dropkey.load, dropkey predict, dropkey export, and the pictures of what it finds."""

import csv
import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dropkey
import runs
import task_runs
from dropkey import exporting
from dropkey.analysis import box_figures, boxes, entropy, gallery, map_figures, trained
from dropkey.commands import export, predict, visualize
from dropkey.datasets import digit_scenes
from dropkey.detection.scenes import SceneBatch
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError
from dropkey.tasks.marks import Mark, judged

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "HELD_OUT", task_runs.HELD_OUT)
        yield


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tiny runs that differ in the regularizer."""
    place = tmp_path_factory.mktemp("detectors")
    words = (*task_runs.WORDS["detection"], "trainer.epochs=1", "optim.warmup_epochs=0")
    return [str(runs.train(place, f"regularizer={kind}", *words).path) for kind in ("none", "dropkey")]


@pytest.fixture(scope="module")
def model(two):
    return dropkey.load(two[1], device="cpu")


@pytest.fixture(scope="module")
def opened(two):
    return trained.open_run(two[1])


@pytest.fixture(scope="module")
def pictures(opened) -> list[Image.Image]:
    return [
        Image.fromarray((picture[0] * 255).round().byte().numpy()) for picture in opened.pictures(opened.spread(99))
    ]


@pytest.fixture(scope="module")
def files(pictures, tmp_path_factory) -> Path:
    """0.png to 2.png, of which the last is twice as wide."""
    place = tmp_path_factory.mktemp("files")
    for number, picture in enumerate(pictures[:3]):
        picture.resize((24 * (1 + number // 2), 24)).save(place / f"{number}.png")
    return place


# ------------------------------------------------------------------------------------------------------- dropkey.load


def test_predicted_boxes_are_those_of_the_evaluation(model, pictures, opened):
    scores = opened.task.scores()
    for batch in opened.task.eval_loader(opened.dataset, "test", DistContext(0, 1, torch.device("cpu"))):
        with torch.no_grad():
            scores.update(opened.task.predict(opened.model, batch), batch)
    answers = model.predict(pictures, threshold=0)
    assert len(answers) == len(scores.found) == task_runs.HELD_OUT
    for found, rows in zip(answers, scores.found, strict=True):
        rows = rows[np.argsort(-rows[:, 5], kind="stable")]
        assert [one["label"] for one in found] == [str(int(label)) for label in rows[:, 6]]
        assert [one["score"] for one in found] == pytest.approx(rows[:, 5].tolist(), abs=1e-5)
        places = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], axis=1)
        np.testing.assert_allclose([one["box"] for one in found], places, atol=1e-3)


def test_the_threshold_leaves_out_what_is_less_sure_and_the_surest_is_first(model, pictures):
    (all_of_them,) = model.predict(pictures[0], threshold=0)
    scores = [one["score"] for one in all_of_them]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True) and len(set(scores)) == 8
    (some,) = model.predict(pictures[0], threshold=scores[2])
    assert some == all_of_them[:3]
    assert model.predict(pictures[0], threshold=1) == [[]]
    assert model.predict(pictures[0], threshold=0).top(2) == [all_of_them[:2]]
    half = [one for one in all_of_them if one["score"] >= 0.5]
    assert model.predict(pictures[0]) == [half]


def test_boxes_are_in_pixels_of_the_original_image_whatever_it_is_resized_to(model, pictures, monkeypatch):
    large = pictures[0].resize((48, 48), Image.Resampling.NEAREST)
    monkeypatch.setattr(model.task, "eval_scale", 48)
    (of_large,), (of_small,) = model.predict(large, threshold=0), model.predict(pictures[0], threshold=0)
    for one, other in zip(of_large[:2], of_small[:2], strict=True):
        assert one["box"] == pytest.approx([2 * side for side in other["box"]], abs=3)


def test_images_of_unequal_size_are_padded_with_masks(model, files):
    names = [files / "0.png", files / "2.png"]
    alone = [model.predict(name, threshold=0)[0] for name in names]
    assert model.predict(names, threshold=0) == alone
    transformed = [model.transform(name) for name in names]
    batch = model.task.collate(transformed, torch.device("cpu"))
    assert batch.images.shape == (2, 1, 24, 48)
    assert batch.padding.sum((1, 2)).tolist() == [24 * 24, 0]
    with torch.no_grad():
        logits, places = model.model(batch.images, batch.padding)
    (small, wide) = model.predict(transformed, threshold=0, batch_size=2)
    for found, row, width in ((small, 0, 24), (wide, 1, 48)):
        probabilities, order = logits[-1, row].softmax(-1)[:, :-1].amax(-1).sort(descending=True)
        assert [one["score"] for one in found] == pytest.approx(probabilities.tolist(), abs=1e-6)
        centres = [(one["box"][0] + one["box"][2]) / 2 for one in found]
        assert centres == pytest.approx((width * places[-1, row, order, 0]).tolist(), abs=1e-3)
    assert wide[0]["box"] == pytest.approx(alone[1][0]["box"], abs=1e-3)  # the larger one is not padded


def test_monte_carlo_is_the_mean_of_the_passes_query_by_query(model, pictures):
    found = model.predict(pictures[:1], monte_carlo=3, threshold=0)
    with torch.inference_mode(), model.regularized():
        ((passes, _),) = model.outputs(pictures[:1], 3, 1)
    probabilities, places = (torch.stack(each)[:, 0] for each in zip(*passes, strict=True))
    assert not torch.equal(probabilities[0], probabilities[1])
    scores, labels = probabilities.mean(0)[:, :-1].max(-1)
    for one, query in zip(found[0], scores.argsort(descending=True).tolist(), strict=True):
        label = labels[query].item()
        assert (one["label"], one["score"]) == (str(label), pytest.approx(scores[query].item()))
        assert one["spread"] == pytest.approx(probabilities[:, query, label].std().item(), abs=1e-6)
        left, _, right, _ = one["box"]
        assert right - left == pytest.approx(24 * places[:, query, 2].mean().item(), abs=1e-4)
    assert found == model.predict(pictures[:1], monte_carlo=3, threshold=0)


def test_a_run_made_before_its_task_knew_how_it_is_used_is_loaded(two, model, tmp_path):
    file = Path(two[0]) / "model.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({"origin": info["origin"]}))
    assert dropkey.load(two[0], device="cpu").classes == [str(digit) for digit in range(10)]
    assert json.loads(file.read_text()) == info


# ---------------------------------------------------------------------------------------------------- dropkey predict


def said(capsys, two, *words) -> str:
    assert predict.main([f"run={two[1]}", "device=cpu", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_predict_prints_and_stores_the_boxes(two, model, files, capsys):
    names = sorted(map(str, files.glob("*.png")))
    found = model.predict(names, threshold=0)
    content = json.loads(said(capsys, two, files, "threshold=0", "format=json"))
    assert content == [{"image": name, "top": top} for name, top in zip(names, found, strict=True)]
    rows = list(csv.DictReader(io.StringIO(said(capsys, two, files, "threshold=0", "k=2", "format=csv"))))
    assert [row["image"] for row in rows] == [name for name in names for _ in range(2)]
    assert [float(row[f"box_{side}"]) for row in rows[:2] for side in predict.SIDES] == pytest.approx(
        [*found[0][0]["box"], *found[0][1]["box"]]
    )
    lines = said(capsys, two, files, "threshold=0", "k=2").splitlines()
    left, top, right, bottom = map(round, found[0][0]["box"])
    assert len(lines) == 6 and max(map(len, lines)) <= 80
    assert lines[0].split()[-2:] == [f"{left},{top}", f"{right},{bottom}"]
    assert len(said(capsys, two, files, "threshold=0").splitlines()) == 3 * 8  # without k= all boxes
    assert said(capsys, two, files, "threshold=1").count("nothing found") == 3


def test_drawn_images_keep_names_and_proportions_apart(two, files, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    Image.open(files / "0.png").save(tmp_path / "other" / "0.png")
    said(capsys, two, files, tmp_path / "other", "threshold=0", f"draw={tmp_path / 'drawn'}")
    sizes = {file.name: Image.open(file).size for file in (tmp_path / "drawn").iterdir()}
    square = (480, 480)
    names = {"0-boxes.png": square, "1-boxes.png": square, "2-boxes.png": (960, 480), "0-boxes-2.png": square}
    assert sizes == names


# ------------------------------------------------------------------------------------------------------ dropkey export


@pytest.mark.parametrize("format", ["safetensors", "torch_export"])  # onnx: as a command of the page, below
def test_an_exported_detector_gives_the_logits_and_boxes_of_the_model(format, model, tmp_path):
    file = tmp_path / f"out{exporting.SUFFIXES[format]}"
    difference, written = exporting.export(model, format, file)
    assert difference < 1e-4 and written[-1].exists() and file.exists()
    assert json.loads(file.with_suffix(".json").read_text())["label_names"] == model.classes
    if format == "torch_export":
        images = torch.randn(2, 1, 24, 24)
        gives_the_outputs_of(model, images, torch.export.load(file).module()(images))


def gives_the_outputs_of(model, images, found) -> None:
    with torch.inference_mode():
        wanted = [output[-1] for output in model.model(images)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------- right and wrong


def mark(label: str, *box: float, score=None, right=None) -> Mark:
    return Mark(torch.tensor([box]), label, score=score, right=right)


def test_an_answer_is_right_once_for_each_object_of_its_label_that_it_covers_by_half():
    truths = [mark("a", 0, 0, 0.4, 0.4), mark("b", 0.5, 0.5, 0.9, 0.9)]
    answers = [
        mark("a", 0, 0, 0.4, 0.3, score=0.9),
        mark("a", 0, 0, 0.4, 0.4, score=0.8),  # found before
        mark("a", 0.5, 0.5, 0.9, 0.9, score=0.7),  # another label
        mark("b", 0.7, 0.5, 1.1, 0.9, score=0.6),  # a third
    ]
    assert [one.right for one in judged(answers, truths)] == [True, False, False, False, True, False]
    found = boxes.Found(3, judged(answers, truths))
    assert (len(found.false), len(found.missed), str(found)) == (3, 1, "✗ 3 false, 1 missed")
    assert [(one.true, one.predicted) for one in boxes.mistaken_for(found)] == [("b", "a")]


def test_what_lies_in_a_group_of_objects_is_no_mistake():
    group, true = mark("a", 0.5, 0.5, 1, 1), mark("a", 0.5, 0.5, 0.7, 0.7)
    one, other, elsewhere = (mark("a", x, x, x + 0.2, x + 0.2, score=0.9) for x in (0.51, 0.7, 0.1))
    assert [each.right for each in judged([one, other, elsewhere], [true], [group])] == [True, None, False, True]


def test_a_pair_is_right_where_both_of_its_boxes_are():
    true = Mark(torch.tensor([[0, 0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]]), "ride")
    one = Mark(torch.tensor([[0, 0, 0.4, 0.4], [0.5, 0.1, 0.9, 0.5]]), "ride", score=0.9)
    both = Mark(true.boxes + 0.02, "ride", score=0.8)
    assert [each.right for each in judged([one, both], [true])] == [False, True, True]


def test_what_is_found_counts_what_the_batch_has(opened):
    looked = boxes.found(opened, opened.spread(99), 0.0)
    assert all(len(one.answers) == 8 for one in looked)
    assert [len(one.truths) for one in looked] == [len(r["annotations"]) for r in opened.dataset.test.records]
    for one, record in zip(looked, opened.dataset.test.records, strict=True):
        left, top, width, height = record["annotations"][0]["bbox"]
        place = torch.tensor([left, top, left + width, top + height]) / 24
        torch.testing.assert_close(one.truths[0].boxes[0], place)


# ------------------------------------------------------------------------------------------------------------ drawing


def test_lines_are_where_the_box_is():
    picture, box = torch.zeros(1, 60, 120), (0.25, 0.5, 0.75, 0.9)
    for right, color in ((True, box_figures.RIGHT), (False, box_figures.FALSE)):
        pixels = box_figures.as_pixels(box_figures.drawn(picture, [mark("7", *box, score=0.9, right=right)]))
        height, width, _ = pixels.shape
        assert (height, width) == (480, 960)
        wanted = torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        lit = (pixels - wanted).abs().amax(-1) < 0.1
        columns, rows = lit.sum(0), lit.sum(1)
        for share in box[::2]:  # two long vertical lines, and two horizontal ones
            assert columns[round(share * width) - 1 :][:3].max() > 0.9 * 0.4 * height
        for share in box[1::2]:
            assert rows[round(share * height) - 1 :][:3].max() > 0.9 * 0.5 * width
        assert not lit[int(0.55 * height) : int(0.85 * height), int(0.3 * width) : int(0.7 * width)].any()
        assert not lit[: int(0.4 * height)].any() and not lit[:, int(0.8 * width) :].any()


def test_the_truth_is_dashed_and_an_image_without_marks_stays_as_it_is():
    picture = torch.rand(3, 480, 500)
    torch.testing.assert_close(
        box_figures.as_pixels(box_figures.drawn(picture, [])), picture.permute(1, 2, 0), atol=0.01, rtol=0
    )
    pixels = box_figures.as_pixels(
        box_figures.drawn(torch.zeros(3, 480, 500), [mark("7", 0.2, 0.2, 0.8, 0.8, right=True)])
    )
    line = pixels[96, 110:390].amin(-1) > 0.5
    assert 0.3 < line.float().mean() < 0.8


# --------------------------------------------------------------------------------------------------- maps and entropy


def inputs_of(module, opened, batch) -> tuple[torch.Tensor, torch.Tensor]:
    kept = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[:2]))
    with torch.no_grad():
        opened.task.predict(opened.model, batch)
    handle.remove()
    return kept[0]


def softmax_of(module, queries, keys) -> torch.Tensor:
    """H Q K by hand, of one image."""
    weight, bias = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k = (
        (x[0] @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(0, 1)
        for x, w, b in ((queries, weight[0], bias[0]), (keys, weight[1], bias[1]))
    )
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1).detach()


def test_the_map_of_a_query_is_the_softmax_of_its_cross_attention(opened):
    (batch,) = opened.batches(torch.tensor([4]))
    module = opened.model.transformer.decoder.layers[1].multihead_attn
    by_hand = softmax_of(module, *inputs_of(module, opened, batch))
    assert by_hand.shape == (2, 8, 9)  # heads, queries, cells of 8 pixels
    for query in (2, 5):
        maps = boxes.query_maps(opened, [(4, query)])
        torch.testing.assert_close(maps.values[0], by_hand[:, query].mean(0).view(1, 3, 3))
        heads = boxes.query_maps(opened, [(4, query)], "all").values[0]
        torch.testing.assert_close(heads, by_hand[:, query].view(2, 3, 3))
        torch.testing.assert_close(heads.sum((1, 2)), torch.ones(2))
    one, other = boxes.query_maps(opened, [(4, 2), (4, 5)]).values
    assert (one - other).abs().max() > 1e-4


def test_the_map_of_a_point_is_the_row_of_its_cell_in_the_encoder(opened):
    (batch,) = opened.batches(torch.tensor([4]))
    module = opened.model.transformer.encoder.layers[0].self_attn
    by_hand = softmax_of(module, *inputs_of(module, opened, batch))
    maps, places = boxes.point_maps(opened, [4], (17, 9), layer=0)
    torch.testing.assert_close(maps.values[0], by_hand[:, 1 * 3 + 2].mean(0).view(1, 3, 3))  # row 1, column 2
    assert places == [(17 / 24, 9 / 24)] and maps.layer == 0
    other, _ = boxes.point_maps(opened, [4], (1, 1), layer=0)
    torch.testing.assert_close(other.values[0], by_hand[:, 0].mean(0).view(1, 3, 3))


def test_the_query_asked_for_an_object_is_the_surest_that_overlaps_it():
    true = mark("a", 0, 0, 0.4, 0.4)
    beside, half, all_of_it = (0.5, 0.5, 1, 1), (0, 0, 0.4, 0.2), (0, 0, 0.4, 0.4)
    answers = [mark("a", *beside, score=0.99), mark("b", *half, score=0.6), mark("a", *all_of_it, score=0.5)]
    assert boxes.asked(answers, true) is answers[2]
    assert boxes.asked(answers[:1], true) is answers[0]
    found = boxes.Found(0, [*answers, true])
    assert str(boxes.answer_to(found, answers[2], true)) == "✓ a 50 %"
    assert str(boxes.answer_to(found, answers[1], true)) == "✗ b 60 %, is a"
    assert str(boxes.answer_to(found, answers[0], true)) == "✗ no box, is a"


def test_entropy_is_of_the_encoder_and_of_both_attentions_of_the_decoder(opened):
    (one,), (other,) = (opened.batches(torch.tensor([number])) for number in (0, 1))
    wide = torch.cat([other.images, other.images], dim=-1)  # 3 x 6 cells
    both = entropy.measure_entropy(opened.model, [one.images, wide])
    named = [(row["stack"], row["kind"], row["keys"]) for row in both]
    layer = [("decoder", "self", 8), ("decoder", "cross", 14)]  # keys: 8 queries; 9 and 18 cells
    assert named == [("encoder", "self", 14)] * 2 + layer * 2
    alone = [entropy.measure_entropy(opened.model, [images]) for images in (one.images, wide)]
    for row, *parts in zip(both, *alone, strict=True):
        for key in ("nats", "normalised"):
            assert row[key] == pytest.approx(
                [sum(pair) / 2 for pair in zip(*(part[key] for part in parts), strict=True)]
            )
    module = opened.model.transformer.decoder.layers[1].multihead_attn
    rows = softmax_of(module, *inputs_of(module, opened, one))
    by_hand = -(rows * rows.log()).sum(-1).mean(-1)
    assert alone[0][5]["nats"] == pytest.approx(by_hand.tolist(), rel=1e-4)
    assert alone[0][5]["normalised"] == pytest.approx((by_hand / math.log(9)).tolist(), rel=1e-4)


def test_padding_changes_no_entropy_of_what_is_measured(opened):
    """Each image is measured alone, whatever the sizes of the others."""
    assert all(isinstance(batch, SceneBatch) and batch.padding is None for batch in opened.batches(opened.spread(9)))


# ----------------------------------------------------------------------------------------------------------- commands


def shown(monkeypatch, module, *words):
    found = []
    monkeypatch.setattr(module, "save", lambda figure, path: found.append(figure))
    visualize.main(list(words))
    return found[0]


def test_compare_has_a_row_per_object_with_the_box_of_each_run(two, monkeypatch):
    figure = shown(monkeypatch, map_figures, "compare", f"run={','.join(two)}", "images=0,1,2")
    records = trained.open_run(two[0]).dataset.test.records[:3]
    objects = sum(min(len(record["annotations"]), boxes.OBJECTS) for record in records)
    maps, beside = figure.subfigs
    assert len(maps.axes) == 3 * objects
    assert all(len(axis.patches) == 1 for axis in maps.axes)  # the true box, or the found one
    ticks = [label.get_text() for label in beside.axes[0].get_xticklabels()]
    assert ticks == ["1\nencoder\nself", "2", "1\ndecoder\nself", "2", "1\ndecoder\ncross", "2"]
    lines = [line for line in beside.axes[0].lines if line.get_linestyle() == "-"]
    assert len(lines) == 2 * 3


def test_maps_of_heads_and_of_a_point(two, monkeypatch):
    figure = shown(monkeypatch, map_figures, "maps", f"run={two[0]}", "images=0", "head=all")
    objects = min(2, len(trained.open_run(two[0]).dataset.test.records[0]["annotations"]))
    assert len(figure.axes) == objects * (1 + 2)
    figure = shown(monkeypatch, map_figures, "maps", f"run={','.join(two)}", "images=0,1", "point=3,20")
    assert len(figure.axes) == 2 * (1 + 2)
    (ring,) = figure.axes[2].lines
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((3, 20))


def test_boxes_of_runs_stand_side_by_side(two, monkeypatch):
    figure = shown(monkeypatch, box_figures, "boxes", f"run={','.join(two)}", "images=0,5,9", "threshold=0")
    assert len(figure.axes) == 3 * 2
    assert figure.axes[0].get_title().startswith("no regularizer\nAP ")
    records = trained.open_run(two[0]).dataset.test.records
    for axis, position in zip(figure.axes[::2], (0, 5, 9), strict=True):
        assert len(axis.patches) == 8 + len(records[position]["annotations"])
        assert "false" in axis.get_xlabel() and axis.get_ylabel() == f"test {position}"


def test_the_gallery_counts_what_is_false_and_what_is_missed(two, tmp_path):
    visualize.main(["gallery", f"run={two[1]}", f"output={tmp_path / 'page.html'}"])
    page, looked = (tmp_path / "page.html").read_text(), boxes.found(trained.open_run(two[1]), torch.arange(13))
    missed, there = (
        sum(len(part) for part in parts) for parts in zip(*((o.missed, o.truths) for o in looked), strict=True)
    )
    false = sum(len(one.false) for one in looked)
    assert f"In 13 test images with {there:,} objects, {missed:,} are missed and {false:,} boxes are false" in page
    worst = sum(bool(one.false or one.missed) for one in looked)
    assert page.split("Worst mistakes")[1].count('<figure class="wrong">') == min(worst, gallery.SHOWN)
    assert "Every head" not in page and "<b>AP" not in page


PAGE = (Path(__file__).parents[1] / "docs" / "detection.md").read_text()
LINES = re.findall(r"^python scripts/.*run=\$DETR.*$", PAGE, re.M)
COMMANDS = [shlex.split(line, comments=True)[1:] for line in LINES]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_page_on_detection_work(words, two, files, tmp_path, monkeypatch, capsys):
    if "format=onnx" in words:
        pytest.importorskip("onnxscript", reason="comes with pip install 'dropkey[export]'")
    shutil.copytree(files, tmp_path / "pictures")
    shutil.copy(files / "0.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    script, *given = [word.replace("$DETR", two[1]) for word in words]
    main = {"predict": predict.main, "visualize": visualize.main, "export": export.main}[Path(script).stem]
    assert not main(given)
    kind, _, file = capsys.readouterr().out.splitlines()[-1].partition(" ")
    assert kind not in ("picture", "page") or Path(file).stat().st_size > 5000
    if "format=onnx" in words:
        session = pytest.importorskip("onnxruntime").InferenceSession("detr.onnx")
        assert [one.name for one in session.get_outputs()] == ["logits", "boxes"]
        images = torch.randn(2, 1, 24, 24)
        found = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        gives_the_outputs_of(dropkey.load(two[1], device="cpu"), images, found)


def test_python_of_the_page_on_detection_runs(two, files, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    shutil.copytree(two[1], tmp_path / "runs" / Path(two[1]).name)
    shutil.copy(files / "0.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "detection.md", "exec"), {})
    assert capsys.readouterr().out == "[]\n"  # nothing is found after so short a training


def test_the_page_on_detection_shows_every_action_on_boxes():
    actions = {words[1] for words in COMMANDS if words[0] == "scripts/visualize.py"}
    assert actions == {*visualize.OF_RUNS} - {"meshes"}


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "boxes run=RUN threshold=1.5": "threshold=1.5 must be in [0, 1]",
    "boxes run=CLASSES": "finds no boxes; choose maps or compare",
    "boxes run=RUN images=99": "the test split has 13 images",
    "boxes run=RUN,CLASSES": "different tasks (detection, classification)",
    "maps run=RUN,CLASSES images=0": "draw them in pictures of their own",
    "maps run=CLASSES point=3,4": "point= is for runs that find boxes",
    "maps run=RUN point=24,3": "point=24,3 is outside of test image 0, which has 24 x 24 pixels",
    "maps run=RUN point=-1,3": "is outside of",
    "maps run=RUN point=3": "must be x,y",
    "maps run=RUN head=rollout": "queries have no rollout",
    "maps run=RUN head=7": "head=7: the layer has 2 heads",
    "maps run=RUN layer=2": "the layers that look at the image are 3, 5",
    "maps run=RUN layer=5 point=1,1": "the layers that look at the image are 0, 1",
    "maps run=RUN layer=9": "layer=9",
}


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    return str(runs.train(tmp_path_factory.mktemp("classes"), *runs.ONE_EPOCH).path)


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_drawn_is_one_line(words, two, of_classes):
    with pytest.raises(ConfigError) as error:
        visualize.main(words.replace("RUN", two[0]).replace("CLASSES", of_classes).split())
    assert REFUSED[words] in str(error.value) and "\n" not in str(error.value)


def test_what_predict_and_export_cannot_do_is_one_line(model, two, of_classes, files, tmp_path):
    for run, words, message in (
        (two[0], "threshold=2", r"threshold=2\.0 must be in \[0, 1\]"),
        (of_classes, "threshold=0.3", r"threshold=0\.3 is for runs that find boxes"),
        (of_classes, f"draw={tmp_path}", "draw=.* is for runs that find boxes"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict.main([f"run={run}", str(files / "0.png"), "device=cpu", words])
    with pytest.raises(ConfigError, match="format=timm is for classifiers"):
        exporting.export(model, "timm", tmp_path / "out")
