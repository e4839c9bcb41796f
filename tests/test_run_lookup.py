"""Which run is meant by run=..."""

from dataclasses import replace
from pathlib import Path

import pytest

from dropkey.config import identity, run_lookup
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.errors import ConfigError

NAMES = (
    "vit_4x64-none-digits-s0-3f2a00aa11",
    "vit_4x64-dropkey-0.1-digits-s0-3f2b00aa11",
    "b-none-digits-s1-aa77bb88cc",
)


@pytest.fixture
def root(tmp_path) -> Path:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "vit_no_run").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (NAMES[0], {0}),
        ("3f2a00aa11", {0}),
        ("3f2b", {1}),
        ("vit_4x64-none", {0}),
        ("vit", {0, 1}),
        ("*-digits-s0-*", {0, 1}),
        ("b-none*,3f2a", {0, 2}),
        ("3f2a,3f2a00aa11", {0}),
    ],
)
def test_a_run_is_found_by_name_hash_prefix_and_pattern(word, meant, root):
    assert {path.name for path in run_lookup.find_runs(word, root)} == {NAMES[number] for number in meant}


def test_a_directory_before_the_word_is_where_it_is_looked_for(root):
    assert run_lookup.find_run(f"{root}/3f2b") == run_lookup.find_run(f"{root}/{NAMES[1]}") == root / NAMES[1]
    assert run_lookup.find_runs(f"{root}/vit*") == sorted(root / name for name in NAMES[:2])


def test_several_runs_where_one_is_wanted_are_listed(root):
    with pytest.raises(ConfigError, match=f"run=vit means 2 runs: .*{NAMES[0]}.*; write more of the name"):
        run_lookup.find_run("vit", root)


def test_a_word_that_means_no_run_says_which_is_nearest(root, tmp_path):
    with pytest.raises(ConfigError, match=f"run=vit_4x64-non-digits means no run; did you mean {NAMES[0]}?"):
        run_lookup.find_run("vit_4x64-non-digits", root)
    with pytest.raises(ConfigError, match="there are no runs in"):
        run_lookup.find_run("vit", tmp_path / "vit_no_run")


def test_the_first_letters_of_a_hash_are_not_looked_for_before_there_are_four(root):
    with pytest.raises(ConfigError):
        run_lookup.find_run("aa7", root)


def test_a_run_directory_carries_the_ratio_and_a_run_without_regularizer_none(tmp_path):
    names = [identity.run_directory(check(compose([f"regularizer={name}"]))).name for name in ("dropkey", "none")]
    assert names[0].startswith("vit_4x64-dropkey-0.1-digits-s0-") and names[1].startswith("vit_4x64-none-digits-s0-")


def test_a_directory_with_another_name_and_the_hash_of_the_run_is_its_directory(tmp_path):
    cfg = replace(check(compose()), output=str(tmp_path))
    renamed = tmp_path / f"my-best-run-{identity.run_hash(cfg)}"
    renamed.mkdir()
    assert identity.run_directory(cfg) == renamed


def test_fine_tuning_starts_from_a_run_by_its_hash_and_is_the_same_run_wherever_that_is(tmp_path):
    found = []
    for output in (tmp_path / "a", tmp_path / "b"):
        start = identity.run_directory(replace(check(compose()), output=str(output)))
        start.mkdir(parents=True)
        (start / "config.yaml").touch()
        cfg = check(compose([f"output={output}", f"init_from={start.name[-10:]}", "seed=7"]))
        assert cfg.init_from == str(start)
        found.append(identity.run_hash(cfg))
    assert found[0] == found[1]
