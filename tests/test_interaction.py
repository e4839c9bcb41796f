"""The interaction task: its figures. What all tasks have in common: test_every_task.py and test_task_faults.py."""

import numpy as np
import pytest
import torch

import task_runs
from dropkey.datasets import digit_pairs
from dropkey.detection.pair_loss import targets
from dropkey.engine.distributed import DistContext
from dropkey.errors import DataError
from task_runs import paired

ALONE = DistContext(0, 1, torch.device("cpu"))
VERBS = len(digit_pairs.VERBS)

# ------------------------------------------------------------------------------------------------- scores of the task


@pytest.fixture(scope="module")
def opened():
    with task_runs.few():
        yield task_runs.opened("interaction")


@pytest.fixture(scope="module")
def task(opened):
    return opened[0]


@pytest.fixture(scope="module")
def data(opened):
    return opened[1]


def scored(task, data, **options) -> dict:
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        scores.update(paired(batch, **options), batch)
    return scores.compute(ALONE)


def test_a_model_that_finds_all_has_a_mean_average_precision_of_100(task, data):
    result = scored(task, data)
    assert [result[key] for key in ("full", "ko_full", "recall")] == pytest.approx([100] * 3)
    assert result["samples"] == task_runs.HELD_OUT


def test_moved_boxes_and_other_verbs_lower_it(task, data):
    values = [scored(task, data, move=move)["full"] for move in (0, 0.06, 0.1, 0.2)]
    assert values == sorted(values, reverse=True) and values[-1] == 0
    # on so few images all verbs of all pairs are among the hundred best, the right ones too
    assert scored(task, data, shuffled=True)["full"] < 80


def test_boxes_are_those_of_the_original_image(task, data):
    """The sizes in the record count, not those that the model saw."""
    batch = next(iter(task.eval_loader(data, "test", ALONE, 1)))
    batch.records[0] = {**batch.records[0], "width": 240, "height": 480}
    scores, (pairs,) = task.scores(), targets(batch, VERBS)
    scores.update(paired(batch), batch)
    x, y, width, height = (pairs.subject_boxes[0] * 24).tolist()
    corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * [10, 20, 10, 20]
    assert any(row[:4] == pytest.approx(corners, abs=1e-3) for row in scores.found[0])


def test_verbs_that_an_object_cannot_have_score_nothing(task, data, monkeypatch):
    possible = np.ones((VERBS, 10), dtype=bool)
    possible[4] = False
    monkeypatch.setattr(task, "possible", possible)
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        scores.update(paired(batch), batch)
    rows = np.concatenate(scores.found)
    assert not rows[rows[:, 9] == 4, 10].any() and rows[rows[:, 9] < 4, 10].max() > 0.8


def test_a_split_without_interactions_is_one_line(task, data):
    scores = task.scores()
    for batch in task.eval_loader(data, "test", ALONE, 5):
        batch.records = [{**record, "pairs": []} for record in batch.records]
        scores.update(paired(batch), batch)
    with pytest.raises(DataError, match="no image of the evaluated split has an interaction"):
        scores.compute(ALONE)
