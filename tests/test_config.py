"""Composition, checks, messages and identity of a config, and Hydra's own features (faults 7, 21, 24, 26)."""

import copy
import dataclasses
import functools
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from dropkey import cli, errors
from dropkey.commands import eval as evaluating
from dropkey.commands import train
from dropkey.config import identity
from dropkey.config.check import check
from dropkey.config.compose import CONFIGS, compose, load, register_schemas, save
from dropkey.config.geometry import known_models
from dropkey.config.schema import REGULARIZER_NAMES, EvalConfig, TrainConfig
from dropkey.errors import ConfigError, DataError, Diverged, Interrupted, PeerLost

ROOT = Path(__file__).parents[1]
OPTIONS = sorted((f.parent.name, f.stem) for f in CONFIGS.glob("*/*.yaml") if f.parent.name not in ("local", "table"))


def of(group: str) -> list[str]:
    return [option for name, option in OPTIONS if name == group]


def command_line(monkeypatch, capsys, *words: str, task=check) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `train.py <words>` with `task` in place of the training."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(train, "train", task)
    code, root = 0, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with cli.command():
            train.main()
    except SystemExit as stopped:
        code = stopped.code
    finally:  # --info and -sc log to a stream that ends with the test
        root.handlers, root.level = handlers, level
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@functools.lru_cache(maxsize=None)
def composed(*words: str) -> TrainConfig:
    return compose(list(words))


def config(text: str = "") -> TrainConfig:
    """The unchecked config of some words; composing takes a while, so values are set afterwards."""
    words = [word.partition("=") for word in text.split()]
    cfg = copy.deepcopy(composed(*(key + "=" + value for key, _, value in words if "." not in key and key != "seed")))
    for key, _, value in words:
        if "." in key or key == "seed":
            *parents, last = key.split(".")
            setattr(functools.reduce(getattr, parents, cfg), last, yaml.safe_load(value))
    return cfg


# ---------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("group, option", [pair for pair in OPTIONS if pair[0] != "model"])
def test_every_option_of_every_group_composes_and_passes_the_checks(group, option):
    """Models: test_models.py."""
    check(compose([f"{group}={option}", *(["data=cifar10"] if group in ("augment", "debug") else [])]))


MODELS = ("vit_tiny", "deit_small", "volo_d1", "t2t_vit_small_image")


@pytest.mark.parametrize("number", range(len(of("regularizer"))))
def test_models_regularizers_schedules_and_data_combine(number):
    regularizer, schedule = of("regularizer")[number], of("schedule")[number % 3]
    model, data = MODELS[number % 4], ("cifar10", "cifar100", "cifar10_jpeg")[number // 2 % 3]
    cfg = check(compose([f"regularizer={regularizer}", f"schedule={schedule}", f"model={model}", f"data={data}"]))
    assert (cfg.regularizer.name, cfg.schedule.name) == (regularizer, schedule)


def test_the_command_of_the_readme_composes_to_what_it_says():
    words = "model=volo_d1 regularizer=dropkey regularizer.ratio=0.1 schedule=decreasing data=cifar100 seed=3"
    cfg = check(compose(words.split()))
    assert (cfg.model.name, cfg.model.patch_size, cfg.data.num_classes) == ("volo_d1_224", 4, 100)
    assert (cfg.regularizer.ratio, cfg.schedule.name, cfg.seed) == (0.1, "decreasing", 3)


def test_the_default_command_is_the_schema_but_for_the_models_sizes_and_the_data_set():
    composed, schema = (identity.flatten(dataclasses.asdict(cfg)) for cfg in (compose(), TrainConfig()))
    differing = {key for key in composed if composed[key] != schema[key]}
    sizes = {"model.depth", "model.embed_dim", "model.num_heads", "model.mlp_ratio"}
    assert differing == sizes | {"data.channels", "data.num_classes", "data.mean", "data.std"}


@pytest.mark.parametrize("group, option", [pair for pair in OPTIONS if pair[0] not in ("experiment", "debug")])
def test_no_option_repeats_a_default_of_the_schema(group, option):
    """But its name, where the option is not the default one."""
    chosen = [entry for entry in OmegaConf.load(CONFIGS / "train.yaml").defaults if OmegaConf.is_dict(entry)]
    schema = dataclasses.asdict(TrainConfig())[group]
    keys = OmegaConf.load(CONFIGS / group / f"{option}.yaml") or {}
    allowed = set() if {group: option} in chosen else {"name"}
    assert {key for key, value in keys.items() if schema[key] == value} <= allowed


@pytest.mark.parametrize("name", of("experiment"))
def test_an_experiment_opens_with_its_claim_and_a_command_that_trains_it(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    assert "# Claim: " in text
    assert re.search(rf"# Command: .*train\.py experiment={name}\b", text)


@pytest.mark.parametrize(
    "debug, steps", [("smoke", 20), ("profile", 12), ("overfit", None)], ids=["smoke", "profile", "overfit"]
)
def test_debug_overlays_win_over_an_experiment(debug, steps):
    cfg = compose(["experiment=cifar10_vit_9x192", f"debug={debug}"])
    assert cfg.trainer.max_steps == steps
    assert cfg.trainer.overfit == (debug == "overfit")


@pytest.mark.parametrize("debug", of("debug"))
@pytest.mark.parametrize("experiment", of("experiment"))
def test_every_experiment_can_be_debugged(experiment, debug):
    check(compose([f"experiment={experiment}", f"debug={debug}"]))


def test_seed_zero_is_a_seed():
    a, b = (check(config(f"seed={seed}")) for seed in (0, 1))
    assert "-s0-" in str(identity.run_directory(a))
    assert identity.run_hash(a) != identity.run_hash(b)
    assert identity.group_hash(a) == identity.group_hash(b)


# --------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "regularizer=dropky": "regularizer=dropky does not exist; did you mean dropkey? choices: dropattention, dropkey,",
    "schedule=linear": "schedule=linear does not exist; choices: constant, decreasing, increasing",
    "model=volo_d9": "did you mean volo_d",
    "modle=volo_d1": "did you mean model?",
    "regularizer.rato=0.1": "did you mean regularizer.ratio?",
    "lr=0.1": "did you mean optim.lr?",
    "hydra.foo=1": "hydra.foo is no key of Hydra; --cfg hydra prints all keys",
    "hydra/launcher=joblb": "did you mean joblib?",
    "+foo=1": "foo is no key",
    "+model.hidden=1": "model.hidden is no key",
    "regularizer.ratio=abc": "regularizer.ratio: Value 'abc' of type 'str' could not be converted to Float",
    "trainer.epochs=2.5": "could not be converted to Integer",
    "output=${nope}": "output: Interpolation key 'nope' not found",
    "regularizer.ratio=1.0": "regularizer.ratio=1.0 must be in [0, 1)",
    "table=schedule": "a table is many runs: python scripts/reproduce.py run table=",
    "init_from=/nowhere": "init_from=/nowhere means no run, and is no file",
    "seed=0,1": "seed=0,1 has several values; add --multirun",
    "regularizer.layers=self,cross": "write 'regularizer.layers=[self,cross]' for a list, or add --multirun",
    "--config-dir nowhere": "nowhere",
    "--config-name nowhere": "nowhere",
    "--resolve": "The --resolve flag",
    "key value": "cannot read 'key value'",
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("words, message", WRONG.items(), ids=WRONG)
def test_a_mistake_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, words, message):
    words = [words] if words == "key value" else words.split()
    code, out, error = command_line(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert message in error
    assert re.fullmatch(r"error: .+\n", error)


WRONG_VALUES = {
    "regularizer.ratio=-0.1": "must be in [0, 1)",
    "trainer.ema_decay=1": "trainer.ema_decay=1 must be in [0, 1)",
    "augment.mixup_prob=1.5": "must be in [0, 1]",
    "data.crop_pct=0.05": "must be in [0.1, 1]",
    "optim.lr=0": "must be above 0",
    "optim.lr=.nan": "must be above 0",
    "optim.weight_decay=-1": "must be 0 or more",
    "seed=-1": "must be 0 or more",
    "data.std=[0]": "must be above 0",
    "data.channels=2": "data.channels=2 does not exist; choices: 1, 3",
    "data.mean=[0.5,0.5]": "data.mean has 2 values for data.channels=1",
    "augment.crop_scale=[0.5,0.1]": "must be two shares of the area",
    "augment.crop_padding=8": "must be below data.image_size=8",
    "logger.mode=onlin": "did you mean online?",
    "schedule.end=0.5": "exceeds regularizer.ratio",
    "regularizer.name=dropkey_block": "takes an odd number of cells",
    "regularizer=dropkey_block regularizer.window=4": "takes an odd number of cells",
    "regularizer=dropkey_block regularizer.window=full": "takes an odd number of cells",
    "regularizer=dropkey_block_column regularizer.window=full": "takes an odd number of cells",
    "regularizer=dropkey_cross regularizer.window=1.0": "a share of the grid (such as 0.4), or full",
    "regularizer=dropkey_cross_column regularizer.window=-0.4": "a share of the grid (such as 0.4), or full",
    "optim.warmup_epochs=40": "optim.warmup_epochs=40 must be below trainer.epochs=40, or the learning rate never "
    "falls; take optim.warmup_epochs=4",
    "optim.cooldown_epochs=39": "optim.warmup_epochs=1 and optim.cooldown_epochs=39 leave none of trainer.epochs=40",
    "trainer.epochs=1": "optim.warmup_epochs=1 must be below trainer.epochs=1, or the learning rate never falls; "
    "take optim.warmup_epochs=0.1",
    "experiment=cifar10_vit_9x192 trainer.epochs=5": "take optim.warmup_epochs=0.5",
    "regularizer.window=3": "only dropkey_block and dropkey_cross",
    "regularizer.layers=[self,clas]": "did you mean class?",
    "regularizer.layers=[]": "regularizer.layers is empty",
    "data.image_size=9 model.patch_size=2": "is not divisible by model.patch_size",
    "data.image_size=31": "too few; take data.image_size=32",
    "data.image_size=62": "too few; take data.image_size=64",
    "model=volo_d1": "too few; take data.image_size=16",
    "data=imagenet model=vit_tiny data.image_size=225": "take data.image_size=240",
    "model=t2t_vit_14 data=cifar10": "4 tokens",
    "model=t2t_vit_14 data=imagenet model.patch_size=4": "has soft splits, no patches",
    "model=volo_d1 data=cifar10 model.patch_size=6": "VOLO has 4, 8 and 16",
    "model.name=vit_tinny_patch16_224": "did you mean vit_tiny_patch16_224?",
    "model.name=vit_small_patch16_224": "take model=timm model.name=vit_small_patch16_224",
    "model.num_heads=5": "not divisible by model.num_heads",
    "trainer.batch_size=10 trainer.grad_accum_steps=4": "not divisible by processes x trainer.grad_accum_steps",
    "trainer.amp=fp8": "trainer.amp=fp8 does not exist",
    f"init_from={ROOT} model.pretrained=true": "both give weights; take one",
    "data=folder data.in_memory=true": "data.crop_pct",
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("words, message", WRONG_VALUES.items(), ids=WRONG_VALUES)
def test_a_value_that_cannot_work_is_refused_with_its_key(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(config(words))


@pytest.mark.parametrize("name", [name for name in REGULARIZER_NAMES if "block" in name or "cross" in name])
@pytest.mark.parametrize("window", [1, 3, 0.4, 0.999])
def test_windows_are_cells_or_shares_of_the_grid(name, window):
    assert check(config(f"regularizer={name} regularizer.window={window}")).regularizer.window == window


@pytest.mark.parametrize("window", [3, 0.4, "full"])
def test_cells_and_shares_come_back_from_a_saved_config_as_they_were_given(window, tmp_path):
    cfg = compose(["regularizer=dropkey_cross", f"regularizer.window={window}"])
    save(cfg, tmp_path / "config.yaml")
    for found in (cfg, load(tmp_path / "config.yaml")):
        assert (found.regularizer.window, type(found.regularizer.window)) == (window, type(window))


@pytest.mark.parametrize(
    "words", ["trainer.epochs=1 optim.warmup_epochs=0.9", "trainer.epochs=1 optim.warmup_epochs=0"]
)
def test_a_warmup_that_ends_before_the_training_is_taken(words):
    check(config(words))


@pytest.fixture
def own(tmp_path):
    """A directory of the user's own configs, as given to --config-dir."""
    files = {
        "model/mine": "depth: 2",
        "experiment/model": "# @package _global_\ndefaults:\n  - override /model: vit_4x46",
        "experiment/key": "# @package _global_\nmodel: { depht: 3 }",
        "experiment/value": "# @package _global_\noptim: { lr: abc }",
        "experiment/syntax": "# @package _global_\noptim: { lr: 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    {
        "model=mine optim.lr=abc": "optim.lr: Value 'abc'",
        "model=mien": "model=mien does not exist; did you mean mine?",
        "experiment=model": "model=vit_4x46 does not exist; did you mean vit_4x64?",
        "experiment=key": "model.depht is no key of the config (in experiment/key); did you mean model.depth?",
        "experiment=value": "optim.lr: Value 'abc' of type 'str' could not be converted to Float (in experiment/value)",
        "experiment=syntax": "experiment/syntax.yaml",
    }.items(),
)
def test_messages_know_the_users_own_configs(own, words, message, monkeypatch, capsys):
    code, _, error = command_line(monkeypatch, capsys, "--config-dir", str(own), *words.split())
    assert code == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error)


@pytest.mark.parametrize("place", ["pkg://own_configs", "file"])
def test_configs_on_the_search_path_are_found(place, own, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(own / "model", tmp_path / "own_configs" / "model")
    (tmp_path / "own_configs" / "__init__.py").touch()
    word = f"hydra.searchpath=[{place if place != 'file' else f'file://{own}'}]"
    seen = []
    assert command_line(monkeypatch, capsys, word, "model=mine", task=seen.append)[0] == 0
    assert seen[0].model.depth == 2
    _, _, error = command_line(monkeypatch, capsys, word, "model=mien")
    assert "did you mean mine?" in error


@pytest.mark.fault(26)
def test_a_mistake_is_reported_before_torch_and_timm_are_imported():
    program = (
        "import sys, runpy; sys.argv = ['train.py', 'model.name=vit_tinny_patch16_224', 'regularizer.ratio=0.2']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"]


@pytest.mark.fault(26, full=True)
@pytest.mark.parametrize("words", [words for words in WRONG if words not in ("key value", "--resolve")])
def test_train_py_itself_ends_within_two_seconds_of_work(words, figure):
    before = os.times()
    done = subprocess.run([sys.executable, "train.py", *words.split()], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and WRONG[words] in done.stderr
    figure("train.py itself: one line, under 2 s of processor time")
    assert seconds < 2


@pytest.fixture
def second(monkeypatch):
    """Process 1 of a job; the list of times that it waits for torchrun to end it."""
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    before = signal.getsignal(signal.SIGTERM)
    yield waits
    signal.signal(signal.SIGTERM, before)


def test_only_the_first_process_of_a_job_reports(second, monkeypatch, capsys):
    """torchrun ends the others, with code 0, so that its report does not list them."""
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    assert command_line(monkeypatch, capsys, "regularizer=dropky")[::2] == (0, "")


def test_an_error_that_the_first_process_does_not_share_is_told_in_the_end(second, monkeypatch, capsys):
    code, _, error = command_line(monkeypatch, capsys, "regularizer=dropky")
    assert code == 2 and error.startswith("error: process 1: regularizer=dropky does not exist")
    assert second == [cli.PATIENCE]


def test_an_interruption_is_told_by_the_first_process_alone(second, monkeypatch, capsys):
    def task(cfg):
        raise Interrupted("saved", signal.SIGTERM)

    assert command_line(monkeypatch, capsys, task=task)[::2] == (143, "")
    assert second and second[0] < 30  # when torchrun kills


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_lost_another_one_leaves_the_word_to_it(rank, second, monkeypatch, capsys):
    def task(cfg):
        raise PeerLost("another process ended")

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    assert command_line(monkeypatch, capsys, task=task)[::2] == (0, "")


def test_torchruns_report_ends_with_the_line(monkeypatch, capsys, tmp_path):
    """In the form of its own ErrorHandler, whose message its table shows."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    _, _, error = command_line(monkeypatch, capsys, "regularizer=dropky")
    told = str(ChildFailedError("train.py", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert error.removeprefix("error: ").strip() in told.splitlines()[-2]


def test_an_error_that_one_process_alone_knows_is_printed_by_it(monkeypatch, capsys):
    def task(cfg):
        error = DataError("broken.png cannot be read")
        error.one_process = True
        raise error

    monkeypatch.setenv("RANK", "1")
    code, _, error = command_line(monkeypatch, capsys, task=task)
    assert (code, error) == (3, "error: process 1: broken.png cannot be read\n")


@pytest.mark.fault(8)
def test_the_batch_must_divide_among_torchruns_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, error = command_line(monkeypatch, capsys, "trainer.batch_size=64")
    assert code == 2
    assert "= 3" in error


def test_names_of_models_read_from_source_are_those_of_timm():
    import timm

    import dropkey.models  # noqa: F401

    assert known_models() >= set(timm.list_models())


# ------------------------------------------------------------------------------------------------- exit codes, -m

ERRORS = (errors.RunError, ConfigError, DataError, Diverged, errors.StorageError, errors.Busy)


def fails(failures: dict[int, Exception], seen: list[int]):
    """A task that notes each seed and raises where the seed is in `failures`."""

    def task(cfg):
        seen.append(cfg.seed)
        if cfg.seed in failures:
            raise failures[cfg.seed]
        return 0.5

    return task


@pytest.mark.parametrize("error, code", [*zip(ERRORS, (1, 2, 3, 4, 5, 6), strict=True), (Interrupted, 143)])
def test_each_error_has_its_exit_code_and_survives_pickling(error, code, monkeypatch, capsys):
    failure = error("why", 15) if error is Interrupted else error("why")
    failure.one_process = True
    copy = pickle.loads(pickle.dumps(failure))
    assert (type(copy), str(copy), copy.exit_code, copy.one_process) == (error, "why", code, True)
    failure.one_process = False
    text = "why; go on with: python train.py\n" if error is Interrupted else "error: why\n"
    assert command_line(monkeypatch, capsys, task=fails({0: failure}, [])) == (code, "", text)


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch, capsys):
    code, _, error = command_line(monkeypatch, capsys, task=fails({0: ZeroDivisionError("no samples")}, []))
    assert code == 1
    assert error.startswith("Traceback") and error.endswith("ZeroDivisionError: no samples\n")


def test_multirun_goes_through_the_product(monkeypatch, capsys, tmp_path):
    seen = []
    words = ("-m", "regularizer=none,dropout,dropkey", "seed=0,1", f"output={tmp_path}")
    code, _, _ = command_line(monkeypatch, capsys, *words, task=lambda c: seen.append((c.regularizer.name, c.seed)))
    assert code == 0
    assert seen == [(kind, seed) for kind in ("none", "dropout", "dropkey") for seed in (0, 1)]


def test_failing_jobs_of_a_multirun_are_printed_when_they_fail_and_leave_the_others_going(
    monkeypatch, capsys, tmp_path
):
    seen, failures = [], {1: Diverged("loss nan"), 2: DataError("no images"), 3: RuntimeError("device-side assert")}
    code, _, error = command_line(
        monkeypatch, capsys, "-m", "seed=0,1,2,3,4", f"output={tmp_path}", task=fails(failures, seen)
    )
    assert (seen, code) == ([0, 1, 2, 3, 4], 4)
    first, second, *traceback, which, last = error.splitlines()
    assert (first, second, last) == ("error: loss nan", "error: no images", "error: loss nan")
    assert traceback[-1] == "RuntimeError: device-side assert"
    assert "'seed=1'" in which


def test_a_mistake_in_one_job_is_found_before_the_first_begins(monkeypatch, capsys, tmp_path):
    seen = []
    words = ("-m", "seed=0,many", f"output={tmp_path}")
    code, _, error = command_line(monkeypatch, capsys, *words, task=fails({}, seen))
    assert (seen, code) == ([], 2)
    assert "seed: Value 'many'" in error


@pytest.mark.parametrize(
    "stop, text",
    [(Interrupted("all saved", 2), "all saved; go on with: python train.py -m"), (KeyboardInterrupt(), "")],
)
def test_an_interruption_ends_a_multirun(stop, text, monkeypatch, capsys, tmp_path):
    seen = []
    words = ("-m", "seed=0,1", f"output={tmp_path}")
    code, out, error = command_line(monkeypatch, capsys, *words, task=fails({0: stop}, seen))
    assert (code, out) == (130, "") and error.startswith(text)
    assert seen == [0]


# ------------------------------------------------------------------------------------------------ Hydra's features


def test_help_lists_the_groups_and_the_keys_but_no_tables(own, monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "--help", "--config-dir", str(own))
    assert code == 0
    for group, option in OPTIONS:
        listed = re.search(rf"^  {group}  .*\n(    .*\n)*", out, re.MULTILINE)[0]
        assert re.search(rf"\b{option}\b", listed), (group, option)
    for word in ("trainer.batch_size=64 ", "global: over all processes", "torchrun", "mine"):
        assert word in out
    assert "table" not in out


def test_help_shows_the_values_of_the_words_beside_it(monkeypatch, capsys):
    _, out, _ = command_line(monkeypatch, capsys, "--help", "model=vit_6x64", "trainer.epochs=7")
    assert re.search(r"^  model.depth=6  +blocks$", out, re.MULTILINE)
    assert re.search(r"^  trainer.epochs=7  +passes over", out, re.MULTILINE)


def test_cfg_job_prints_the_composed_config(monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "model=volo_d1", "--cfg", "job")
    assert code == 0
    assert "name: volo_d1_224" in out
    assert "clip_grad_norm: null" in out  # a default of the schema


@pytest.mark.parametrize(
    "what, text", {"searchpath": str(CONFIGS), "defaults": "regularizer/dropkey", "config": "embed_dim: 64"}.items()
)
def test_info_tells_how_the_config_comes_about(what, text, monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "--info", what)
    assert code == 0
    assert text in out


def test_the_shell_completes_options_and_keys(monkeypatch, capsys):
    assert "complete" in command_line(monkeypatch, capsys, "-sc", "install=bash")[1]
    for typed, offered in {
        "regularizer=dropatt": "regularizer=dropattention",
        "trainer.ep": "trainer.epochs=",
    }.items():
        monkeypatch.setenv("COMP_LINE", f"python train.py {typed}")
        monkeypatch.setenv("COMP_POINT", str(len(f"python train.py {typed}")))
        assert command_line(monkeypatch, capsys, "-sc", "query=bash")[1].strip() == offered


def test_a_local_file_changes_training_and_leaves_evaluation_alone(tmp_path):
    """The example of docs/configuration.md, as configs/local/default.yaml of a copy of the configs."""
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("local"))
    text = (ROOT / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "configs" / "local").mkdir()
    (tmp_path / "configs" / "local" / "default.yaml").write_text(example)
    register_schemas()
    with hydra.initialize_config_dir(str(tmp_path / "configs"), version_base="1.3"):
        cfg = hydra.compose("train", ["data=cifar10"])
        assert (cfg.output, cfg.data.root, cfg.data.name) == ("/scratch/runs", "/data", "cifar10")
        assert hydra.compose("eval", ["run=x"]).data is None


def test_eval_explains_data_without_a_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "run=x", "data.root=/new"])
    with pytest.raises(SystemExit) as stopped, cli.command(EvalConfig):
        evaluating.main()
    assert stopped.value.code == 2
    assert "root=<directory> says where" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "words",
    [
        "data.num_workers=7",
        "logger=none",
        "output=elsewhere",
        "trainer.device=cpu",
        "trainer.log_every=3",
        "overwrite=true",
    ],
)
def test_harmless_keys_leave_the_run_the_same(words):
    assert identity.run_hash(config(words)) == identity.run_hash(config())


@pytest.mark.parametrize(
    "words", ["trainer.epochs=41", "regularizer.ratio=0.2", "schedule=constant", "optim.lr=0.01", "trainer.amp=bf16"]
)
def test_keys_that_change_the_result_make_another_run(words):
    assert identity.run_hash(config(words)) != identity.run_hash(config())


def test_two_ways_to_say_the_same_training_are_one_run():
    hashes = {
        identity.run_hash(config(f"regularizer=none {words}"))
        for words in ("", "schedule=constant", "regularizer.ratio=0.3", "schedule=increasing")
    }
    assert len(hashes) == 1


def test_a_folder_is_known_by_its_path_and_a_named_set_is_not():
    def name(*words):
        return identity.run_hash(config(" ".join(words)))

    assert name("data=folder", "data.root=a") != name("data=folder", "data.root=b")
    assert name("data=cifar10", "data.root=a") == name("data=cifar10", "data.root=b")


def test_the_directory_names_what_a_person_looks_for():
    cfg = check(compose(["model=vit_9x192", "data=cifar100", "regularizer=dropout", "seed=3"]))
    name = identity.run_directory(cfg).name
    assert name == f"vit_9x192-dropout-0.1-cifar100-s3-{identity.run_hash(cfg)}"


def test_a_saved_config_loads_to_the_same_run(tmp_path):
    cfg = check(compose(["model=volo_d1", "data=cifar10", "regularizer=dropkey_cross", "regularizer.window=full"]))
    save(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg


def test_differences_name_key_old_and_new():
    a, b = config(), config("optim.lr=0.5 data.num_workers=0")
    assert identity.differences(a, b) == ["optim.lr: 0.002 -> 0.5"]


def test_a_value_of_the_wrong_type_in_a_saved_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: many\n")
    with pytest.raises(ConfigError, match="is not a config of this program"):
        load(tmp_path / "config.yaml")
