"""The detection task: average precision, warming up, DETR with ResNet-50. What all tasks have in common:
test_every_task.py and test_task_faults.py."""

import numpy as np
import pytest
import torch

import coco_folder
import runs
import task_runs
from dropkey import evaluation, records, session
from dropkey.config.schema import DataConfig, EvalConfig, EvaluationConfig
from dropkey.detection import average_precision as figures
from dropkey.detection.average_precision import average_precision
from dropkey.detection.scenes import SceneBatch
from dropkey.detection.warm_up import shown, warm_up
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError
from dropkey.models import detr

pytest.importorskip("pycocotools")
ALONE = DistContext(0, 1, torch.device("cpu"))

# ------------------------------------------------------------------------------------------- average precision by hand


def image(number: int, *boxes, **extra) -> dict:
    """A record of 200 x 100 pixels with boxes of (category, left, top, width, height)."""
    annotations = [
        {"id": 1000 * number + row + 1, "image_id": number, "category_id": box[0], "bbox": list(box[1:])}
        | {"area": box[3] * box[4], "iscrowd": 0, **extra}
        for row, box in enumerate(boxes)
    ]
    return {"id": number, "width": 200, "height": 100, "annotations": annotations}


def found(*rows) -> np.ndarray:
    """(image, score, category, left, top, width, height) of each detection."""
    return np.array([(row[0], *row[3:], row[1], row[2]) for row in rows], dtype=np.float64).reshape(-1, 7)


BOX = (10, 10, 10, 10)
CASES = {
    "all found": ([image(1, (3, *BOX)), image(2)], found((1, 0.9, 3, *BOX)), (100, 100, 100)),
    # precision 1 up to a recall of one half: 51 of the 101 points
    "half found": ([image(1, (3, *BOX)), image(2, (3, *BOX))], found((1, 0.9, 3, *BOX)), [100 * 51 / 101] * 3),
    "a false one before": ([image(1, (3, *BOX)), image(2)], found((2, 0.9, 3, *BOX), (1, 0.5, 3, *BOX)), (50, 50, 50)),
    "a false one after": (
        [image(1, (3, *BOX)), image(2)],
        found((2, 0.4, 3, *BOX), (1, 0.5, 3, *BOX)),
        (100, 100, 100),
    ),
    "found twice": ([image(1, (3, *BOX))], found((1, 0.9, 3, *BOX), (1, 0.8, 3, *BOX)), (100, 100, 100)),
    # two pixels aside: an overlap of 8 / 12, enough for the thresholds .50 to .65
    "aside": ([image(1, (3, *BOX))], found((1, 0.9, 3, 12, 10, 10, 10)), (40, 100, 0)),
    "another category": ([image(1, (3, *BOX))], found((1, 0.9, 4, *BOX)), (0, 0, 0)),
    "the mean over categories": ([image(1, (3, *BOX), (0, 50, 50, 9, 9))], found((1, 0.9, 3, *BOX)), (50, 50, 50)),
    "nothing found": ([image(1, (3, *BOX))], found(), (0, 0, 0)),
    "nothing there": ([image(1), image(2)], found((1, 0.9, 3, *BOX)), (None, None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_average_precision_of_cases_by_hand(case):
    records, detections, expected = CASES[case]
    result = average_precision(records, detections)
    assert [result[key] for key in ("ap", "ap50", "ap75")] == [pytest.approx(one, abs=1e-6) for one in expected]


def test_sizes_are_told_apart_by_the_area_of_the_annotation():
    records = [image(1, (3, *BOX), (3, 50, 20, 40, 40))]
    result = average_precision(records, found((1, 0.9, 3, *BOX), (1, 0.8, 3, 120, 20, 40, 40)))
    assert [result[f"ap_{size}"] for size in ("small", "medium", "large")] == [pytest.approx(100), 0, None]


def test_what_lies_in_a_group_of_objects_is_not_false():
    records = [image(1, (3, *BOX))]
    group = image(1, (3, 50, 50, 40, 40), iscrowd=1)["annotations"][0] | {"id": 7}
    detections = found((1, 0.9, 3, 55, 55, 10, 10), (1, 0.8, 3, *BOX))
    assert average_precision(records, detections)["ap"] == pytest.approx(50)
    records[0]["annotations"].append(group)
    assert average_precision(records, detections)["ap"] == pytest.approx(100)


def test_without_pycocotools_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"pip install 'dropkey\[detection\]'"):
        figures.average_precision([], found())


# ------------------------------------------------------------------------------------------------- scores of the task


@pytest.fixture(scope="module")
def opened():
    with task_runs.few():
        yield task_runs.opened("detection")


@pytest.fixture(scope="module")
def task(opened):
    return opened[0]


@pytest.fixture(scope="module")
def data(opened):
    return opened[1]


def scored(task, data, move: float = 0.0) -> dict:
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        scores.update(task_runs.boxes(batch, move=move), batch)
    return scores.compute(ALONE)


def test_a_model_that_finds_all_has_an_average_precision_of_100(task, data):
    result = scored(task, data)
    assert result["ap"] == pytest.approx(100) and result["samples"] == task_runs.HELD_OUT


def test_moving_the_boxes_lowers_it(task, data):
    values = [scored(task, data, move)["ap"] for move in (0, 0.02, 0.05, 0.1)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    assert scored(task, data, 0.02)["ap50"] == pytest.approx(100)


def test_boxes_are_those_of_the_original_image(task, data):
    """The sizes in the record count, not those that the model saw."""
    batch = next(iter(task.eval_loader(data, "test", ALONE, 1)))
    batch.records[0] = {**batch.records[0], "width": 240, "height": 480}
    scores = task.scores()
    scores.update(task_runs.boxes(batch), batch)
    left, top, width, height = scores.found[0][0, 1:5] / [10, 20, 10, 20]
    assert [left, top, width, height] == pytest.approx(batch.records[0]["annotations"][0]["bbox"], abs=1e-4)


def test_sizes_that_do_not_occur_are_null_and_not_shown(task, data):
    summary = session.rounded(task, scored(task, data))
    line = records.shown_figures(summary, summary["metrics"])
    assert summary["ap_medium"] is None and "medium" not in line and "AP small" in line


# --------------------------------------------------------------------------------------------------- warming up


def test_a_cell_shows_the_box_that_covers_its_centre():
    boxes = [torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.875, 0.5, 0.25]])]
    batch = SceneBatch(torch.zeros(1, 1, 8, 8), None, [torch.tensor([4, 7])], boxes, [], [{}], torch.zeros(1))
    assert shown(batch, (4, 4), 10).tolist() == [[[4, 4, 10, 10], [4, 4, 10, 10], [4, 4, 10, 10], [4, 7, 7, 10]]]


def test_warming_up_is_reproducible_and_teaches(task, data):
    def warmed(steps):
        torch.manual_seed(0)
        backbone = task.build_model(data, pretrained=False, fused=True).backbone[0]
        return warm_up(backbone, data.train, task.normalize("cpu"), 10, steps, 0), backbone.state_dict()

    first, again = warmed(12), warmed(12)
    assert runs.unequal(first[1], again[1]) is None and first[0] == again[0]
    assert warmed(150)[0] > first[0] + 0.1


# ------------------------------------------------------------------------------------------------- DETR on other data


def test_a_run_is_evaluated_on_other_data(tmp_path):
    words = task_runs.on_files("detection", coco_folder.write(tmp_path / "coco"))
    run = runs.train(tmp_path / "runs", *words, *runs.ONE_EPOCH)
    other = coco_folder.write(tmp_path / "other", train=2, val=5)
    data = DataConfig(name="coco_format", root=str(other), in_memory=False, num_workers=0)
    cfg = EvalConfig(run=str(run.path), data=data, eval=EvaluationConfig(device="cpu"))
    trained = runs.config(tmp_path / "runs", *words, *runs.ONE_EPOCH)
    assert evaluation.evaluate_run(cfg, trained, run.path)[0]["samples"] == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_detr_with_resnet_50_trains_on_images_of_many_sizes_and_leaves_frozen_parts_alone(tmp_path, workers):
    """Two steps, from random weights. What is frozen: the stem, the first stage, all BatchNorms."""
    root = coco_folder.write(tmp_path / "coco", train=8, val=2, sides=(64, 120))
    torch.manual_seed(0)
    sizes = {"num_classes": 91, "depth": 2, "embed_dim": 32, "num_heads": 2}
    first = detr.detr_r50(**sizes).state_dict()
    torch.save(first, tmp_path / "start.pt")
    run = runs.train(
        tmp_path,
        *("task=detection", "model=detr_r50", "model.pretrained=false", f"init_from={tmp_path / 'start.pt'}"),
        *("data=coco", f"data.root={root}", f"data.num_workers={workers}", "data.max_train_samples=null"),
        *("trainer.epochs=1", "trainer.batch_size=4", "optim.warmup_epochs=0", "optim.lr=1e-3"),
        *("optim.clip_grad_norm=0.1", "optim.lr_scale={backbone: 0.1}", "optim.filter_bias_and_bn=false"),
        *("augment.hflip=0.5", "task.args={scales: [64, 96], max_size: 128, eval_scale: 64}"),
    )
    losses = [record["loss"] for record in run.records("step")]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite()) and run.summary()["samples"] == 2
    last = runs.state(run)["model"]
    frozen = {name for name in first if torch.equal(first[name], last[name])}
    body = "backbone.0.body."
    norms = {name for name in first if name.startswith(body) and (".bn" in name or ".downsample.1." in name)}
    stem = {name for name in first if name.startswith((f"{body}conv1", f"{body}bn1", f"{body}layer1"))}
    assert norms | stem <= frozen
    learned = {name for name in first if name.startswith((f"{body}layer2", f"{body}layer3", f"{body}layer4"))} - norms
    assert learned and not learned & frozen
    assert not any(name.startswith("transformer.encoder.layers.0") for name in frozen)
