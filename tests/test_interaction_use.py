"""A trained QPIC in use: the pairs it finds in images, drawn and stored."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import dropkey
import runs
import task_runs
from dropkey.analysis import trained
from dropkey.analysis.box_figures import merged
from dropkey.analysis.boxes import Found, answer_to, found, objects
from dropkey.commands import export, predict, visualize
from dropkey.datasets import digit_pairs, digit_scenes
from dropkey.tasks.marks import Mark


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "HELD_OUT", task_runs.HELD_OUT)
        yield


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("pairs"), *task_runs.WORDS["interaction"])


@pytest.fixture(scope="module")
def opened(run):
    return trained.open_run(run.path)


@pytest.fixture(scope="module")
def model(run):
    return dropkey.load(run.path)


@pytest.fixture
def files(opened, tmp_path):
    """The first three test images."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        opened.dataset.test.images.picture(number).save(path)
    return list(map(str, paths))


def test_found_pairs_are_those_of_the_evaluation(model, opened, files):
    """Score, boxes in pixels, verb and object of each, the surest first."""
    size = opened.dataset.test.records[0]["width"]
    for answers, one in zip(model.predict(files, threshold=0.0), found(opened, torch.arange(3), 0.0), strict=True):
        assert [answer["score"] for answer in answers] == sorted((a["score"] for a in answers), reverse=True)
        assert [answer["label"] for answer in answers] == [mark.label for mark in one.answers]
        for answer, mark in zip(answers, one.answers, strict=True):
            torch.testing.assert_close(torch.tensor([answer["subject"], answer["object"]]), mark.boxes * size)


def test_a_score_is_that_of_the_verb_times_that_of_the_object(opened):
    (batch,) = opened.batches(torch.tensor([0]))
    outputs = opened.task.predict(opened.model, batch)
    marks = found(opened, torch.tensor([0]), 0.0)[0].answers
    for mark in marks[:10]:
        score, label = outputs[0][0, mark.query, :-1].max(-1)
        assert mark.score == pytest.approx((score * outputs[1][0, mark.query, mark.group]).item(), abs=1e-6)
        assert mark.label == f"{digit_pairs.VERBS[mark.group]} {label.item()}"


def test_the_truth_has_both_boxes_of_every_verb(opened):
    record = opened.dataset.test.records[0]
    truths = found(opened, torch.tensor([0]))[0].truths
    assert len(truths) == len(record["pairs"]) > 0
    for mark, (subject, other, verb) in zip(truths, record["pairs"], strict=True):
        boxes = torch.tensor([record["annotations"][place]["bbox"] for place in (subject, other)]).float()
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(mark.boxes * record["width"], boxes)
        assert mark.label.startswith(digit_pairs.VERBS[verb])


def test_a_verb_that_an_object_cannot_have_is_never_an_answer(opened, monkeypatch):
    possible = opened.task.possible.copy()
    possible[2] = False
    monkeypatch.setattr(opened.task, "possible", possible)
    answers = found(opened, torch.arange(3), 1e-9)
    assert not any(mark.label.startswith("above") for one in answers for mark in one.answers)
    assert any(mark.label.startswith("below") for one in answers for mark in one.answers)


def test_verbs_of_one_pair_share_its_boxes_and_have_a_line_each():
    pair = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    marks = [
        Mark(pair, "above 3", 2, 0.91, 0),
        Mark(pair, "larger than 3", 2, 0.88, 0),
        Mark(pair / 2, "below 3", 2, 0.5),
    ]
    assert [mark.label for mark in merged(marks)] == ["above 3 91\nlarger than 3 88", "below 3 50"]


def test_any_verb_of_a_pair_is_right():
    pair = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    truths = [Mark(pair, "above 3"), Mark(pair, "larger than 3"), Mark(pair.flip(0), "below 3")]
    answer = Mark(pair, "larger than 3", score=0.6, query=0)
    one = Found(0, [answer, *truths])
    chosen = [true for _, true in objects([one])]
    assert [true.label for true in chosen] == ["above 3, larger than 3", "below 3"]
    assert answer_to(one, answer, chosen[0]).right
    assert not answer_to(one, answer, chosen[1]).right


def test_predict_stores_a_column_for_each_side_of_both_boxes(run, files, tmp_path):
    predict.main([f"run={run.path}", "threshold=0", "k=2", f"output={tmp_path / 'found.csv'}", *files])
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert len(rows) == 6
    assert {f"{box}_{side}" for box in ("subject", "object") for side in ("left", "top", "right", "bottom")} <= {
        *rows[0]
    }


def test_pairs_are_drawn(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict.main([f"run={run.path}", "threshold=0", "k=3", "draw=drawn", *files])
    drawn = np.asarray(Image.open("drawn/0-boxes.png").convert("RGB")).astype(int)
    assert (drawn.max(-1) - drawn.min(-1)).max() > 50  # colours on a grey image
    for words in (["boxes"], ["maps", "images=0"], ["compare", "images=0"]):
        visualize.main([*words, f"run={run.path}", f"output={words[0]}.png"])
        assert (tmp_path / f"{words[0]}.png").exists()


@pytest.mark.parametrize("format", ["safetensors", "torch_export"])
def test_an_exported_model_gives_all_four_outputs(run, tmp_path, format, capsys):
    suffix = {"safetensors": "safetensors", "torch_export": "pt2"}[format]
    export.main([f"run={run.path}", f"format={format}", f"output={tmp_path / 'qpic'}.{suffix}"])
    assert (tmp_path / f"qpic.{suffix}").exists()


@pytest.mark.parametrize("wrong", [{"verbs_of": [[0]]}, {"verb_names": 3}, {"verb_names": []}])
def test_damaged_notes_of_a_model_are_told(model, wrong):
    assert model.task.info_fault(model.info) == ""
    assert model.task.info_fault(model.info | wrong)
