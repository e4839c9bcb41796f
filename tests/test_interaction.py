"""The interaction task: its figures, exact over processes; the loop's promises; what is refused."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interaction_run
import processes
import runs
from dropkey import evaluation, tasks
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.config.schema import EvalConfig, EvaluationConfig
from dropkey.datasets import digit_pairs, digit_scenes
from dropkey.detection.pair_loss import targets
from dropkey.detection.scenes import SceneBatch
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError, DataError, Interrupted
from dropkey.records import RunDirectory
from dropkey.reproduction import cost
from dropkey.tasks.interaction import LABELS

ALONE = DistContext(0, 1, torch.device("cpu"))
VERBS = len(digit_pairs.VERBS)

# ------------------------------------------------------------------------------------------------- scores of the task


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "HELD_OUT", interaction_run.HELD_OUT)
        yield


@pytest.fixture(scope="module")
def task(few, tmp_path_factory):
    return tasks.build(runs.config(tmp_path_factory.mktemp("task"), *interaction_run.WORDS))


@pytest.fixture(scope="module")
def data(task):
    data = task.load_data()
    task.build_model(data, pretrained=False, fused=True)
    return data


def outputs(batch: SceneBatch, queries: int = 8, move: float = 0.0, shuffled: bool = False) -> list[torch.Tensor]:
    """What a model would give that finds all, with its objects' boxes moved by a share of the image, or with the verbs
    of other pairs."""
    size = len(batch), queries
    objects, verbs = torch.zeros(*size, 11), torch.zeros(*size, VERBS)
    boxes = [torch.full((*size, 4), 0.5) for _ in range(2)]
    objects[..., -1] = 1
    for image, pairs in enumerate(targets(batch, VERBS)):
        n = range(len(pairs))
        objects[image, n, pairs.objects] = 0.9 + 0.01 * batch.ids[image] / 100
        verbs[image, n] = 0.9 * (pairs.verbs.roll(1, -1) if shuffled else pairs.verbs)
        boxes[0][image, n] = pairs.subject_boxes
        boxes[1][image, n] = pairs.object_boxes + torch.tensor([move, 0, 0, 0])
    return [objects, verbs, *boxes]


def scored(task, data, world_size: int = 1, batch_size: int = 5, **options) -> dict:
    """As so many processes would, which are run one after the other."""
    parts = []
    for rank in range(world_size):
        scores = task.scores()
        for batch in task.eval_loader(data, "test", DistContext(rank, world_size, torch.device("cpu")), batch_size):
            if len(batch):
                scores.update(outputs(batch, **options), batch)
        parts.append(scores)
    together = SimpleNamespace(
        is_main=True, gather=lambda own: [(p.records, p.found) for p in parts], broadcast=lambda value: value
    )
    return parts[0].compute(together)


def test_a_model_that_finds_all_has_a_mean_average_precision_of_100(task, data):
    result = scored(task, data)
    assert [result[key] for key in ("full", "ko_full", "recall")] == pytest.approx([100] * 3)
    assert result["samples"] == interaction_run.HELD_OUT


def test_moved_boxes_and_other_verbs_lower_it(task, data):
    values = [scored(task, data, move=move)["full"] for move in (0, 0.06, 0.1, 0.2)]
    assert values == sorted(values, reverse=True) and values[-1] == 0
    # on so few images all verbs of all pairs are among the hundred best, the right ones too
    assert scored(task, data, shuffled=True)["full"] < 80


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_of_several_processes_are_those_of_one(task, data, world_size):
    for batch_size in (4, 5):
        assert scored(task, data, world_size, batch_size, move=0.06) == scored(task, data, move=0.06)


def test_boxes_are_those_of_the_original_image(task, data):
    """The sizes in the record count, not those that the model saw."""
    batch = next(iter(task.eval_loader(data, "test", ALONE, 1)))
    batch.records[0] = {**batch.records[0], "width": 240, "height": 480}
    scores, (pairs,) = task.scores(), targets(batch, VERBS)
    scores.update(outputs(batch), batch)
    x, y, width, height = (pairs.subject_boxes[0] * 24).tolist()
    corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * [10, 20, 10, 20]
    assert any(row[:4] == pytest.approx(corners, abs=1e-3) for row in scores.found[0])


def test_verbs_that_an_object_cannot_have_score_nothing(task, data, monkeypatch):
    possible = np.ones((VERBS, 10), dtype=bool)
    possible[4] = False
    monkeypatch.setattr(task, "possible", possible)
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        scores.update(outputs(batch), batch)
    rows = np.concatenate(scores.found)
    assert not rows[rows[:, 9] == 4, 10].any() and rows[rows[:, 9] < 4, 10].max() > 0.8


def test_a_split_without_interactions_is_one_line(task, data):
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        batch.records = [{**record, "pairs": []} for record in batch.records]
        scores.update(outputs(batch), batch)
    with pytest.raises(DataError, match="no image of the evaluated split has an interaction"):
        scores.compute(ALONE)


def test_normalisers_are_read_from_the_batch_and_summed_over_its_parts(task, data):
    whole, parts = (list(task.eval_loader(data, "train", ALONE, size)) for size in (16, 4))
    parts = [task.normalisers(batch) for batch in parts[:4]]
    assert task.normalisers(whole[0]) == {key: sum(part[key] for part in parts) for key in parts[0]}


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("interaction"), *interaction_run.WORDS)


def test_a_run_says_what_it_found(finished):
    summary = finished.summary()
    assert [metric["key"] for metric in summary["metrics"]] == list(LABELS)
    assert summary["samples"] == interaction_run.HELD_OUT
    parts = {"task/interaction", "task/detection", "detection", "dataset/digit_pairs", "model/qpic", "model/detr"}
    assert summary["code"].keys() >= parts and "missing" not in summary["code"].values()
    log = (finished.path / "log.txt").read_text()
    assert "dropkey (decreasing) at 4 attention layers" in log and "48 training, 13 validation, 13 test images" in log
    assert "5 verbs and" in log
    losses = [record["loss"] for record in finished.records("step")]
    assert losses[-1] < losses[0]


def test_an_interrupted_run_resumes_bitwise_identically(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.on_step(patch, 2, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, *interaction_run.WORDS)
    resumed = runs.train(tmp_path, *interaction_run.WORDS)
    assert runs.unequal(runs.state(finished), runs.state(resumed)) is None
    assert runs.records(finished) == runs.records(resumed)


def test_two_processes_give_the_losses_and_the_figures_of_one(tmp_path, few):
    words = ("regularizer=none", "optim=sgd", "optim.lr=1e-3", "trainer.epochs=1", "optim.warmup_epochs=0")
    done = processes.torchrun(interaction_run.main, str(tmp_path / "two"), words)
    assert done.returncode == 0, done.stderr
    two = RunDirectory(next(path for path in (tmp_path / "two").iterdir() if (path / "config.yaml").exists()))
    one = runs.train(tmp_path / "one", *interaction_run.WORDS, *words)
    parts = runs.train(tmp_path / "parts", *interaction_run.WORDS, *words, "trainer.grad_accum_steps=4")
    losses = [[record["loss"] for record in run.records("step")] for run in (one, two, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)
    for key in ("full", "ko_full", "recall", "samples"):
        assert two.summary()[key] == pytest.approx(one.summary()[key], abs=1e-3)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"monte_carlo": 2}], ids=str)
def test_a_run_is_evaluated(finished, options):
    cfg = EvalConfig(run=str(finished.path), eval=EvaluationConfig(**options))
    result, _ = evaluation.evaluate_run(cfg, runs.config(finished.path.parent, *interaction_run.WORDS), finished.path)
    assert result["samples"] == interaction_run.HELD_OUT
    if "batch_size" in options:
        assert result["full"] == pytest.approx(finished.summary()["full"], abs=1e-3)


def test_sixteen_images_are_learned_by_heart(task):
    """Network, matching, losses and evaluation agree on what a pair is."""
    small = copy.deepcopy(task)
    small.cfg.data.max_train_samples = 16
    data = small.load_data()
    torch.manual_seed(0)
    model = small.build_model(data, pretrained=False, fused=True)
    batch = next(iter(small.eval_loader(data, "train", ALONE, 16)))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        divisors = small.normalisers(batch)
        sum(value / divisors[key] for key, value in small.losses(model.train(), batch).items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    scores = small.scores()
    with torch.no_grad():
        scores.update(small.predict(model.eval(), batch), batch)
    assert scores.compute(ALONE)["full"] > 80


STEPS = 400


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "model=qpic_digits data=digit_pairs": "add task=interaction",
    "task=interaction model=qpic_r50 model.pretrained=false data=digit_pairs": "frozen BatchNorms",
    "task=interaction model=qpic_digits data=digit_scenes": "data.name=digit_scenes has no interactions",
    "task=interaction model=qpic_digits data=digits": "data.name=digits is none for this task",
    "task=interaction model=qpic_digits data=digit_pairs augment.hflip=0.5": "left and right are verbs",
    "task=interaction model=qpic_digits data=digit_pairs augment.mixup=0.2": "task=interaction has augment.hflip",
    "task=interaction model=vit_4x64 data=digit_pairs": "model.name=vit",
    "task=detection model=qpic_digits data=digit_pairs": "finds no boxes for task=detection, which takes detr_r50",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_one_line(words, tmp_path, few):
    with pytest.raises(ConfigError, match=REFUSED[words]) as error:
        cfg = runs.config(tmp_path, *words.split(), *(["data.image_size=24"] if "data=digit_" in words else []))
        task = tasks.build(cfg)
        task.build_model(task.load_data(), pretrained=False, fused=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("experiment, millions", [("digits_qpic", 0.26), ("hico_qpic_r50", 41.7)])
def test_the_cost_of_a_table_is_planned_without_data(experiment, millions):
    _, parameters = cost.of_model(check(compose([f"experiment={experiment}"])))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
