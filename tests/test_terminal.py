"""What people see in a terminal: help, epoch lines, the events and plan of a table, and the time that is left."""

import contextlib
import dataclasses
import io
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import runs
import stand_in as standing_in
from dropkey.commands import train
from dropkey.config import device, help
from dropkey.config.compose import valid_keys
from dropkey.config.schema import EvalConfig, LoggerConfig, TrainConfig
from dropkey.engine import tracking
from dropkey.engine.progress import Progress
from dropkey.engine.trainer import Trainer
from dropkey.errors import ConfigError
from dropkey.metrics import Metric
from dropkey.records import RunDirectory
from dropkey.reproduction import display, planning, runner, tables, tuning
from dropkey.reproduction.forecast import STARTUP, Forecast, makespan
from dropkey.reproduction.jobs import DONE, FAILED, Job, jobs_of
from dropkey.reproduction.runner import JobState, Launcher
from dropkey.reproduction.slots import Slot

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("schema", [TrainConfig, EvalConfig])
def test_every_key_has_a_meaning(schema):
    found = help.meanings(schema)
    assert all(found.values()), [key for key, text in found.items() if not text]
    assert not set(valid_keys(schema)) - set(found)


def test_a_meaning_names_the_choices():
    assert help.meanings()["schedule.name"].endswith("one of constant, decreasing, increasing")


def test_two_columns_are_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = help.two_columns([("key=1", "a meaning that needs two lines"), ("a_long_key=1", "x")], left=8)
    assert shown.splitlines() == [
        "  key=1     a meaning that needs two",
        "            lines",
        "  a_long_key=1",
        "            x",
    ]


@pytest.mark.parametrize(
    "words", [["train.py"], ["scripts/visualize.py"], ["-m", "dropkey"], ["scripts/search.py"]], ids=" ".join
)
def test_help_ends_silently_when_nobody_reads_it(words):
    process = subprocess.Popen(
        [sys.executable, *words, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141  # as a program that SIGPIPE ends, in a shell


# ------------------------------------------------------------------------------------------------------ missing GPU


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("version", "visible", "library", "reason"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", None, no_library, "built without CUDA"),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", "", str, "CUDA_VISIBLE_DEVICES hides all GPUs"),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", None, no_library, "no NVIDIA driver"),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", None, str, None),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'", None, no_library, None),
    ],
)
def test_a_missing_gpu_is_known_without_torch(version, visible, library, reason, monkeypatch, tmp_path):
    (tmp_path / "version.py").write_text(version)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / "x.py"))
    monkeypatch.setattr(device.ctypes, "CDLL", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (reason in device.no_cuda()) if reason else device.no_cuda() == ""


def test_a_training_on_a_missing_gpu_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "no_cuda", lambda: "this machine has no NVIDIA driver")
    monkeypatch.setitem(sys.modules, "dropkey.session", None)  # it would import torch
    with pytest.raises(ConfigError, match=r"trainer.device=cuda, but this .* driver; take trainer.device=auto"):
        train.train(runs.config(tmp_path / "runs", "trainer=gpu", "trainer.epochs=3"))
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------ epoch lines


def epoch_lines(*seconds: float, epochs: int = 10, split: str = "val", rate=1234.0) -> list[str]:
    lines = []
    progress = Progress(epochs, Metric("top1", "top-1", "%"), lines.append)
    progress.split = split
    for epoch, at in enumerate(seconds, 1):
        record = {"epoch": epoch, "train_loss": 1.0, "eval_top1": 50.0, "eval_loss": 0.5, "seconds": at}
        progress.finish_epoch({**record, "samples_per_second": rate})
    return lines


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_epoch_line_names_its_split_and_the_time_left(split):
    (line,) = epoch_lines(60.0, split=split)
    assert line == f"epoch  1/10  loss 1.0000  {split} top-1 50.00 %  1,234 samples/s  9:00 left"


def test_an_epoch_line_of_a_long_training_fits_80_columns():
    (line,) = epoch_lines(300.0, epochs=300, split="test", rate=12345.0)
    assert line.endswith("12,345 samples/s  24:55:00 left") and len(line) <= 80


def test_the_time_left_forgets_a_slow_first_epoch():
    assert epoch_lines(100.0, 110.0, 120.0)[-1].endswith("  1:10 left")


def test_the_last_epoch_line_says_how_long_all_took():
    assert epoch_lines(10.0, 20.0, epochs=2)[-1].endswith("  took 0:20")


def test_an_epoch_without_a_step_of_its_own_has_no_rate():
    assert "samples/s" not in epoch_lines(10.0, rate=None)[0]


def test_samples_per_second_are_of_the_epoch_alone_without_evaluation(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def timed(self):
        yield
        self.state.position.training_seconds += 1.0 + self.state.position.epoch

    monkeypatch.setattr(Trainer, "timed", timed)
    records = runs.train(tmp_path).records("epoch")  # three steps of 16, and the wait for the last one
    assert [record["samples_per_second"] for record in records] == pytest.approx([48 / 4, 48 / 8, 48 / 12])


def test_a_training_goes_on_when_nobody_reads_its_lines(tmp_path):
    program = (
        "import sys; from dropkey.errors import Unread; from dropkey.engine.progress import Progress; "
        "sys.stdout = Unread(sys.stdout); p = Progress(1); [p.info('x' * 99) for _ in range(9)]"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(0.2); {program}; open({str(tmp_path / 'end')!r}, 'w')"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    assert (tmp_path / "end").exists()


# --------------------------------------------------------------------------------------------------------- tracking


@pytest.mark.parametrize(
    ("config", "environment", "mode"),
    [
        (None, None, "offline"),
        (None, "", "offline"),
        (None, "online", "online"),
        (None, "run", "online"),
        (None, "dryrun", "offline"),
        (None, "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("online", "disabled", "online"),
    ],
)
def test_wandb_mode_counts_where_the_config_says_nothing(config, environment, mode, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    said = []
    assert tracking.mode(TrainConfig(logger=LoggerConfig(mode=config)), said.append) == mode and not said


def test_an_unknown_wandb_mode_is_said_and_is_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    said = []
    assert tracking.mode(TrainConfig(), said.append) == "offline"
    assert said == ["WANDB_MODE=onlin is none of online, offline, disabled: W&B is offline"]


def test_wandb_mode_disabled_starts_no_tracker(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(tracking.start(TrainConfig(), tmp_path, print), tracking.NoOpTracker)


# ----------------------------------------------------------------------------------------------- a table's time left

TABLE = """
title: Two models
baseline: none
rows:
  none: regularizer=none
  a row with a very long name that nobody can fit anywhere: regularizer=dropkey
  short: { of: none, train: regularizer=none trainer.epochs=5 }
  passes: { of: a row with a very long name that nobody can fit anywhere, evaluate: eval.monte_carlo=2 }
scales:
  smoke:
    seeds: 3
    columns: { A: experiment=digits_few, B: experiment=digits_few model.embed_dim=64 }
"""


@pytest.fixture
def table(tmp_path) -> tables.Table:
    (tmp_path / "two.yaml").write_text(TABLE)
    return tables.load(str(tmp_path / "two.yaml"), "smoke")


@pytest.fixture
def found(table, tmp_path) -> dict[tuple[str, str, int], Job]:
    return jobs_of(table, str(tmp_path / "runs"))


def finish(job: Job, seconds: float, took: float | None = None) -> None:
    """What a finished job leaves that says how long it took; `took` with all around its epochs."""
    run, result = RunDirectory(job.run), {**standing_in.RESULT, "top1": 50.0}
    if job.evaluation:
        from dropkey.config.identity import evaluation_settings

        return run.write_result(job.result, {**result, "settings": evaluation_settings(job.evaluation)})
    result |= {"seconds": seconds, "samples": 100, "samples_per_second": 20.0, "epochs": 1, "best_split": "val"}
    run.write_result("summary.json", result)
    run.set_status("done")
    if took is not None:
        job.claim.write_text(str(took))


def varied(job: Job, **changes) -> Job:
    """Another job, with other values in its config: `data_max_train_samples=100`."""
    config = job.config
    for key, value in changes.items():
        group, _, name = key.partition("_")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return dataclasses.replace(job, config=config, overrides=(*job.overrides, str(changes)))


def test_a_training_takes_as_long_per_epoch_as_one_that_is_finished(found):
    job = found["none", "A", 0]
    finish(job, 50.0)
    longer = varied(job, trainer_epochs=2 * job.config.trainer.epochs)
    assert Forecast([job]).seconds(longer) == pytest.approx(STARTUP + 100)
    assert Forecast([job]).seconds(longer, share=0.5) == pytest.approx(STARTUP + 50)


def test_images_and_blocks_count_in_proportion(found):
    job = varied(found["none", "A", 0], data_max_train_samples=100, model_depth=2)
    finish(job, 50.0)
    other = varied(job, data_max_train_samples=300, model_depth=4)
    assert Forecast([job]).seconds(other) == pytest.approx(STARTUP + 50 * 3 * 2)


def test_another_width_or_image_size_is_not_known(found):
    finish(found["none", "A", 0], 50.0)
    assert Forecast([found["none", "A", 0]]).seconds(found["none", "B", 0]) is None


def test_the_same_regularizer_says_more_than_another_one(found):
    none, dropkey = found["none", "A", 0], next(job for place, job in found.items() if place[0].startswith("a row"))
    finish(none, 50.0)
    assert Forecast([none]).seconds(dropkey) == pytest.approx(STARTUP + 50)
    finish(dropkey, 80.0)
    assert Forecast([none, dropkey]).seconds(dropkey) == pytest.approx(STARTUP + 80)


def test_what_this_launcher_ran_counts_before_earlier_runs(found):
    own, earlier = found["none", "A", 0], found["none", "A", 1]
    finish(own, 50.0)
    finish(earlier, 500.0)
    assert Forecast([own], [earlier]).seconds(found["none", "A", 2]) == pytest.approx(STARTUP + 50)


def test_the_start_is_measured_too(found):
    finish(found["none", "A", 0], 50.0, took=57.0)
    finish(found["none", "A", 1], 50.0, took=4000.0)  # waited in a queue
    done = [found["none", "A", 0], found["none", "A", 1]]
    assert Forecast(done).seconds(found["none", "A", 2]) == pytest.approx(57)


def test_a_run_under_way_shows_its_pace(found):
    job = found["none", "A", 0]
    RunDirectory(job.run).set_status("running")
    RunDirectory(job.run).append({"kind": "epoch", "step": 9, "epoch": 1, "seconds": 4.0})
    epochs = job.config.trainer.epochs
    assert Forecast([job]).seconds(found["none", "A", 1]) == pytest.approx(STARTUP + 4 * epochs)


def test_a_run_in_its_first_epoch_shows_its_pace_by_its_steps(found):
    job = found["none", "A", 0]
    RunDirectory(job.run).set_status("running")
    RunDirectory(job.run).append({"kind": "step", "step": 50, "seconds": 4.0, "share_done": 0.1})
    assert Forecast([job]).seconds(found["none", "A", 1]) == pytest.approx(STARTUP + 40)


def test_a_step_says_how_much_of_the_training_is_done_and_took(tmp_path):
    *_, last = runs.train(tmp_path).records("step")
    assert last["share_done"] == 1 and last["seconds"] > 0


def test_jobs_fill_slots_and_wait_for_those_they_need(found):
    first, second = found["none", "A", 0], found["none", "A", 1]
    needy = found["short", "A", 1]
    assert needy.needs == second
    assert makespan([(first, 10.0), (second, 4.0)], 1) == 14
    assert makespan([(first, 10.0), (second, 4.0)], 2) == 10
    assert makespan([(second, 10.0), (needy, 4.0)], 2) == 14
    assert makespan([], 2) == 0


class Clock:
    """Stands in for the module time: sleeping takes no time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def real_seconds(job: Job) -> float:
    """On a made-up machine: 2 s an epoch, column B three times as slow, DropKey a fifth slower."""
    if job.evaluation:
        return 36.0
    slow = 3 if job.config.model.embed_dim == 64 else 1
    return 2.0 * job.config.trainer.epochs * slow * (1.2 if job.config.regularizer.name == "dropkey" else 1)


@pytest.fixture
def launched(found, monkeypatch):
    """(seconds that were left, seconds that the launcher said) at each event of a launch on two slots."""
    clock, jobs = Clock(), list(dict.fromkeys(found.values()))
    for module in (runner, planning):
        monkeypatch.setattr(module, "time", clock)

    class Process:
        def __init__(self, command, environment, log):
            self.job = next(job for job in jobs if log == job.log)
            self.seconds = real_seconds(self.job)
            self.end = clock.now + self.seconds + (0 if self.job.evaluation else 30)

        def poll(self):
            if clock.now < self.end:
                return None
            finish(self.job, self.seconds)
            return 0

    seen = []
    launcher = Launcher(jobs, [Slot((), 1)] * 2, start=Process)
    launcher.run(lambda launcher, event, one: seen.append((clock.now, planning.time_left(launcher))))
    assert {one.state for one in launcher.states} == {DONE}
    return [(seen[-1][0] - at, said) for at, said in seen]


def test_the_time_left_is_right_within_a_factor_of_a_half_more(launched):
    told = [(left, said) for left, said in launched[:-1] if said is not None and left > 30]
    assert len(told) > 0.7 * len(launched)  # from the first finished jobs of both columns on
    assert all(left / 1.5 < said < left * 1.5 for left, said in told), told


# --------------------------------------------------------------------------------------------------- events and plan


def shown(one: JobState, event: str, left: float | None, monkeypatch, columns: int | None = 80, done: int = 12) -> str:
    """What an event prints."""
    monkeypatch.setattr(planning, "time_left", lambda launcher, others: left)
    monkeypatch.setenv("COLUMNS", str(columns)) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    others = [JobState(one.job, DONE)] * done + [JobState(one.job, runner.WAITING)] * (60 - done)
    file = io.StringIO()
    console = Console(file=file, highlight=False, soft_wrap=True, markup=False, width=columns or 80)
    display.watch(console)(SimpleNamespace(states=others), event, one)
    return file.getvalue().rstrip("\n")


def place_of(found, row: str) -> Job:
    return next(job for (label, column, seed), job in found.items() if label.startswith(row) and column == "A")


def test_a_job_is_named_by_row_column_and_seed(found):
    assert found["none", "B", 2].label == "none · B · seed 2"


def test_a_table_of_one_column_does_not_name_it(table, tmp_path):
    narrow = dataclasses.replace(table, columns={"A": table.columns["A"]})
    assert jobs_of(narrow, str(tmp_path))["none", "A", 0].label == "none · seed 0"


def test_a_candidate_is_named_by_what_tells_it_from_the_others(tmp_path):
    table = tables.load("best", "smoke")
    row = table.rows["best Dropout"]
    row = dataclasses.replace(row, candidates=[one for one in row.candidates if "regularizer.ratio=0.3" in one])
    found = tuning.jobs_of(dataclasses.replace(table, rows={row.label: row}), str(tmp_path))
    schedules = {job.label.split(" · ")[0] for job in found.values()}
    assert schedules == {f"best Dropout, schedule={name}" for name in ("constant", "decreasing")}


def test_an_event_says_how_much_is_over_and_left(found, monkeypatch):
    one = JobState(found["none", "A", 0], runner.RUNNING, slot=Slot((), 1))
    assert shown(one, "start", 3900, monkeypatch) == "start  none · A · seed 0  [12/60, about 1:05:00 left]"
    assert shown(one, "start", None, monkeypatch) == "start  none · A · seed 0  [12/60]"


def test_a_slot_on_a_gpu_is_named(found, monkeypatch):
    one = JobState(found["none", "A", 0], runner.RUNNING, slot=Slot(("3",), 1))
    assert shown(one, "start", None, monkeypatch) == "start  none · A · seed 0  gpu 3  [12/60]"


def test_a_long_row_loses_its_middle_so_that_result_and_time_stay(found, monkeypatch):
    job = place_of(found, "a row")
    finish(job, 50.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: 114.0))
    line = shown(JobState(job, DONE, started=100.0), "end", 3900, monkeypatch)
    assert line == "done   a row wi…nywhere · A · seed 0  50.00 %  0:14  [12/60, about 1:05:00 left]"
    assert len(line) == 80


def test_in_a_file_a_row_is_whole(found, monkeypatch):
    one = JobState(place_of(found, "a row"), runner.RUNNING, slot=Slot((), 1))
    assert "a row with a very long name that nobody can fit anywhere · A" in shown(one, "start", 9, monkeypatch, None)


def test_a_failure_says_why_and_where_its_log_is(found, monkeypatch):
    job = found["none", "A", 0]
    lines = shown(JobState(job, FAILED, "exit code 7: no memory"), "end", None, monkeypatch).splitlines()
    assert lines == ["failed none · A · seed 0  [12/60]", "       exit code 7: no memory", f"       log {job.log}"]


@pytest.mark.parametrize("name, scale", [*itertools.product(tables.names(), ["smoke", "cpu", "small", "paper"])])
def test_every_plan_fits_80_columns(name, scale):
    table = tables.load(name, scale)
    file = io.StringIO()
    for grid in display.overview(table, {}, {}, 80):
        Console(file=file, width=80).print(grid)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for row in table.rows:
        assert any(line.startswith(row[:9]) for line in lines)
    marks = len(table.rows) * sum(len(table.seeds) if len(table.seeds) <= display.SHOWN else 1 for _ in table.columns)
    assert file.getvalue().count("?") == marks


def test_columns_that_do_not_fit_follow_below(table):
    wide = dataclasses.replace(table, columns={f"a column number {number}": () for number in range(9)})
    assert len(display.overview(wide, {}, {}, 60)) > 1 == len(display.overview(wide, {}, {}, 250))


def test_cut_keeps_both_ends():
    assert [display.cut("abcdefghij", width) for width in (10, 9, 5)] == ["abcdefghij", "abcd…ghij", "ab…ij"]
