"""What trainings cost on paper."""

import pytest

from dropkey.commands import reproduce
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.errors import ConfigError
from dropkey.reproduction import cost, tables
from dropkey.reproduction.jobs import jobs_of
from dropkey.tasks.base import Task
from dropkey.tasks.classification import Classification

GMAC = {"t2t_vit_14": 4.8, "t2t_vit_19": 8.5, "ceit_small": 4.5, "deit_base": 17.6, "volo_d1": 6.8}  # as published


def config(*words):
    return check(compose(list(words)))


@pytest.mark.parametrize("model", GMAC)
def test_operations_are_twice_the_published_multiplications(model):
    flop, _ = cost.of_model(config(f"model={model}", "data=imagenet"))
    assert flop / 2e9 == pytest.approx(GMAC[model], rel=0.06)  # CeiT's stem counts in different ways


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ("experiment=imagenet_deit_base", 300 * (1_281_167 // 1024) * 1024),
        ("data=cifar10 data.val_fraction=0.1 trainer.epochs=2 trainer.batch_size=100", 2 * 45_000),
        ("data=cifar10 data.max_train_samples=1000 trainer.epochs=2 trainer.batch_size=300", 2 * 900),
        ("data=cifar10 trainer.max_steps=7 trainer.batch_size=10", 70),
        ("data=folder data.root=. data.max_train_samples=500 trainer.epochs=2 trainer.batch_size=50", 1000),
        ("data=folder data.root=.", None),
    ],
)
def test_images_are_those_of_all_whole_batches(words, images):
    assert cost.samples_of(config(*words.split())) == images


def test_hours_follow_from_operations_and_utilisation():
    jobs = {job: column for (_, column, _), job in jobs_of(tables.load("schedule", "smoke"), "runs").items()}
    (found,), unknown = cost.costs(jobs, tflops=100, utilisation=0.5)
    assert unknown == 0 and found.runs == len(jobs)
    assert found.hours * 3600 * 100e12 * 0.5 == pytest.approx(3 * found.gflop * 1e9 * found.samples)
    (half,), _ = cost.costs(jobs, tflops=100, utilisation=0.25)
    assert half.hours == pytest.approx(2 * found.hours)


def test_a_task_that_cannot_be_planned_without_its_data_is_counted_as_unknown(monkeypatch):
    monkeypatch.setattr(Classification, "planned_data", Task.planned_data)
    jobs = {job: column for (_, column, _), job in jobs_of(tables.load("schedule", "smoke"), "runs").items()}
    assert cost.costs(jobs, tflops=100, utilisation=0.5) == ([], len(jobs))


@pytest.mark.parametrize(("gpu", "tflops"), [("A100", 312), ("h100", 989), ("125.5", 125.5)])
def test_a_gpu_is_a_name_or_its_speed(gpu, tflops):
    assert cost.peak(gpu) == tflops


@pytest.mark.parametrize("gpu", ["h10", "0", "-3", "nan", "1e400", ""])
def test_other_gpus_are_refused_with_the_choices(gpu):
    with pytest.raises(ConfigError, match=r"gpu=.*a100"):
        cost.peak(gpu)


def test_the_plan_shows_hours_and_price_in_80_columns(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", "table=imagenet", "scale=paper", "gpu=h100", "price=2.5", f"output={tmp_path}"]
    assert reproduce.main(words) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("DeiT-B ") and " M " in line]
    assert line.split() == ["DeiT-B", "35.1", "384", "M", "28.4", "21", "597", "67.7", "1,493"]
    assert max(map(len, out.splitlines())) <= 80
