"""A run is of its data, its config and the weights it started from: others under the same name are refused."""

import dataclasses
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

import data_samples
import dropkey
import runs
from dropkey import evaluation, session
from dropkey.commands import train as command
from dropkey.config import compose, identity
from dropkey.config.check import check, check_evaluation
from dropkey.errors import ConfigError, DataError
from dropkey.records import RunDirectory

WORDS = (
    *("data=folder", "data.image_size=8", "model.patch_size=2", "data.max_train_samples=null", "data.val_fraction=0.2"),
    *("data.num_workers=0", "trainer.batch_size=8", "data.crop_pct=1"),
)


def recolour(root):
    Image.fromarray(np.zeros((12, 12, 3), dtype=np.uint8)).save(root / "train" / "a" / "003.png")


CHANGES = {
    "added": lambda root: data_samples.write_images(root / "train" / "b" / "more", 3),
    "removed": lambda root: (root / "train" / "c" / "001.png").unlink(),
    "replaced": recolour,
    "moved to another class": lambda root: (root / "train" / "a" / "000.png").rename(root / "train" / "b" / "z.png"),
    "added to the test split": lambda root: data_samples.write_images(root / "test" / "a" / "more", 1),
    "class renamed": lambda root: [(root / split / "b").rename(root / split / "bb") for split in ("train", "test")],
    "classes swapped": lambda root: [
        (root / split / one).rename(root / split / other)
        for split in ("train", "test")
        for one, other in (("a", "x"), ("b", "a"), ("x", "b"))
    ],
    "class added": lambda root: [data_samples.write_images(root / split / "d", 8) for split in ("train", "test")],
}


@pytest.fixture
def folder(tmp_path):
    return data_samples.image_folder(tmp_path / "images", counts=(20, 20, 20))


def trained(tmp_path, folder, memory: str = "true", *more: str):
    """(config, run) of a finished run on the folder."""
    words = (*WORDS, f"data.root={folder}", f"data.in_memory={memory}", *more)
    return runs.config(tmp_path / "runs", *words), runs.train(tmp_path / "runs", *words)


def evaluate(run: RunDirectory, *words: str):
    cfg = check_evaluation(compose.compose([f"run={run.path}", *words], "eval"))
    return evaluation.evaluate_run(cfg, compose.load(run.config), run.path)


@pytest.mark.fault(7)
@pytest.mark.parametrize("memory", ["true", "false"])
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_are_refused_on_resume_and_in_evaluation(change, memory, folder, tmp_path, monkeypatch):
    words = (*WORDS, f"data.root={folder}", f"data.in_memory={memory}")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path, *words)
    CHANGES[change](folder)
    with pytest.raises(DataError, match=r"the data are not those that .* was trained on: .*overwrite=true"):
        runs.train(tmp_path, *words)
    run = RunDirectory(identity.run_directory(runs.config(tmp_path, *words)))
    with pytest.raises(DataError, match=r"the data are not those.*data=<set>"):
        evaluate(run)


def test_the_refusal_says_what_changed(folder, tmp_path):
    _, run = trained(tmp_path, folder)
    CHANGES["class renamed"](folder)
    CHANGES["removed"](folder)
    with pytest.raises(DataError, match=r"48 train samples then, 47 now; classes b have become bb"):
        evaluate(run)


def test_data_that_only_moved_are_accepted(folder, tmp_path):
    _, run = trained(tmp_path, folder)
    before = run.summary()["top1"]
    moved = folder.rename(tmp_path / "elsewhere")
    result, _ = evaluate(run, f"root={moved}")
    assert result["top1"] == before


def test_an_interrupted_run_whose_data_came_back_goes_on(folder, tmp_path, monkeypatch):
    words = (*WORDS, f"data.root={folder}")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path, *words)
    aside = (folder / "train" / "c" / "001.png").rename(tmp_path / "aside.png")
    with pytest.raises(DataError):
        runs.train(tmp_path, *words)
    aside.rename(folder / "train" / "c" / "001.png")
    assert runs.train(tmp_path, *words).finished


def test_other_data_of_the_same_name_have_a_result_of_their_own(folder, tmp_path):
    _, run = trained(tmp_path, folder)
    other = data_samples.image_folder(tmp_path / "other" / "images", counts=(5, 5, 5))
    files = [evaluate(run, "data=folder", f"data.root={root}")[1] for root in (folder, other, folder)]
    assert files[0] == files[2] != files[1]


def test_a_finished_run_says_that_another_data_directory_was_not_looked_at(folder, tmp_path, capsys):
    cfg, _ = trained(tmp_path, folder)
    command.train(cfg)
    assert "not looked at" not in capsys.readouterr().out
    words = ("data.root=data",)
    digits = runs.config(tmp_path / "digits", *words)
    session.train(digits, RunDirectory(identity.run_directory(digits)))
    command.train(dataclasses.replace(digits, data=dataclasses.replace(digits.data, root="/elsewhere")))
    assert "data.root=/elsewhere was not looked at" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- config and weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("finished"), "regularizer=none")


@pytest.mark.parametrize(("key", "value"), [("depth", 1), ("embed_dim", 64), ("num_heads", 4)])
def test_a_config_that_was_edited_is_refused(key, value, finished, tmp_path):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / finished.path.name))
    content = yaml.safe_load(run.config.read_text())
    content["model"][key] = value
    run.config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="edited after the training began"):
        evaluate(run)
    with pytest.raises(ConfigError, match="edited after the training began"):
        dropkey.load(run.path)


def test_weights_of_a_deeper_model_are_refused(finished, tmp_path):
    words = (f"init_from={finished.path}", "model.depth=1")
    with pytest.raises(ConfigError, match=r"it has 12 weights that the model lacks, first blocks\.1"):
        runs.train(tmp_path, *words)


# ---------------------------------------------------------------------------------------------------------- the start


def interrupted(tmp_path, monkeypatch) -> RunDirectory:
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path / "start")
    return RunDirectory(identity.run_directory(runs.config(tmp_path / "start")))


def test_an_unfinished_start_is_named(tmp_path, monkeypatch):
    start = interrupted(tmp_path, monkeypatch)
    tuned = runs.train(tmp_path, f"init_from={start.path}", "seed=5")
    assert "of a run that is interrupted after 1 epochs" in (tuned.path / "log.txt").read_text()


def test_a_start_that_went_on_since_is_another_start(tmp_path, monkeypatch):
    start = interrupted(tmp_path, monkeypatch)
    words = (f"init_from={start.path}", "seed=5")
    cfg = runs.config(tmp_path, *words)
    runs.train(tmp_path, *words)
    assert command.train(cfg) is not None  # done already: the same start
    runs.train(tmp_path / "start")
    with pytest.raises(ConfigError, match=r"\(interrupted after 1 epochs\), which has other weights now"):
        command.train(cfg)
    command.train(dataclasses.replace(check(cfg), overwrite=True))
    assert command.train(cfg) is not None


def test_a_file_whose_content_changed_is_another_start(finished, tmp_path, monkeypatch):
    file = shutil.copy(finished.checkpoints / "last.pt", tmp_path / "start.pt")
    words = (f"init_from={file}", "seed=5")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path, *words)
    shutil.copy(runs.train(tmp_path / "other", "seed=9").checkpoints / "last.pt", file)
    with pytest.raises(ConfigError, match="has other weights now"):
        runs.train(tmp_path, *words)


def test_a_run_made_before_this_was_kept_is_compared_by_the_fingerprint_in_its_summary(finished, tmp_path):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / finished.path.name))
    (run.path / "model.json").unlink()
    evaluate(run)
    summary = run.summary() | {"data": "0123456789"}
    run.write_result("summary.json", summary)
    with pytest.raises(DataError, match="files or labels are others"):
        evaluate(run)
