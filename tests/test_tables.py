"""Tables: their YAML, the runs they need, and what runs them. A stand-in trains where the launcher is the matter."""

import collections
import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stand_in as standing_in
from dropkey import code_version
from dropkey.config import check, compose, identity, schema
from dropkey.errors import Busy, ConfigError
from dropkey.records import RunDirectory, write_json
from dropkey.reproduction import forecast, jobs, planning, runner, slots, tables, tuning
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, MISSING, RUNNING, Job, distinct, jobs_of
from dropkey.reproduction.runner import Launcher
from dropkey.schedules import ratios

ROOT = Path(__file__).parents[1]
SCALES = ("smoke", "cpu", "small", "paper")
MINI = """
title: A small table
baseline: none
rows:
  none: regularizer=none
  dropkey: regularizer=dropkey regularizer.ratio=0.3
  several passes: { of: dropkey, evaluate: eval.monte_carlo=4 }
  tuned: { of: dropkey, train: regularizer=none trainer.epochs=5 }
claims: [dropkey > none]
"""


@pytest.fixture
def mini(tmp_path):
    file = tmp_path / "mini.yaml"
    file.write_text(MINI)
    return file


def launched(table, output: Path, at_once: int = 2, **options) -> dict[str, runner.JobState]:
    """Name of the job -> its state, after a launch of the whole table."""
    todo = distinct(jobs_of(table, str(output)))
    standing_in.announce(todo, output)
    return {one.job.name: one for one in Launcher(todo, slots.slots(at_once, "none", 1, 1), **options).run()}


def started(output: Path) -> collections.Counter:
    """How often each training was started."""
    lines = (output / "starts.txt").read_text().splitlines()
    return collections.Counter(line.split()[0] for line in lines if line.endswith("summary.json"))


# ------------------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", tables.names())
def test_every_table_has_every_scale(name, scale):
    table = tables.load(name, scale)
    assert table.rows and table.columns and table.seeds and table.about


@pytest.mark.parametrize("name", tables.names())
def test_every_row_of_every_table_composes(name):
    table = tables.load(name, "smoke", seeds=(0,))
    tuned = [(row.label, column) for row in table.rows.values() if row.candidates for column in table.columns]
    for number in range(max([len(table.rows[row].candidates) for row, _ in tuned], default=1)):
        chosen = {(row, column): table.rows[row].candidates[number] for row, column in tuned}
        jobs = jobs_of(dataclasses.replace(table, chosen=chosen), "runs")
        assert len(jobs) == len(table.rows) * len(table.columns)


@pytest.mark.parametrize("scale", SCALES)
def test_every_column_of_every_scale_composes(scale):
    for name in tables.names():
        table = tables.load(name, scale)
        for overrides in table.columns.values():
            assert jobs.composed(overrides)


@pytest.mark.parametrize("scale", SCALES)
def test_fine_tuning_and_rows_of_one_scale_compose_with_every_column(scale):
    """A warm-up of the training before may not fit the epochs of the fine-tuning."""
    for name in tables.names():
        table, smoke = tables.load(name, scale, seeds=(0,)), tables.load(name, "smoke")
        some = [row for row in table.rows.values() if (row.of and not row.evaluate) or row.label not in smoke.rows]
        rows = {row.label: row for row in [*(table.rows[row.of] for row in some if row.of), *some]}
        assert len(jobs_of(dataclasses.replace(table, rows=rows), "runs")) == len(rows) * len(table.columns)


def test_the_table_of_imagenet_has_the_six_models_and_what_is_known_of_each():
    table = tables.load("imagenet", "paper")
    assert table.columns.keys() == table.paper.keys() == table.published.keys() and len(table.columns) == 6
    for column, results in table.paper.items():
        (dropout, low), (dropkey, high) = results.items()
        ratios = {word for row in (dropout, dropkey) for word in table.rows[row].overrides if "ratio" in word}
        assert len(ratios) == 1 and 0.1 < high - low < 0.4
        assert ("data.token_labels=data/label-maps" in table.columns[column]) == column.startswith("VOLO")


def test_the_table_of_cifar_tunes_dropout_and_dropkey_with_one_budget():
    table = tables.load("cifar", "small")
    budgets = [
        {tuple(word for word in candidate if not word.startswith("regularizer=")) for candidate in row.candidates}
        for row in table.rows.values()
        if row.candidates
    ]
    assert len(budgets) == 2 and budgets[0] == budgets[1] and table.tuning_column is None
    ratios = {word for words in budgets[0] for word in words if "ratio" in word}
    assert ratios == {f"regularizer.ratio={ratio}" for ratio in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)}


@pytest.mark.parametrize("kind", ["DropKey", "Dropout"])
def test_controls_of_the_schedule_have_the_mean_ratio_that_they_are_named_after(kind):
    cells = jobs_of(tables.load("schedule", "cpu", seeds=(0,)), "runs")
    configs = {row: job.config for (row, _, _), job in cells.items()}

    def mean(row: str) -> float:
        cfg = configs[f"{kind}, {row}"]
        found = ratios(cfg.schedule.name, cfg.regularizer.ratio, cfg.schedule.end, cfg.model.depth)
        return sum(found) / len(found)

    assert mean("constant at the ramp's mean") == pytest.approx(mean("decreasing"))
    assert mean("decreasing at the constant's mean") == pytest.approx(mean("constant"))
    assert mean("decreasing to 0.1") == pytest.approx(0.2)


@pytest.mark.parametrize("name", tables.names())
def test_every_table_says_in_its_header_what_it_claims_and_how_to_run_it(name):
    text = (tables.TABLES / f"{name}.yaml").read_text()
    assert "# Claim:" in text and f"# Command: make table TABLE={name} SCALE=" in text


def test_the_example_of_the_documentation_is_a_table(tmp_path):
    text = (ROOT / "docs" / "tables.md").read_text()
    (tmp_path / "example.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    table = tables.load(str(tmp_path / "example.yaml"), "mine")
    assert len(tuning.jobs_of(table, "runs")) == 2 * 4 * 3 and len(jobs_of(table, "runs")) == 2 * 15
    assert table.design.looks == (5, 10, 15)


@pytest.mark.parametrize("keys", [tables.TABLE_KEYS, tables.SCALE_KEYS], ids=len)
def test_every_key_of_a_table_is_documented(keys):
    text = (ROOT / "docs" / "tables.md").read_text()
    assert not [key for key in keys if f"{key}:" not in text and f"`{key}`" not in text]


WRONG = {
    ("title", "tilte"): "tilte is not a key of a table; did you mean title?",
    ("baseline: none", "baseline: nothing"): "baseline 'nothing' is not a row",
    ("dropkey > none", "dropkey > nothing"): "claim 'dropkey > nothing'",
    ("of: dropkey, evaluate", "of: drop, evaluate"): "row 'several passes' is of 'drop', which is not a row",
    ("regularizer=none\n", "none\n"): "row 'none': 'none' is not key=value",
    (
        "evaluate: eval.monte_carlo=4",
        "evaluate: eval.device=cpu",
    ): "row 'several passes', column 'ViT 2 x 32': a row may evaluate",
    ("regularizer.ratio=0.3", "regularizer.ratio=3"): "row 'dropkey', column 'ViT 2 x 32': regularizer.ratio=3",
    ("rows:", "rows: [1, 2]\nold:"): "rows",
    ("rows:", "published: { ViT 2 x 32: high }\nrows:"): "published: ViT 2 x 32",
}


@pytest.mark.parametrize(("change", "message"), WRONG.items(), ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_table_is_one_line_that_names_it(change, message, mini, tmp_path):
    mini.write_text(MINI.replace(*change))
    with pytest.raises(ConfigError) as error:
        jobs_of(tables.load(str(mini), "smoke"), str(tmp_path / "runs"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_table_or_scale_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean schedule"):
        tables.load("shedule", "smoke")
    with pytest.raises(ConfigError, match="did you mean small"):
        tables.load("schedule", "smal")


def test_a_row_of_ones_own_needs_one_line_in_a_copy(mini, tmp_path):
    mini.write_text(MINI.replace("claims", "  mine: regularizer=dropkey regularizer.ratio=0.2\nclaims"))
    table = tables.load(str(mini), "smoke")
    assert len(distinct(jobs_of(table, str(tmp_path)))) == 5 * len(table.seeds)


# ------------------------------------------------------------------------------------------------------------ jobs


def test_a_job_knows_the_directory_that_train_py_will_use(mini, tmp_path):
    table = tables.load(str(mini), "smoke", (3,), ("optim.lr=3e-3",))
    for exists in (False, True):  # the name of a fine-tuned run does not depend on whether its start exists
        for job in jobs_of(table, str(tmp_path / "runs")).values():
            if not job.evaluation:
                (job.run / "checkpoints").mkdir(parents=True, exist_ok=exists)
                assert identity.run_directory(check.check(compose.compose(list(job.overrides)))) == job.run


@pytest.mark.parametrize(
    ("overrides", "name"),
    {
        (): "eval-test.json",
        ("eval.split=val", "eval.weights=best", "eval.monte_carlo=16"): "eval-val-best-mc16.json",
        ("data=cifar10", "eval.weights=best"): "eval-test-cifar10-best.json",
        ("checkpoint=runs/x/checkpoints/previous.pt",): "eval-test-previous.json",
    }.items(),
    ids=str,
)
def test_the_file_of_an_evaluation_is_named_after_what_it_evaluates(overrides, name):
    assert identity.evaluation_name(compose.compose(list(overrides), "eval")) == name


def test_weights_to_start_from_reach_every_run_of_a_table(tmp_path):
    """And are part of each run's identity."""
    file = tmp_path / "detr.pth"
    file.write_bytes(b"")
    given = (f"init_from={file}", "model.pretrained=false")
    started = jobs_of(tables.load("interaction", "smoke", overrides=given), str(tmp_path))
    assert {job.config.init_from for job in started.values()} == {str(file)}
    assert all(given[0] in job.overrides for job in started.values())
    fresh = jobs_of(tables.load("interaction", "smoke", overrides=given[1:]), str(tmp_path))
    assert not {job.run for job in started.values()} & {job.run for job in fresh.values()}


def test_different_jobs_have_different_results():
    todo = distinct(jobs_of(tables.load("alignment", "smoke", (0, 1)), "runs"))
    assert len({(job.run, job.result) for job in todo}) == len(todo) == 16


def test_facts_tell_data_resolution_and_length_of_a_training():
    facts = identity.training_facts(jobs.composed(("experiment=digits_few", "trainer.max_steps=9")))
    assert facts == "digits, 8 px, 480 training samples, 25 epochs, at most 9 steps"


def test_tables_share_the_runs_they_have_in_common(tmp_path):
    runs = [
        {job.run for job in jobs_of(tables.load(name, "smoke", (0,)), str(tmp_path)).values()}
        for name in ("schedule", "controls", "structured")
    ]
    assert len(set.intersection(*runs)) == 2  # no regularizer; DropKey, decreasing


def with_default(monkeypatch, kind: type, key: str, value) -> None:
    """Changes a default of the schema."""
    names = [field.name for field in dataclasses.fields(kind)]
    defaults = list(kind.__init__.__defaults__)
    defaults[names.index(key)] = value
    monkeypatch.setattr(kind.__init__, "__defaults__", tuple(defaults))
    jobs.composed.cache_clear()
    jobs.composed_evaluation.cache_clear()


@pytest.fixture
def clear_compositions():
    yield
    jobs.composed.cache_clear()
    jobs.composed_evaluation.cache_clear()


def test_a_changed_default_is_another_run(mini, tmp_path, monkeypatch, clear_compositions):
    table = tables.load(str(mini), "smoke", (0,))
    before = {job.run for job in jobs_of(table, str(tmp_path)).values()}
    with_default(monkeypatch, schema.TrainerConfig, "overfit", True)
    assert not before & {job.run for job in jobs_of(table, str(tmp_path)).values()}


CHANGED = {"split": "val", "weights": "best", "monte_carlo": 8, "batch_size": 7, "device": "cpu"}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(schema.EvaluationConfig)])
def test_a_changed_default_of_an_evaluation_lets_no_old_result_stand(
    key, mini, tmp_path, monkeypatch, clear_compositions
):
    setting = "eval.split=test" if key == "monte_carlo" else "eval.monte_carlo=4"
    mini.write_text(MINI.replace("eval.monte_carlo=4", setting))
    table, place = tables.load(str(mini), "smoke", (0,)), ("several passes", "ViT 2 x 32", 0)
    job = jobs_of(table, str(tmp_path))[place]
    finish(job.needs)
    write_json(
        job.run / job.result,
        {**standing_in.RESULT, "top1": 1.0, "settings": identity.evaluation_settings(job.evaluation)},
    )
    assert jobs.state(job)[0] == DONE
    with_default(monkeypatch, schema.EvaluationConfig, key, CHANGED[key])
    expected = DONE if key == "device" else MISSING  # where it is computed is not part of a result
    assert jobs.state(jobs_of(table, str(tmp_path))[place])[0] == expected


# ------------------------------------------------------------------------------------------------------------ plan


def finish(job: Job, torch: str = importlib.metadata.version("torch"), **code: str) -> None:
    """Writes what a finished training leaves; `code` changes digests of its parts."""
    run = RunDirectory(job.run)
    run.set_status("done")
    parts = {**code_version.code_of(job.config), **code}
    rest = {"seconds": 50.0, "samples": 100, "samples_per_second": 20.0, "epochs": 1, "best_split": "val"}
    result = {**standing_in.RESULT, "top1": 50.0, "code": parts, "versions": {"torch": torch}, **rest}
    run.write_result("summary.json", result)


@pytest.fixture
def mini_jobs(mini, tmp_path):
    return jobs_of(tables.load(str(mini), "smoke", (0,)), str(tmp_path / "runs"))


def row(found: dict, label: str) -> Job:
    return found[label, "ViT 2 x 32", 0]


def test_a_finished_run_is_outdated_if_code_that_new_runs_use_has_changed(mini_jobs):
    finish(row(mini_jobs, "dropkey"), engine="old")
    (job, reason), *others = planning.outdated(distinct(mini_jobs), {}).items()
    assert (job, others) == (row(mini_jobs, "dropkey"), [])
    assert reason == "the code of engine has changed"


def test_a_change_that_no_new_run_uses_leaves_finished_runs_comparable(mini_jobs):
    finish(row(mini_jobs, "dropkey"), **{"regularizer/dropkey": "old"})
    finish(row(mini_jobs, "tuned"))
    left = [row(mini_jobs, "dropkey"), row(mini_jobs, "tuned"), row(mini_jobs, "none")]  # only `none` is to be run
    assert planning.outdated(left, {}) == {}
    assert planning.outdated(distinct(mini_jobs), {})  # with the evaluation of the DropKey run, it is


def test_another_version_of_torch_makes_a_run_outdated(mini_jobs):
    finish(row(mini_jobs, "none"), torch="1.0")
    (reason,) = planning.outdated(distinct(mini_jobs), {}).values()
    assert "it used torch 1.0, now it is" in reason


def test_where_nothing_is_left_to_run_nothing_is_outdated(mini_jobs):
    finish(row(mini_jobs, "none"), engine="old")
    both = [row(mini_jobs, "none"), row(mini_jobs, "dropkey")]
    assert planning.outdated(both, {})
    RunDirectory(both[1].run).set_status("failed", reason="x")  # it runs again on request only
    assert planning.outdated(both, {}) == {} and planning.outdated(both, {}, retry=True)


def test_the_time_of_a_table_follows_from_finished_runs(mini_jobs):
    nothing = planning.estimate(distinct(mini_jobs))
    assert nothing == (0, 0, 4)  # unknown
    finish(row(mini_jobs, "none"))
    epochs = row(mini_jobs, "dropkey").config.trainer.epochs
    seconds, size, unknown = planning.estimate(distinct(mini_jobs))
    # a training as long, one of 5 epochs, and 4 passes over 100 samples at 0.4 x 1/20 s; each after a start
    assert seconds == pytest.approx(50 + 50 * 5 / epochs + 4 * 100 * 0.4 / 20 + 3 * forecast.STARTUP)
    assert size > 0 and unknown == 0


def test_an_interrupted_run_needs_only_what_is_left(mini_jobs):
    finish(row(mini_jobs, "none"))
    job = row(mini_jobs, "dropkey")
    RunDirectory(job.run).set_status("interrupted")
    epochs = job.config.trainer.epochs
    done = {"epoch": epochs - 5, "seconds": 50.0 * (epochs - 5) / epochs}
    RunDirectory(job.run).append({"kind": "epoch", "step": 1, **done})
    seconds, size, _ = planning.estimate([row(mini_jobs, "none"), job])
    assert seconds == pytest.approx(50 * 5 / epochs + forecast.STARTUP) and size == 0


# ---------------------------------------------------------------------------------------------------------- slots


def test_runs_at_once_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [slot.threads for slot in slots.slots(4, "none", 1, 1)] == [2, 2, 2, 2]
    assert [slot.threads for slot in slots.slots(1, "none", 1, 1)] == [8]


@pytest.mark.parametrize("cores, jobs", [(1, 1), (2, 2), (64, 4)])
def test_without_a_gpu_there_is_a_run_per_core_up_to_four(cores, jobs, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert [slot.threads for slot in slots.slots(0, "none", 1, 1)] == [cores // jobs] * jobs


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


def test_several_runs_share_a_gpu(four_gpus):
    places = slots.slots(0, "0,1", 2, 1)
    assert sorted(slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in places) == ["0", "0", "1", "1"]


def test_a_run_on_several_gpus_goes_through_torchrun(four_gpus):
    (first, second) = slots.slots(0, "0,1,2,3", 1, 2)
    job = Job("train.py", ("a=1",), Path("runs/x"), "summary.json", None)
    assert "torch.distributed.run" in first.command(job) and "--nproc-per-node=2" in first.command(job)
    assert second.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, "none", 1, 2), "no GPU is visible"),
        ((1, "0", 2, 2), "one must be 1"),
        ((1, "0", 1, 4), "there are 1 GPUs"),
        ((1, "99", 1, 1), "gpus=99: there is no GPU 99; visible are 0,1,2,3"),
        ((1, "0,0", 1, 1), "gpus=0,0 names a GPU twice"),
        ((1, ",", 1, 1), "auto, none, or numbers"),
        ((10**20, "none", 1, 1), "jobs=1(0+) must be between 0 and 10,000"),
        ((1, "none", 10**20, 1), "per_gpu=1(0+) must be between 1 and 10,000"),
    ],
    ids=str,
)
def test_slots_that_cannot_be_are_refused(given, message, four_gpus):
    with pytest.raises(ConfigError, match=message):
        slots.slots(*given)


def test_a_gpu_on_a_machine_without_one_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="gpus=99: there is no GPU 99; none is visible"):
        slots.slots(1, "99", 1, 1)


# ---------------------------------------------------------------------------------------------------------- runner


def test_everything_runs_once_and_a_second_launch_has_nothing_to_do(mini, tmp_path, stand_in):
    table, output = tables.load(str(mini), "smoke"), tmp_path / "runs"
    assert {job.state for job in launched(table, output, at_once=4).values()} == {DONE}
    launched(table, output)
    assert set(started(output).values()) == {1}
    assert len(started(output)) == 3 * len(table.seeds)


@pytest.fixture
def six(tmp_path):
    file = tmp_path / "six.yaml"
    rows = "\n".join(f"  r{i}: regularizer=dropkey regularizer.ratio=0.{i}" for i in (1, 2, 3))
    file.write_text(f"title: Six\nbaseline: r1\nrows:\n{rows}\n")
    return tables.load(str(file), "smoke")


@pytest.mark.fault(28)
def test_runs_that_raise_exit_die_or_diverge_leave_the_others_going(six, tmp_path, stand_in, monkeypatch):
    output = tmp_path / "runs"
    names = [job.run.name for job in jobs_of(six, str(output)).values()]
    bad = dict(zip(names[1:5], ("raise", "exit", "kill", "diverge"), strict=True))
    monkeypatch.setenv("BEHAVIOUR", json.dumps(bad))
    items = launched(six, output)
    assert [items[name].state for name in names] == [DONE, FAILED, FAILED, FAILED, DIVERGED, DONE]
    reasons = [items[name].reason for name in names[1:5]]
    assert "a made-up error" in reasons[0] and "exit code 7: leaving early" in reasons[1]
    assert "SIGKILL" in reasons[2] and reasons[3] == "loss nan"
    assert "a made-up error" in items[names[1]].job.log.read_text()

    before = started(output)
    monkeypatch.delenv("BEHAVIOUR")
    assert [launched(six, output)[name].state for name in names[1:5]] == [FAILED, FAILED, FAILED, DIVERGED]
    assert started(output) == before  # only when asked to
    assert {job.state for job in launched(six, output, retry=True).values()} == {DONE}
    assert [(started(output) - before)[name] for name in names] == [0, 1, 1, 1, 1, 0]


def test_a_run_that_failed_in_another_launcher_meanwhile_is_not_tried_again(six, tmp_path, stand_in, monkeypatch):
    todo, output = distinct(jobs_of(six, str(tmp_path / "runs"))), tmp_path / "runs"
    monkeypatch.setenv("BEHAVIOUR", json.dumps({todo[1].run.name: "exit", todo[2].run.name: "diverge"}))
    standing_in.announce(todo, output)
    slot = slots.slots(1, "none", 1, 1)

    def others_come_first(launcher, event, one):
        if (event, one.job) == ("start", todo[0]):
            Launcher(todo[1:], slot).run()

    states = [one.state for one in Launcher(todo, slot).run(others_come_first)]
    assert states == [DONE, FAILED, DIVERGED, DONE, DONE, DONE]
    assert set(started(output).values()) == {1}


def test_what_depends_on_a_failed_run_says_so(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"-dropkey-": "exit"}')
    jobs = launched(tables.load(str(mini), "smoke", (0,)), tmp_path / "runs")
    assert sum("it needs" in job.reason for job in jobs.values()) == 2
    assert collections.Counter(job.state for job in jobs.values()) == {DONE: 1, FAILED: 3}


def test_a_run_that_somebody_stops_is_left_to_be_resumed_and_so_is_what_needs_it(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"-dropkey-": "stop"}')
    table = tables.load(str(mini), "smoke", (0,))
    jobs = launched(table, tmp_path / "runs")
    assert collections.Counter(job.state for job in jobs.values()) == {DONE: 1, INTERRUPTED: 3}
    monkeypatch.delenv("BEHAVIOUR")
    assert {job.state for job in launched(table, tmp_path / "runs").values()} == {DONE}


LAUNCH = """
import json, sys
from pathlib import Path
sys.path[:0] = {path}
from dropkey.reproduction import jobs, runner, slots, tables
import stand_in
slots.SCRIPTS, runner.POLL, runner.RECHECK = Path({scripts!r}), 0.02, 0.1
todo = jobs.distinct(jobs.jobs_of(tables.load({table!r}, "smoke", (0, 1, 2)), {output!r}))
stand_in.announce(todo, Path({output!r}))
launcher = runner.Launcher(todo, slots.slots(2, "none", 1, 1))
states = launcher.run()
print(json.dumps([[one.state for one in states], launcher.stopped]))
"""


def launcher_process(mini, scripts, output) -> subprocess.Popen:
    path = [str(ROOT), str(ROOT / "tests")]
    code = LAUNCH.format(path=path, scripts=str(scripts), table=str(mini), output=str(output))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.fault(28)
def test_two_launchers_at_once_run_nothing_twice_and_both_see_all_done(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.3")
    output = tmp_path / "runs"
    both = [launcher_process(mini, stand_in, output) for _ in range(2)]
    for process in both:
        states, _ = json.loads(process.communicate(timeout=120)[0])
        assert set(states) == {DONE}
    assert set(started(output).values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_lets_its_runs_save_and_the_next_one_goes_on(number, mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", '{"dropkey": "sleep"}')
    output = tmp_path / "runs"
    process = launcher_process(mini, stand_in, output)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(output.glob("*dropkey*/status.json")):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    states, stopped = json.loads(process.communicate(timeout=60)[0])
    assert stopped == number and INTERRUPTED in states
    monkeypatch.delenv("BEHAVIOUR")
    jobs = launched(tables.load(str(mini), "smoke", (0, 1, 2)), output)
    assert {job.state for job in jobs.values()} == {DONE}


@pytest.mark.fault(28)
def test_a_launcher_killed_outright_loses_nothing(mini, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.5")
    output = tmp_path / "runs"
    process = launcher_process(mini, stand_in, output)
    while not list(output.glob("*/status.json")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    jobs = launched(tables.load(str(mini), "smoke", (0, 1, 2)), output)  # while its runs still go on
    assert {job.state for job in jobs.values()} == {DONE}
    assert max(started(output).values()) <= 2  # a second start finds the run locked or done


def test_a_discarded_result_is_made_again(mini, tmp_path, stand_in):
    output, table = tmp_path / "runs", tables.load(str(mini), "smoke", (0,))
    launched(table, output)
    for label in ("none", "several passes"):
        runner.discard(row(jobs_of(table, str(output)), label))
    before = started(output)
    assert {one.state for one in launched(table, output).values()} == {DONE}
    assert [name.split("-")[1] for name in started(output) - before] == ["none"]


def test_a_run_in_training_is_not_discarded(mini_jobs):
    job = row(mini_jobs, "none")
    finish(job)
    with RunDirectory(job.run).lock(), pytest.raises(Busy):
        runner.discard(job)
    with runner.claimed(job), pytest.raises(Busy, match="another launcher"):
        runner.discard(job)
    assert jobs.state(job)[0] == DONE


def test_a_run_is_running_only_while_a_process_holds_it_and_done_only_with_a_summary(mini_jobs):
    job = row(mini_jobs, "none")
    assert jobs.state(job) == (MISSING, "")
    RunDirectory(job.run).set_status("running")
    with RunDirectory(job.run).lock():
        assert jobs.state(job)[0] == RUNNING
    assert jobs.state(job)[0] == INTERRUPTED
    RunDirectory(job.run).set_status("done")
    assert jobs.state(job)[0] == INTERRUPTED  # its summary is missing
