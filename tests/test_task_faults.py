"""The faults that meet tasks other than classification: signals, damaged pictures, losses that are not finite, other
data, another number of processes (faults 1-8, 10, 15-20, 22, 25, 27). The rest is the same code for every task.

One job of two processes does all that the quick tests ask of two processes."""

import functools
import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import torch

import coco_folder
import distributed_run
import fault_runs
import processes
import regression_task
import runs
import task_folders
import task_runs
from dropkey import build, evaluation, plotting, session, tasks
from dropkey.config.schema import EvalConfig, EvaluationConfig
from dropkey.engine import checkpoint, trainer
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError, DataError, Interrupted
from task_runs import TASKS, Cell

pytest.importorskip("pycocotools")
ALONE = DistContext(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plotting, "curves", lambda *args: None)


@pytest.fixture(scope="module", autouse=True)
def few():
    with task_runs.few():
        yield


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder of pictures for each task, not to be changed."""
    place = tmp_path_factory.mktemp("folders")
    return {task: task_folders.write(task, place / task) for task in TASKS}


@pytest.fixture(scope="module")
def whole(roots, tmp_path_factory):
    """whole(task): its run that nothing disturbed."""
    place = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda task: runs.train(place, *task_runs.on_files(task, roots[task])))


def cells(roots, shift: int = 0) -> list[Cell]:
    """One for each task, the moments taking turns."""
    regularizers = ("dropkey", "dropout", "dropkey_column")
    return [
        Cell(regularizers[i], "decreasing", task, task_runs.MOMENTS[(i + shift) % 3], str(roots[task]))
        for i, task in enumerate(TASKS)
    ]


# -------------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def alone(roots, tmp_path_factory):
    place = tmp_path_factory.mktemp("alone")
    for stage in (task_runs.begin, task_runs.resume):
        done = processes.run(stage, cells(roots, 1), place, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.fault(1, 2, 3, 4, 6, 15)
@pytest.mark.parametrize("number", range(3), ids=TASKS)
def test_a_run_with_everything_on_resumes_bitwise_identically_in_a_new_process(roots, alone, number):
    """Workers, accumulation, moving average, bf16, images of many sizes."""
    assert not fault_runs.wrong_cells([cells(roots, 1)[number]], alone)


@pytest.mark.fault(2, 25)
def test_a_picture_damaged_in_training_is_named_and_once_restored_the_run_goes_on(roots, whole, tmp_path, figure):
    own = {task: shutil.copytree(root, tmp_path / task) for task, root in roots.items()}
    done = processes.run(task_runs.damage, own, tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for task, root in own.items():
        path, run = task_folders.picture(task, root), task_runs.directory(tmp_path, *task_runs.on_files(task, root))
        told = (tmp_path / f"{task}.txt").read_text()
        assert f"cannot read image {path}" in told and "\n" not in told and run.status()["state"] == "failed"
        assert checkpoint.load(run.checkpoints / "last.pt")["position"]["epoch"] == 1
        shutil.copy(task_folders.picture(task, roots[task]), path)
        parts = runs.train(tmp_path, *task_runs.on_files(task, root))
        assert runs.unequal(runs.state(whole(task)), runs.state(parts)) is None, task
        assert runs.records(whole(task)) == runs.records(parts)
    figure("the picture is named; once restored, equal to the bit", injected=len(own))


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def job(roots, tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    done = processes.torchrun(task_runs.two_at_once, cells(roots), place, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.fault(1, 2, 3, 4, 6, 15)
@pytest.mark.parametrize("number", range(3), ids=TASKS)
def test_two_processes_that_are_interrupted_resume_bitwise_identically(roots, job, number):
    assert not fault_runs.wrong_cells([cells(roots)[number]], job)


@pytest.mark.fault(20)
@pytest.mark.parametrize("task", task_runs.WORDS)
def test_two_processes_are_two_microbatches_of_one(job, tmp_path, task):
    """Masks too, those of METRO's tokens among them, and losses of sets of unequal size."""
    words = (*task_runs.WORDS[task], *runs.ONE_EPOCH)
    two, one = task_runs.directory(job / "two", *words), runs.train(tmp_path, *words, "trainer.grad_accum_steps=2")
    losses = [[record["loss"] for record in run.records("step")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    keys = [metric["key"] for metric in one.summary()["metrics"]] + ["samples"]
    figures, expected = ({key: run.summary()[key] for key in keys} for run in (two, one))
    assert task_runs.close(figures, expected, rel=1e-3, abs=1e-3)


@pytest.mark.fault(22)
@pytest.mark.parametrize("number", range(3), ids=TASKS)
def test_images_that_are_not_finite_in_one_process_stop_all_before_the_update(roots, job, number):
    run = cells(roots)[number].run(job / "poisoned")
    assert run.status()["state"] == "diverged"
    assert checkpoint.load(run.checkpoints / "last.pt")["position"]["global_step"] == 3
    first, second = json.loads((run.path / "diverged.json").read_text())["processes"]
    assert "nan" not in first["loss"] and second["loss"] == "nan"
    assert len({*first["sample_ids"], *second["sample_ids"]}) == 4


@pytest.mark.fault(18)
def test_two_processes_find_the_figures_of_one_at_any_batch_size(job, tmp_path, figure):
    task_runs.evaluated(tmp_path / "evaluated.json", task_runs.HELD_OUT + 10)
    one, two = (json.loads((place / "evaluated.json").read_text()) for place in (tmp_path, job))
    for task, found in two.items():
        (expected,) = one[task].values()
        assert expected["samples"] == regression_task.SIZES["test"] if task == "regression" else task_runs.HELD_OUT
        for result in found.values():
            assert task_runs.close(result, expected, rel=1e-6), task
    figure("exact: every task, batches of 1, 5 and all images, 1 and 2 processes", injected=2 * len(two))


@pytest.mark.fault(8)
@pytest.mark.parametrize("number", range(3), ids=TASKS)
def test_another_number_of_processes_goes_on_and_is_logged(roots, job, tmp_path, number):
    """The checkpoint of the last step before divergence, resumed by one process."""
    cell = cells(roots)[number]
    run = cell.run(tmp_path)
    shutil.copytree(cell.run(job / "poisoned").path, run.path)
    session.train(cell.config(tmp_path), run)
    assert "resuming with 1 processes x 2 microbatches instead of 2 x 2: " in (run.path / "log.txt").read_text()
    assert run.finished and len(run.records("step")) == 6


# ----------------------------------------------------------------------------------- the data and the config change


def rewritten(file, change) -> None:
    with np.load(file) as content:
        arrays = dict(content)
    change(arrays)
    np.savez(file, **arrays)


def in_json(file: str, change):
    return lambda root: coco_folder.edit(root / file, change)


def in_arrays(change):
    return lambda root: rewritten(root / "meshes.npz", change)


def renamed(content: dict) -> None:
    content["categories"][0]["name"] = "human"


COCO, HICO = "annotations/instances_train2017.json", "annotations/trainval_hico.json"
CHANGES = {
    "detection": {
        "a box is gone": in_json(COCO, lambda content: content["annotations"].pop()),
        "a box moved": in_json(COCO, lambda content: content["annotations"][0]["bbox"].__setitem__(0, 0.0)),
        "a label": in_json(COCO, lambda content: content["annotations"][0].update(category_id=90)),
        "a name": lambda root: [coco_folder.edit(file, renamed) for file in root.glob("annotations/*.json")],
    },
    "interaction": {
        "a pair is gone": in_json(HICO, lambda content: content[1].update(hoi_annotation=[])),
        "a verb": in_json(HICO, lambda content: content[1]["hoi_annotation"][0].update(category_id=3)),
        "a pair is not possible": lambda root: np.save(root / "annotations/corre_hico.npy", 1 - np.eye(117, 80)),
    },
    "mesh": {
        "a mesh": in_arrays(lambda arrays: arrays["vertices"].__imul__(1.001)),
        "a joint in the image": in_arrays(lambda arrays: arrays["points"][0].fill(0)),
        "the regressor": in_arrays(lambda arrays: arrays["regressor"].__imul__(0.999)),
        "an image of another split": in_arrays(lambda arrays: arrays["split"].__setitem__(0, "test")),
    },
}


def repainted(task: str, root) -> None:
    other = sorted(root.glob(task_folders.PICTURES[task].replace("0.png", "*.png")))[1]
    shutil.copy(other, task_folders.picture(task, root))


@pytest.mark.fault(7)
@pytest.mark.parametrize("task", TASKS)
def test_data_and_configs_that_changed_are_refused_on_resume_and_in_evaluation(task, tmp_path, monkeypatch, figure):
    root = task_folders.write(task, tmp_path / "data")
    kept = shutil.copytree(root, tmp_path / "kept")
    words = (*task_runs.on_files(task, root), "data.num_workers=0")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 1, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path / "runs", *words)
    run, cfg = task_runs.directory(tmp_path / "runs", *words), runs.config(tmp_path / "runs", *words)
    for change in [*CHANGES[task].values(), functools.partial(repainted, task)]:
        change(root)
        with pytest.raises(DataError, match=r"not those that .* was trained on: .*overwrite=true"):
            runs.train(tmp_path / "runs", *words)
        with pytest.raises(DataError, match=r"not those that .* was trained on: .*data=<set>"):
            evaluation.evaluate_run(EvalConfig(run=str(run.path)), cfg, run.path)
        shutil.rmtree(root)
        shutil.copytree(kept, root)
    text = run.config.read_text()
    run.config.write_text(text.replace("eval_scale: 32", "eval_scale: 40").replace("rotation: 20", "rotation: 40"))
    with pytest.raises(ConfigError, match=r"was changed \(task\.args"):
        runs.train(tmp_path / "runs", *words)
    run.config.write_text(text)
    assert runs.train(tmp_path / "runs", *words).finished
    figure("other boxes, pairs, meshes, images, task.args: refused", injected=len(CHANGES[task]) + 2)


@pytest.mark.fault(7)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_evaluated_where_its_data_are_now(task, roots, alone, tmp_path):
    cell = cells(roots, 1)[TASKS.index(task)]
    run, moved = cell.run(alone / "whole"), shutil.copytree(roots[task], tmp_path / "moved")
    cfg = EvalConfig(run=str(run.path), root=str(moved), eval=EvaluationConfig(device="cpu"))
    again, _ = evaluation.evaluate_run(cfg, cell.config(alone / "whole"), run.path)
    keys, figures = [metric["key"] for metric in again["metrics"]], run.summary()
    assert task_runs.close({key: again[key] for key in keys}, {key: figures[key] for key in keys}, rel=1e-5)


# ------------------------------------------------------------------------------- nothing to find, no key, no ratio


def regularized(task: str, roots, *words: str):
    """The task, its data, and its model."""
    opened = tasks.build(runs.config(roots[task], *task_runs.on_files(task, roots[task]), "data.num_workers=0", *words))
    data = opened.load_data()
    return opened, data, build.build_regularized(opened, data, ALONE)[0]


@pytest.mark.fault(19, 23)
@pytest.mark.parametrize("ratio", [0.0, 0.99])
@pytest.mark.parametrize("task", TASKS)
def test_all_parameters_learn_even_where_nothing_is_to_be_found_or_no_key_is_left(task, ratio, roots):
    """So that the processes of a job, which add gradients up, agree on which parameters have one."""
    opened, data, model = regularized(task, roots, f"regularizer.ratio={ratio}", "schedule=constant")
    for batch in itertools.islice(opened.eval_loader(data, "train", ALONE, 1), 6):
        build.seed_microbatch(0, model.train(), 0, 0)
        sum(opened.losses(model, batch).values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert not [name for name, one in gradients.items() if one is None or not one.isfinite().all()]
        model.zero_grad()


@pytest.mark.fault(23)
@pytest.mark.parametrize("task", TASKS)
def test_ratio_0_and_evaluation_are_as_if_there_were_no_regularizer(task, roots):
    losses, answers = [], []
    for words in ("regularizer=none", "regularizer.ratio=0", "regularizer.ratio=0.9"):
        opened, data, model = regularized(task, roots, words)
        batch = next(iter(opened.eval_loader(data, "train", ALONE, 6)))
        build.seed_microbatch(0, model.train(), 0, 0)
        losses.append({key: value.item() for key, value in opened.losses(model, batch).items()})
        answers.append([one.detach() for one in opened.predict(model.eval(), batch)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] != pytest.approx(losses[0], rel=1e-4)
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ more faults: `make faults`


@pytest.mark.fault(1, 3, full=True)
@pytest.mark.parametrize("count", [1, 2])
def test_every_cell_of_the_grid_of_tasks_resumes_in_a_new_process_bitwise_identically(roots, tmp_path, count, figure):
    grid = itertools.product(("dropkey", "dropkey_column", "dropattention"), ("constant", "increasing"), TASKS)
    grid = [Cell(*place, moment, str(roots[place[-1]])) for place in grid for moment in task_runs.MOMENTS]
    run = processes.run if count == 1 else functools.partial(processes.torchrun, processes=count)
    for stage in (task_runs.begin, task_runs.resume):
        done = run(stage, grid, tmp_path, timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
    wrong = fault_runs.wrong_cells(grid, tmp_path)
    text = "every task x regularizer x schedule x moment x 1 and 2 processes, resumed in a new process"
    figure(text, injected=len(grid), survived=len(grid) - len(wrong))
    assert not wrong


@pytest.mark.fault(15, full=True)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_process_and_its_workers_saves_once_whenever_it_comes(
    roots, whole, tmp_path, number, code, moment, task, figure
):
    words = task_runs.on_files(task, roots[task])
    done = processes.run(fault_runs.train_and_signal, tmp_path, int(number), moment, words)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert len((tmp_path / "signal.txt").read_text().split()) == 1 + (moment != "save")
    assert runs.unequal(runs.state(whole(task)), runs.state(runs.train(tmp_path, *words))) is None
    figure("every task: in a step, an evaluation, a save, workers on: one save, 143 or 130")


@pytest.mark.fault(16, 25, full=True)
@pytest.mark.parametrize("task", TASKS)
def test_a_picture_that_one_process_cannot_read_ends_the_job_and_is_told_once(task, roots, tmp_path, figure):
    root = shutil.copytree(roots[task], tmp_path / "data")
    done = processes.torchrun(task_runs.damage_for_all, task, root, tmp_path / "runs")
    assert done.returncode != 0 and done.stderr.count("cannot read image") == 1, done.stderr
    run = task_runs.directory(tmp_path / "runs", *task_runs.on_files(task, root))
    assert run.status()["state"] == "failed" and str(task_folders.picture(task, root)) in done.stderr
    figure(f"rank cannot read its picture: all over after {done.seconds:.0f} s, told once")


@pytest.mark.fault(17, full=True)
@pytest.mark.parametrize("task", TASKS)
def test_torchrun_restarts_a_killed_rank_and_the_result_is_bitwise_identical(task, roots, tmp_path):
    words, event = task_runs.on_files(task, roots[task]), (int(signal.SIGKILL), 5, 1)
    done = processes.torchrun(distributed_run.main, str(tmp_path / "whole"), words)
    assert done.returncode == 0, done.stderr
    done = processes.torchrun(distributed_run.main, str(tmp_path / "parts"), words, event, restarts=1)
    assert done.returncode == 0, done.stderr
    whole, parts = (task_runs.directory(tmp_path / name, *words) for name in ("whole", "parts"))
    assert "resuming after 1 epochs" in (parts.path / "log.txt").read_text()
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.records(whole) == runs.records(parts)


@pytest.mark.fault(5, full=True)
@pytest.mark.parametrize("task", TASKS)
def test_a_worse_epoch_after_resuming_does_not_replace_the_best(task, tmp_path, monkeypatch):
    figures, original = iter([50.0, 90.0, 10.0, 20.0]), trainer.evaluate

    def evaluate(*args, **kwargs):
        result = original(*args, **kwargs)
        return {**result, next(iter(result)): next(figures)}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    words = (*task_runs.WORDS[task], "trainer.epochs=4")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 10, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, *words)
    run = runs.train(tmp_path, *words)
    assert run.summary()["best_epoch"] == runs.state(run, "best.pt")["epoch"] == (3 if task == "mesh" else 2)


@pytest.mark.fault(27, full=True)
@pytest.mark.parametrize("task", TASKS)
def test_offline_tracking_mirrors_a_run(task, tmp_path):
    run = runs.train(tmp_path, *task_runs.WORDS[task], *runs.ONE_EPOCH, "logger=wandb")
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run.summary()["hash"]) and run.finished
