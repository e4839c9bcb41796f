"""What happens to a run of detection: interruptions, damaged pictures, losses that are not finite, other data
(faults 1-3, 15, 18, 22), and DETR with ResNet-50 from a folder as COCO's to its figures."""

import functools
import json
import shutil

import pytest
import torch

import coco_folder
import detection_run
import processes
import runs
from dropkey import evaluation, plotting
from dropkey.config.schema import DataConfig, EvalConfig, EvaluationConfig
from dropkey.detection.average_precision import FIGURES
from dropkey.engine import checkpoint
from dropkey.errors import DataError
from dropkey.models import detr
from dropkey.records import RunDirectory

pytest.importorskip("pycocotools")

CELLS = [detection_run.Cell("dropkey", "decreasing", "", moment) for moment in ("within an epoch", "at its end")]
CELLS.append(detection_run.Cell("dropout", "constant", "", "in evaluation"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plotting, "curves", lambda *args: None)


@pytest.mark.fault(1, 3, 15)
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_with_everything_on_resumes_bitwise_identically_in_a_new_process(tmp_path, count):
    """Workers, accumulation, moving average, bf16, images of many sizes."""
    run = processes.run if count == 1 else functools.partial(processes.torchrun, processes=count)
    for stage in (detection_run.begin, detection_run.resume):
        done = run(stage, CELLS, tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    for cell in CELLS:
        whole, parts = cell.run(tmp_path / "whole"), cell.run(tmp_path / "parts")
        assert "resuming" in (parts.path / "log.txt").read_text()
        for file in ("last.pt", "best.pt"):
            assert runs.unequal(runs.state(whole, file), runs.state(parts, file)) is None, cell
        assert runs.records(whole) == runs.records(parts), cell


@pytest.mark.fault(22)
def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_update(tmp_path):
    done = processes.torchrun(detection_run.poisoned, tmp_path, timeout=600)
    assert done.returncode == 4 and done.stderr.count("error: loss ") == 1, done.stderr
    (path,) = tmp_path.glob("detr*")
    assert RunDirectory(path).status()["state"] == "diverged"
    assert checkpoint.load(path / "checkpoints" / "last.pt")["position"]["global_step"] == 3
    first, second = json.loads((path / "diverged.json").read_text())["processes"]
    assert "nan" not in first["loss"] and second["loss"] == "nan"
    assert len({*first["sample_ids"], *second["sample_ids"]}) == 16


@pytest.mark.fault(18)
def test_two_processes_find_the_average_precision_of_one_at_any_batch_size(tmp_path, monkeypatch):
    monkeypatch.setattr(detection_run.digit_scenes, "HELD_OUT", detection_run.HELD_OUT)
    run = runs.train(tmp_path / "run", *detection_run.WORDS, "trainer.max_steps=4")
    sizes, results = (1, 4, 5, 13), []
    for number in (1, 2):
        file = tmp_path / f"{number}.json"
        done = processes.torchrun(detection_run.evaluated, run.path, file, sizes, processes=number, timeout=600)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(file.read_text()))
    for size in map(str, sizes):
        one, two = ({key: result[size][key] for key in (*FIGURES, "samples")} for result in results)
        assert one == two and one["samples"] == detection_run.HELD_OUT and 20 < one["ap"] < 99


# --------------------------------------------------------------------------------------------- a folder as COCO's

SMALL = (
    *("task=detection", "model=detr_digits", "model.pretrained=false", "data=coco", "data.num_workers=1"),
    *("data.max_train_samples=null", "trainer.epochs=2", "optim.clip_grad_norm=1.0", "trainer.batch_size=4"),
)
AUGMENT = "task.args={scales: [32, 40], max_size: 64, crop_scales: [32], crop_sides: [20, 30], eval_scale: 32}"


@pytest.fixture
def root(tmp_path):
    return coco_folder.write(tmp_path / "coco")


def words(root) -> tuple[str, ...]:
    return *SMALL, AUGMENT, f"data.root={root}"


@pytest.mark.fault(2)
def test_a_picture_that_is_damaged_in_training_is_named_and_once_restored_the_run_goes_on(root, tmp_path):
    whole, path = runs.train(tmp_path / "whole", *words(root)), root / "train2017" / "000000000005.jpg"
    intact = path.read_bytes()
    done = processes.run(detection_run.damaged, tmp_path / "parts", words(root), path, timeout=600)
    assert done.returncode == 3 and f"error: cannot read image {path}" in done.stderr and "Trace" not in done.stderr
    (place,) = (tmp_path / "parts").glob("detr*")
    assert checkpoint.load(place / "checkpoints" / "last.pt")["position"]["epoch"] == 1
    path.write_bytes(intact)
    parts = runs.train(tmp_path / "parts", *words(root))
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.records(whole) == runs.records(parts)


def test_a_run_is_evaluated_where_its_data_are_now_and_on_other_data(root, tmp_path):
    run = runs.train(tmp_path / "runs", *words(root), "trainer.epochs=1", "optim.warmup_epochs=0")
    trained = runs.config(tmp_path / "runs", *words(root), "trainer.epochs=1", "optim.warmup_epochs=0")
    moved = shutil.move(root, tmp_path / "moved")

    def evaluate(**keys):
        cfg = EvalConfig(run=str(run.path), eval=EvaluationConfig(device="cpu"), **keys)
        return evaluation.evaluate_run(cfg, trained, run.path)[0]

    again = evaluate(root=str(moved))
    assert {key: again[key] for key in FIGURES} == {key: run.summary()[key] for key in FIGURES}
    other = coco_folder.write(tmp_path / "other", train=2, val=5)
    data = DataConfig(name="coco_format", root=str(other), in_memory=False, num_workers=0)
    assert evaluate(data=data)["samples"] == 5
    coco_folder.edit(moved / "annotations/instances_val2017.json", lambda content: content["annotations"].pop())
    with pytest.raises(DataError, match="data"):
        evaluate(root=str(moved))


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
