"""dropkey runs: which run is which."""

import copy
import csv
import dataclasses
import datetime
import json
import os
import sys

import pytest

import runs
from dropkey import multirun, session
from dropkey.commands import runs as listing
from dropkey.config import compose, identity, run_lookup
from dropkey.config.check import check
from dropkey.errors import ConfigError, DataError
from dropkey.records import RunDirectory, write_json

METRIC = {"key": "top1", "label": "top-1", "unit": "%"}


@pytest.fixture(scope="module")
def configs():
    """Six configs: three regularizers with two seeds."""
    composed = {
        name: compose.compose([f"regularizer={name}", "logger=none"]) for name in ("none", "dropout", "dropkey")
    }
    return {(name, seed): dataclasses.replace(cfg, seed=seed) for name, cfg in composed.items() for seed in (0, 1)}


@pytest.fixture
def root(tmp_path, configs):
    """Six runs: those of dropout and none are done, one of DropKey has failed, the other was interrupted."""
    for number, ((name, seed), cfg) in enumerate(configs.items()):
        cfg.output = str(tmp_path)
        run = RunDirectory(identity.run_directory(check(cfg)))
        run.path.mkdir()
        compose.save(cfg, run.config)
        os.utime(run.config, (1000 + number, 1000 + number))
        if name == "dropkey":
            run.append({"kind": "epoch", "step": 10, "epoch": 1, "train_loss": 1.0, "eval_top1": 40.0})
            run.append({"kind": "epoch", "step": 20, "epoch": 2, "train_loss": 1.0})
            run.set_status("failed", reason="no disk") if seed == 0 else run.set_status("running")
            continue
        summary = {
            "metrics": [METRIC],
            "top1": 50.0 + number,
            "objective": 60.0 + number,
            "best_split": "val",
            "epochs": 40,
            "samples": 100,
            "seconds": 1.0,
        }
        write_json(run.path / "summary.json", summary)
        run.set_status("done")
    return tmp_path


def show(capsys, monkeypatch, root, *words, width=80) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    listing.main([*words, f"output={root}"])
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def hashes(lines: list[str], configs) -> set[tuple[str, int]]:
    """The configs whose runs have a row."""
    return {place for place, cfg in configs.items() if any(identity.run_hash(cfg)[:8] in line[:9] for line in lines)}


def test_every_run_has_a_row_and_what_all_share_is_said_once(root, configs, capsys, monkeypatch):
    lines = show(capsys, monkeypatch, root)
    assert lines[0] == "vit_4x64 · digits"
    assert hashes(lines, configs) == set(configs)
    assert all(len(line) <= 80 for line in lines if "no disk" not in line)


def test_a_row_says_state_config_and_figures(root, configs, capsys, monkeypatch):
    (done,) = [line for line in show(capsys, monkeypatch, root) if identity.run_hash(configs["dropout", 1])[:8] in line]
    words = done.split()
    assert words[1:8] == ["done", "dropout", "0.1", "decreasing", "1", "63.00", "53.00"]


def test_an_unfinished_run_shows_its_epoch_and_its_last_score(root, configs, capsys, monkeypatch):
    lines = show(capsys, monkeypatch, root, width=120)
    (stopped,) = [line for line in lines if identity.run_hash(configs["dropkey", 1])[:8] in line]
    assert "interrupted 2/40" in stopped and "40.00" in stopped


def test_failures_come_last_with_their_reason(root, capsys, monkeypatch):
    lines = show(capsys, monkeypatch, root)
    assert lines[-1].startswith("failed: ") and lines[-1].endswith("no disk")
    assert " failed 2/40" in lines[-2]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("regularizer=dropkey",), {("dropkey", 0), ("dropkey", 1)}),
        (("regularizer=drop*", "seed=0"), {("dropkey", 0), ("dropout", 0)}),
        (("state=done", "seed=1"), {("none", 1), ("dropout", 1)}),
        (("state=failed,interrupted",), {("dropkey", 0), ("dropkey", 1)}),
        (("regularizer.name=none,dropout", "trainer.epochs=40.0", "seed=0"), {("none", 0), ("dropout", 0)}),
        (("ratio=.1", "epochs=40", "model=vit_4x64", "seed=0"), {("dropout", 0), ("dropkey", 0)}),
        (("run=vit_4x64-none*",), {("none", 0), ("none", 1)}),
    ],
)
def test_keys_filter(words, wanted, root, configs, capsys, monkeypatch):
    assert hashes(show(capsys, monkeypatch, root, *words), configs) == wanted


def test_an_unknown_key_is_refused_with_the_nearest(root):
    with pytest.raises(ConfigError, match="ratoi is no key of a run; did you mean ratio"):
        listing.main(["ratoi=1", f"output={root}"])
    with pytest.raises(ConfigError, match=r"several keys end so: .*model\.name"):
        listing.main(["name=x", f"output={root}"])


def test_no_runs_is_said(tmp_path, capsys):
    listing.main([f"output={tmp_path}"])
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_what_runs_cannot_be_sorted_by_is_told_with_what_they_can(root):
    with pytest.raises(ConfigError, match="cannot sort by accuracy; sort= takes test, val, age, state"):
        listing.selected(listing.Args(output=str(root), sort="-accuracy"), [])


def test_sorting_puts_the_best_first_and_runs_without_a_figure_last(root):
    entries = listing.selected(listing.Args(output=str(root), sort="-test"), [])
    assert [entry.test for entry in entries] == [53.0, 52.0, 51.0, 50.0, None, None]
    assert [entry.keys["seed"] for entry in listing.ordered(entries, "seed")] == [0, 0, 0, 1, 1, 1]


def test_groups_are_means_over_seeds(root, capsys, monkeypatch):
    lines = show(capsys, monkeypatch, root, "group", width=120)
    none, dropout, dropkey, *folded = lines[2:]
    assert none.split() == ["none", "2", "60.50", "±", "0.71", "50.50", "±", "0.71"]
    assert dropout.split() == ["dropout", "0.1", "decreasing", "2", "62.50", "±", "0.71", "52.50", "±", "0.71"]
    assert dropkey.split() == ["dropkey", "0.1", "decreasing", "0", "1", "failed,", "1", "interrupted"] and not folded


def test_diff_names_what_differs_between_two_runs(root, configs, capsys):
    pair = ",".join(identity.run_hash(configs[name, 0]) for name in ("dropout", "dropkey"))
    listing.main(["diff", f"run={pair}", f"output={root}"])
    assert capsys.readouterr().out.splitlines()[1:] == ["  regularizer.name: dropout -> dropkey"]
    with pytest.raises(ConfigError, match="diff takes run=<one>,<another>; 6 runs are meant"):
        listing.main(["diff", f"output={root}"])


def test_csv_has_every_key(root, tmp_path, capsys):
    file = tmp_path / "runs.csv"
    listing.main([f"output={root}", f"csv={file}"])
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 6 and {row["regularizer.name"] for row in rows} == {"none", "dropout", "dropkey"}
    assert {row["optim.lr"] for row in rows} == {"0.002"}


def test_delete_removes_failed_runs_when_told_twice_and_no_others(root, configs, capsys):
    listing.main(["delete", f"output={root}"])
    assert "nothing is deleted yet" in capsys.readouterr().out and len(list(root.iterdir())) == 6
    listing.main(["delete", f"output={root}", "yes=true"])
    left = {path.name.rpartition("-")[2] for path in root.iterdir()}
    assert left == {identity.run_hash(cfg) for place, cfg in configs.items() if place != ("dropkey", 0)}
    with pytest.raises(ConfigError, match="no others are deleted"):
        listing.main(["delete", f"output={root}", "yes=true"])


def test_a_damaged_run_is_shown_as_such_and_hides_no_other(root, configs, capsys, monkeypatch):
    damaged = identity.run_directory(configs["none", 0])
    (damaged / "summary.json").write_text('{"top1": ')
    lines = show(capsys, monkeypatch, root)
    assert hashes(lines, configs) == set(configs)
    assert any(line.startswith(f"damaged: {damaged}") for line in lines)


def test_a_run_without_seeds_of_others_is_shown_alone(root, capsys, monkeypatch):
    lines = show(capsys, monkeypatch, root, "state=failed")
    assert "dropkey" in lines[1] and "digits" in lines[1]


def test_a_saved_config_is_read_as_it_is_loaded(tmp_path):
    cfg = check(compose.compose(["augment=deit", "optim.args.betas=[0.9,0.95]", "optim.lr_scale.head=2"]))
    compose.save(cfg, tmp_path / "config.yaml")
    assert compose.read(tmp_path / "config.yaml") == compose.load(tmp_path / "config.yaml")


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (300, "5 min"), (7200, "2 h"), (200000, "2 d")])
def test_age_is_in_one_unit(seconds, text, root):
    entry = listing.selected(listing.Args(output=str(root)), [])[0]
    assert entry.age(entry.since + datetime.timedelta(seconds=seconds)) == text


# ---------------------------------------------------------------------------------------------- what training leaves


def test_a_command_that_fails_before_training_leaves_no_directory(tmp_path):
    cfg = runs.config(tmp_path, "data=folder", f"data.root={tmp_path / 'nowhere'}", "data.image_size=8")
    run = RunDirectory(identity.run_directory(cfg))
    with pytest.raises(DataError):
        session.train(cfg, run)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_before_keeps_the_reason_of_the_failure(tmp_path):
    cfg = runs.config(tmp_path / "runs", "data=folder", f"data.root={tmp_path / 'nowhere'}", "data.image_size=8")
    run = RunDirectory(identity.run_directory(cfg))
    run.path.mkdir(parents=True)
    with pytest.raises(DataError):
        session.train(cfg, run)
    assert run.state()[0] == "failed" and "nowhere" in run.state()[1]


def test_another_length_of_a_run_names_the_run_and_what_differs(root, configs):
    cfg = copy.deepcopy(configs["none", 0])
    cfg.trainer.epochs = 50
    name = identity.run_directory(configs["none", 0]).name
    assert run_lookup.sibling(cfg) == f"new run; {name} (done) differs in trainer.epochs: 40 -> 50"
    assert run_lookup.sibling(configs["none", 0]) == ""


def test_a_run_that_is_nothing_like_another_names_none(root):
    cfg = check(compose.compose(["regularizer=none", "data=cifar10"]))
    cfg.output = str(root)
    assert run_lookup.sibling(cfg) == ""


def test_a_multirun_ends_with_the_table_of_its_runs(root, configs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", f"output={root}"])
    with multirun.table_of_jobs():
        for place in (("none", 0), ("dropkey", 0), ("dropout", 1)):
            multirun.note_job(identity.run_directory(configs[place]))
    lines = capsys.readouterr().out.splitlines()
    assert hashes(lines, configs) == {("none", 0), ("dropkey", 0), ("dropout", 1)}
    assert lines[-1].startswith("failed: ") and multirun.JOBS not in os.environ


def test_a_single_run_ends_with_no_table(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"output={root}"])
    with multirun.table_of_jobs():
        pass
    assert capsys.readouterr().out == ""


def test_looking_at_a_run_does_not_keep_it_from_training(tmp_path):
    run = RunDirectory(tmp_path)
    with run.lock():
        assert run.is_locked()
    assert not run.is_locked()
    with run.lock():
        pass
    assert json.dumps(run.status()) == "{}"
