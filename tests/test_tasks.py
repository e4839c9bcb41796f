"""The seam for tasks: a second task, regression over sets of unequal size, lives through everything that a run does."""

import re
from pathlib import Path

import pytest

import regression_task
import runs
from dropkey import tasks
from dropkey.config.compose import compose
from dropkey.errors import ConfigError, Interrupted

PACKAGE = Path(__file__).parents[1] / "dropkey"
REGRESSION = (*regression_task.OVERRIDES, "trainer.epochs=4", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("regression"), *REGRESSION)


def test_another_task_trains_and_its_summary_shows_its_metrics(finished):
    summary = finished.summary()
    assert summary["metrics"][0] == vars(regression_task.Regression.metrics[0])
    assert summary["samples"] == regression_task.SIZES["test"]
    assert summary["code"].keys() >= {"task/regression_task:Regression", "regularizer/dropkey"}
    errors = [record["eval_mae"] for record in finished.records("epoch")]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    "words, message",
    {
        "task=mesh task.args.rotate=30": "task.args.rotate is no argument of task=mesh; did you mean rotation?",
        "task.args.rotate=30": "task.args.rotate is no argument of task=classification, which has none",
        "task.name=builtins:dict": "task.name=builtins:dict",
    }.items(),
)
def test_an_argument_that_a_task_does_not_take_is_named(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tasks.build(compose(words.split()))


def test_the_best_epoch_of_a_metric_where_lower_is_better_is_the_lowest(finished):
    errors = [record["eval_mae"] for record in finished.records("epoch")]
    summary = finished.summary()
    assert summary["best_mae"] == pytest.approx(min(errors), abs=1e-5)
    assert summary["best_epoch"] == 1 + errors.index(min(errors))
    assert summary["objective"] == pytest.approx(errors[-1], rel=1e-6)


def test_its_attention_is_regularized(finished):
    assert "dropkey (decreasing) at 2 attention layers" in (finished.path / "log.txt").read_text()


@pytest.mark.parametrize("step", [4, 6], ids=["mid-epoch", "epoch end"])
def test_an_interrupted_run_of_another_task_resumes_bitwise_identically(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        runs.on_step(patch, step, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, *REGRESSION)
    resumed = runs.train(tmp_path, *REGRESSION)
    assert runs.unequal(runs.state(finished), runs.state(resumed)) is None
    assert runs.records(finished) == runs.records(resumed)


def losses(run) -> list[float]:
    return [record["loss"] for record in run.records("step")]


def test_a_mean_of_means_would_be_another_loss(tmp_path, monkeypatch):
    """So the test of accumulated microbatches can fail: with equal weights for unequal ones the losses differ."""
    words = (*REGRESSION, "regularizer=none", "trainer.max_steps=3", "trainer.grad_accum_steps=4")
    right = losses(runs.train(tmp_path / "right", *words))
    original = regression_task.Regression.losses

    def means(self, model, batch):
        return {"squared": original(self, model, batch)["squared"] / self.normalisers(batch)["squared"]}

    monkeypatch.setattr(regression_task.Regression, "losses", means)
    monkeypatch.setattr("dropkey.engine.trainer.Trainer.divisors", lambda self, batches: {"squared": len(batches)})
    assert losses(runs.train(tmp_path / "wrong", *words)) != pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("name", ["clasification", "regression_task:Nothing", "no_such_module:Task"])
def test_a_task_that_does_not_exist_is_one_line(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        tasks.build(runs.config(tmp_path, f"task.name={name}"))


OWN = (
    "tasks",
    "data",
    "datasets",
    "detection",
    "mesh",
    "config",
    "models",
)  # models: a constructor takes a number of classes
WORDS = re.compile(r"top.?1\b|top.?5\b|num_classes|image_size|\bece\b|accuracy|n_classes")


@pytest.mark.parametrize(
    "part", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} - {*OWN})
)
def test_what_is_not_a_task_knows_no_metric_class_count_or_image_size(part):
    place = PACKAGE / part
    for file in place.rglob("*.py") if place.is_dir() else [place]:
        found = WORDS.findall(file.read_text().lower())
        assert not found, f"{file.relative_to(PACKAGE)}: {sorted(set(found))}"
