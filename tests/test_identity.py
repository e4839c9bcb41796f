"""A run is its config and its code: no old result stands for a new command."""

import ast
import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from dropkey import code_version
from dropkey.config import compose, identity
from dropkey.config.check import check
from dropkey.config.schema import TrainConfig

DEFAULTS = identity.flatten(dataclasses.asdict(TrainConfig()))
MEANINGLESS = {  # keys without a meaning, in a config in which they have none
    "none": ("regularizer.", "schedule."),
    "constant": ("schedule.end",),
}
ONLY_OF_STEPS = ("optim.decay_epochs", "optim.decay_rate")  # without a meaning for a cosine


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return [*value, "x"] if isinstance(value, list) else "other"


def with_key(cfg: TrainConfig, key: str, value) -> TrainConfig:
    cfg = copy.deepcopy(cfg)
    *path, name = key.split(".")
    place = cfg
    for part in path:
        place = getattr(place, part)
    setattr(place, name, value)
    return cfg


@pytest.mark.parametrize("key", DEFAULTS)
def test_another_default_is_another_run_unless_the_key_has_no_effect(key):
    before = with_key(TrainConfig(), "optim.sched", "step") if key in ONLY_OF_STEPS else TrainConfig()
    after = with_key(before, key, changed(DEFAULTS[key]))
    same = identity.run_hash(before) == identity.run_hash(after)
    assert same == identity.has_no_effect(key)
    assert [line.split(":")[0] for line in identity.differences(before, after)] == ([] if same else [key])


@pytest.mark.parametrize("key", [key for key in DEFAULTS if key.startswith(("regularizer.", "schedule."))])
def test_keys_without_a_meaning_do_not_count(key):
    for name, prefixes in MEANINGLESS.items():
        group = "regularizer.name" if name == "none" else "schedule.name"
        base = with_key(TrainConfig(), group, name)
        other = with_key(base, key, changed(DEFAULTS[key]))
        if key.startswith(prefixes) and key != group:
            assert identity.run_hash(base) == identity.run_hash(other)


GROUP_FILES = sorted(file for file in compose.CONFIGS.glob("*/*.yaml") if file.parent.name not in ("table", "local"))


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    return {key: value for key, value in identity.flatten(tree, prefix).items() if not key.startswith("defaults")}


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_value_of_a_yaml_file_reaches_the_config_of_its_command(file):
    """So a changed value is a changed config, which is another run by the test above."""
    content = yaml.load(file.read_text(), Loader=yaml.SafeLoader) or {}
    group = file.parent.name
    whole = group in ("experiment", "debug")
    if not (values := leaves({k: v for k, v in content.items() if k != "defaults"}, "" if whole else f"{group}.")):
        return
    cfg = identity.flatten(dataclasses.asdict(compose.compose([f"{group}={file.stem}"])))
    for key, value in values.items():
        composed = cfg[key]
        assert composed == value or float(composed) == float(value), key


def test_a_run_with_other_defaults_in_its_config_is_refused_with_key_and_values(tmp_path, monkeypatch):
    """The directory of the new command, left by a run with another value (as after an edit of its config.yaml)."""
    from dropkey import session
    from dropkey.errors import ConfigError
    from dropkey.records import RunDirectory

    cfg = check(dataclasses.replace(compose.compose(["logger=none"]), output=str(tmp_path)))
    run = RunDirectory(identity.run_directory(cfg))
    run.path.mkdir(parents=True)
    compose.save(with_key(cfg, "optim.lr", 0.5), run.config)
    with pytest.raises(ConfigError, match=rf"optim.lr: 0.5 -> {cfg.optim.lr}"):
        session.prepare_directory(cfg, run)


# ------------------------------------------------------------------------------------------------------------- code


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that may be edited."""
    copied = tmp_path / "dropkey"
    shutil.copytree(code_version.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_version, "PACKAGE", copied)
    code_version.part_digest.cache_clear()
    yield copied
    code_version.part_digest.cache_clear()


def code(name: str = "dropkey", **others) -> dict[str, str]:
    cfg = with_key(TrainConfig(), "regularizer.name", name)
    for key, value in others.items():
        cfg = with_key(cfg, key.replace("__", "."), value)
    code_version.part_digest.cache_clear()
    return code_version.code_of(cfg)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_new_regularizer_leaves_the_code_of_the_others_as_it_was(package):
    names = ("none", "dropout", "dropkey", "dropkey_block", "dropattention")
    before = [code(name) for name in names]
    edit(package / "regularizers.py", "REGULARIZERS = {", 'REGULARIZERS = {\n    "mine": REGULARIZER_OF_MINE,')
    with open(package / "regularizers.py", "a") as file:
        file.write("\n\ndef mask_of_mine(seed, threshold, shape, **_):\n    return seed\n")
    assert [code(name) for name in names] == before


def test_another_function_of_a_regularizer_changes_its_code_and_that_of_no_other(package):
    before = {name: code(name) for name in ("none", "dropout", "dropkey")}
    edit(package / "regularizers.py", "div_(1.0 - ratio)", "div_(2.0 - ratio)")
    assert code_version.changed_parts(before["dropout"]) == ["regularizer/dropout"]
    assert code_version.changed_parts(before["dropkey"]) == code_version.changed_parts(before["none"]) == []


def test_what_all_masks_are_drawn_from_changes_every_regularizer(package):
    before = {name: code(name) for name in ("none", "dropout", "dropkey")}
    edit(package / "bernoulli.py", "0x9E3779B1 ", "0x9E3779B3 ")
    assert code("dropout") != before["dropout"] and code("dropkey") != before["dropkey"]
    assert code("none") == before["none"]


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("engine/trainer.py", "engine"),
        ("session.py", "engine"),
        ("data/augment.py", "data"),
        ("datasets/digits.py", "dataset/digits"),
        ("tasks/classification.py", "task/classification"),
        ("patching/layer.py", "patching"),
        ("operator/cpu.py", "operator"),
    ],
)
def test_changed_code_changes_its_part_alone(package, file, part):
    before = code()
    (package / file).write_text((package / file).read_text() + "\nADDED = 1\n")
    code_version.part_digest.cache_clear()
    assert code_version.changed_parts(before) == [part]


@pytest.mark.parametrize(
    "file", ["models/t2t_vit.py", "datasets/cifar10.py", "analysis/maps.py", "operator/kernels.py"]
)
def test_code_that_a_run_does_not_use_leaves_it_valid(package, file):
    before = code()
    (package / file).write_text((package / file).read_text() + "\nADDED = 1\n")
    code_version.part_digest.cache_clear()
    assert code_version.changed_parts(before) == []


def test_a_model_written_here_is_a_part_of_its_runs(package):
    before = code(model__name="t2t_vit_14")
    (package / "models/t2t_vit.py").write_text((package / "models/t2t_vit.py").read_text() + "\nADDED = 1\n")
    code_version.part_digest.cache_clear()
    assert code_version.changed_parts(before) == ["model/t2t_vit"]


def test_comments_docstrings_and_formatting_change_nothing(package):
    before = code()
    for file in package.rglob("*.py"):
        text = file.read_text()
        docstring = ast.get_docstring(ast.parse(text), clean=False)
        text = text.replace(docstring, "Another docstring.", 1) if docstring else text
        file.write_text("# a comment\n" + text + "\n\n# the end\n")
    code_version.part_digest.cache_clear()
    assert code_version.changed_parts(before) == []
