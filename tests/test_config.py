"""Composition, checks and identity of a config (faults 7, 21, 24, 26)."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from dropkey.config import identity, schema
from dropkey.config.check import check, known_models
from dropkey.config.compose import CONFIGS, SCHEMAS, compose, groups, launch, load, register_schemas, save, valid_keys
from dropkey.errors import ConfigError, DataError, Diverged, Interrupted

ROOT = Path(__file__).parents[1]
OPTIONS = [(group, option) for group, options in sorted(groups().items()) for option in sorted(options)]


def command_line(monkeypatch, capsys, *words: str, task=check) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `train.py <words>` with `task` in place of the training."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        launch("train", task)
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


# ---------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_of_every_group_composes_and_passes_the_checks(group, option):
    extra = ["data=imagenet"] if group == "model" and not option.endswith("small_image") else []
    extra += ["data=cifar10"] if option.endswith("small_image") or group in ("augment", "debug") else []
    check(compose([f"{group}={option}", *extra]))


@pytest.mark.parametrize("regularizer", groups()["regularizer"])
@pytest.mark.parametrize("model", ["vit_tiny", "deit_small", "volo_d1", "t2t_vit_small_image"])
def test_models_regularizers_schedules_and_data_combine(regularizer, model):
    turn = sum(map(ord, regularizer + model))  # which schedule and data meet them differs from pair to pair
    schedule = groups()["schedule"][turn % 3]
    data = ("cifar10", "cifar100", "cifar10_jpeg")[turn // 3 % 3]
    cfg = check(compose([f"regularizer={regularizer}", f"schedule={schedule}", f"model={model}", f"data={data}"]))
    assert (cfg.regularizer.name, cfg.schedule.name) == (regularizer, schedule)


def test_the_command_of_the_readme_composes_to_what_it_says():
    words = "model=volo_d1 regularizer=dropkey regularizer.ratio=0.1 schedule=decreasing data=cifar100 seed=3"
    cfg = check(compose(words.split()))
    assert (cfg.model.name, cfg.model.patch_size, cfg.data.num_classes) == ("volo_d1_224", 4, 100)
    assert (cfg.regularizer.ratio, cfg.schedule.name, cfg.seed) == (0.1, "decreasing", 3)


def test_every_line_of_a_group_file_says_what_its_key_is_for():
    silent = []
    for file in CONFIGS.glob("*/*.yaml"):
        if file.parent.name in ("local", "table"):  # tables are of another kind, see test_tables.py
            continue
        first, *rest = file.read_text().splitlines()
        assert first.startswith("#"), file
        obvious = ("name:", "classes:", "kind:", "momentum:", "epochs:", "defaults:", "root:")
        silent += [
            f"{file.name}: {line}"
            for line in rest
            if line.strip() and "#" not in line and not line.strip().startswith(("-", *obvious))
        ]
    assert silent == []


@pytest.mark.parametrize(
    "debug, steps", [("smoke", 20), ("profile", 12), ("overfit", None)], ids=["smoke", "profile", "overfit"]
)
def test_debug_overlays_win_over_an_experiment(debug, steps):
    cfg = compose(["experiment=cifar10_vit_9x192", f"debug={debug}"])
    assert cfg.trainer.max_steps == steps
    assert cfg.trainer.overfit == (debug == "overfit")


def test_seed_zero_is_a_seed():
    a, b = (check(compose([f"seed={seed}"])) for seed in (0, 1))
    assert "-s0-" in str(identity.run_directory(a))
    assert identity.run_hash(a) != identity.run_hash(b)
    assert identity.group_hash(a) == identity.group_hash(b)


# --------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "regularizer=dropky": "did you mean dropkey?",
    "model=volo_d9": "did you mean volo_d",
    "regularizer.rato=0.1": "did you mean regularizer.ratio?",
    "lr=0.1": "did you mean optim.lr?",
    "+foo=1": "foo is no key",
    "+model.hidden=1": "model.hidden is no key",
    "regularizer.ratio=abc": "could not be converted to Float",
    "trainer.epochs=2.5": "could not be converted to Integer",
    "regularizer.ratio=1.0": "outside [0, 1)",
    "regularizer.ratio=-0.1": "outside [0, 1)",
    "schedule.end=0.5": "exceeds regularizer.ratio",
    "regularizer.name=dropkey_block": "takes an odd number of cells",
    "regularizer=dropkey_block regularizer.window=4": "takes an odd number of cells",
    "regularizer=dropkey_block regularizer.window=full": "takes an odd number of cells",
    "regularizer.window=3": "only dropkey_block and dropkey_cross",
    "regularizer.layers=[self,clas]": "did you mean class?",
    "data.image_size=9 model.patch_size=2": "is not divisible by model.patch_size",
    "data.image_size=31": "too few; take data.image_size=32",
    "data.image_size=62": "too few; take data.image_size=64",
    "model=volo_d1": "too few; take data.image_size=16",
    "data=imagenet model=vit_tiny data.image_size=225": "take data.image_size=240",
    "model=t2t_vit_14 data=cifar10": "4 tokens",
    "model=volo_d1 data=cifar10 model.patch_size=6": "VOLO knows 4, 8 and 16",
    "model.name=vit_tinny_patch16_224": "did you mean vit_tiny_patch16_224?",
    "model.num_heads=5": "not divisible by model.num_heads",
    "trainer.batch_size=10 trainer.grad_accum_steps=4": "not divisible by processes x trainer.grad_accum_steps",
    "trainer.amp=fp8": "trainer.amp=fp8 does not exist",
    "optim.lr=0": "must be above 0",
    "table=schedule": "a table is many runs: python scripts/reproduce.py run table=schedule",
    "init_from=/nowhere": "init_from=/nowhere does not exist",
    "seed=-1": "must be 0 or more",
    "data=folder data.in_memory=true": "data.crop_pct",
    "model.name=vit_small_patch16_224": "take model=timm model.name=vit_small_patch16_224",
    "model=null": "model=null does not exist",
    "data.std=[0]": "must be above 0",
    "--config-dir nowhere": "nowhere",
    "key value": "overrides look like key=value",
}


@pytest.mark.parametrize("words, message", WRONG.items(), ids=WRONG)
def test_a_mistake_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, words, message):
    code, _, error = command_line(monkeypatch, capsys, *words.split())
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_mistake_is_reported_before_torch_and_timm_are_imported():
    program = (
        "import sys, runpy; sys.argv = ['train.py', 'model.name=vit_tinny_patch16_224', 'regularizer.ratio=0.2']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"]


def test_only_the_first_process_of_a_job_reports(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    code, _, error = command_line(monkeypatch, capsys, "regularizer=dropky")
    assert (code, error) == (2, "")


def test_the_batch_must_divide_among_torchruns_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, error = command_line(monkeypatch, capsys, "trainer.batch_size=64")
    assert code == 2
    assert "= 3" in error


def test_names_of_models_read_from_source_are_those_of_timm():
    import timm

    import dropkey.models  # noqa: F401

    assert known_models() >= set(timm.list_models())


# ------------------------------------------------------------------------------------------------ Hydra's features


def test_help_lists_the_groups_and_the_keys(monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "--help")
    assert code == 0
    for word in ("regularizer: dropattention, dropkey,", "t2t_vit_14", "batch_size:", "torchrun"):
        assert word in out


def test_cfg_job_prints_the_composed_config(monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "model=volo_d1", "--cfg", "job")
    assert code == 0
    assert "name: volo_d1_224" in out
    assert "clip: null" in out  # a default of the schema


def test_multirun_goes_through_the_product(monkeypatch, capsys, tmp_path):
    seen = []
    words = ("-m", "regularizer=none,dropout,dropkey", "seed=0,1", f"output={tmp_path}")
    code, _, _ = command_line(monkeypatch, capsys, *words, task=lambda c: seen.append((c.regularizer.name, c.seed)))
    assert code == 0
    assert seen == [(kind, seed) for kind in ("none", "dropout", "dropkey") for seed in (0, 1)]


def test_an_exception_in_a_multirun_leaves_the_others_going_too(monkeypatch, capsys, tmp_path):
    seen = []

    def task(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 0:
            raise RuntimeError("CUDA error: device-side assert")

    code, _, error = command_line(monkeypatch, capsys, "-m", "seed=0,1", f"output={tmp_path}", task=task)
    assert (seen, code) == ([0, 1], 1)
    assert "device-side assert" in error


def test_an_interrupted_job_ends_a_multirun_with_one_line(monkeypatch, capsys, tmp_path):
    seen = []

    def task(cfg):
        seen.append(cfg.seed)
        raise Interrupted("all saved", 2)

    code, _, error = command_line(monkeypatch, capsys, "-m", "seed=0,1", f"output={tmp_path}", task=task)
    assert (seen, code, error) == ([0], 130, "all saved\n")


def test_a_local_file_changes_training_and_leaves_evaluation_alone(tmp_path):
    """The example of the README, as configs/local/default.yaml of a copy of the configs."""
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("local"))
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    (tmp_path / "configs" / "local").mkdir()
    (tmp_path / "configs" / "local" / "default.yaml").write_text(example)
    register_schemas()
    with hydra.initialize_config_dir(str(tmp_path / "configs"), version_base="1.3"):
        cfg = hydra.compose("train", ["data=cifar10"])
        assert (cfg.output, cfg.data.root, cfg.data.name) == ("/scratch/runs", "/data", "cifar10")
        assert hydra.compose("eval", ["run=x"]).data is None


def test_eval_explains_data_without_a_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "run=x", "data.root=/new"])
    with pytest.raises(SystemExit) as stopped:
        launch("eval", check)
    assert stopped.value.code == 2
    assert "root=<directory> says where" in capsys.readouterr().err


def test_a_failing_job_of_a_multirun_leaves_the_others_going(monkeypatch, capsys, tmp_path):
    seen = []

    def task(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 1:
            raise Diverged("loss nan")
        if cfg.seed == 2:
            raise DataError("no images")

    code, _, error = command_line(monkeypatch, capsys, "-m", "seed=0,1,2,3", f"output={tmp_path}", task=task)
    assert (seen, code) == ([0, 1, 2, 3], 4)
    assert error.splitlines() == ["error: loss nan", "error: no images"]


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
    assert identity.run_hash(compose([words])) == identity.run_hash(compose())


@pytest.mark.parametrize(
    "words", ["trainer.epochs=41", "regularizer.ratio=0.2", "schedule=constant", "optim.lr=0.01", "trainer.amp=bf16"]
)
def test_keys_that_change_the_result_make_another_run(words):
    assert identity.run_hash(compose([words])) != identity.run_hash(compose())


def test_two_ways_to_say_the_same_training_are_one_run():
    hashes = {
        identity.run_hash(compose(["regularizer=none", *words]))
        for words in ([], ["schedule=constant"], ["regularizer.ratio=0.3"], ["schedule=increasing"])
    }
    assert len(hashes) == 1


def test_a_key_added_to_the_schema_leaves_the_hashes_of_old_runs_alone():
    keys = identity.canonical(compose())
    defaults = identity.flatten(dataclasses.asdict(schema.TrainConfig()))
    assert [key for key, value in keys.items() if value == defaults[key]] == ["seed"]


def test_a_folder_is_known_by_its_path_and_a_named_set_is_not():
    def name(*words):
        return identity.run_hash(compose(list(words)))

    assert name("data=folder", "data.root=a") != name("data=folder", "data.root=b")
    assert name("data=cifar10", "data.root=a") == name("data=cifar10", "data.root=b")


def test_the_directory_names_what_a_person_looks_for():
    cfg = check(compose(["model=vit_9x192", "data=cifar100", "regularizer=dropout", "seed=3"]))
    name = identity.run_directory(cfg).name
    assert name == f"vit_9x192-dropout-cifar100-s3-{identity.run_hash(cfg)}"


def test_a_saved_config_loads_to_the_same_run(tmp_path):
    cfg = check(compose(["model=volo_d1", "data=cifar10", "regularizer=dropkey_cross", "regularizer.window=full"]))
    save(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg


def test_differences_name_key_old_and_new():
    a, b = compose(), compose(["optim.lr=0.5", "data.num_workers=0"])
    assert identity.differences(a, b) == ["optim.lr: 0.002 -> 0.5"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_of_the_schema_is_valid(name):
    assert valid_keys(name)


def test_a_value_of_the_wrong_type_in_a_saved_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: many\n")
    with pytest.raises(ConfigError, match="is no config of this program"):
        load(tmp_path / "config.yaml")
