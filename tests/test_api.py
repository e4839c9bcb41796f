"""Training from Python."""

import dataclasses
import sys

import pytest

import dropkey
import runs
from dropkey.errors import ConfigError, Interrupted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return dropkey.train([*runs.SMALL, f"output={tmp_path_factory.mktemp('runs')}"])


def test_train_returns_the_run_with_its_config_and_figures(run):
    assert run.config.model.depth == 2 and run.path.name.startswith("vit_2x32-dropkey-0.1-digits-s0-")
    assert run.summary["epochs"] == 3 and 0 <= run.summary["top1"] <= 100
    assert "top-1" in repr(run)


def test_history_has_a_row_for_each_epoch(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # not installed
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert {"train_loss", "eval_top1"} <= run.history[0].keys()


def test_history_is_a_table_where_pandas_is_there(run):
    pandas = pytest.importorskip("pandas")
    assert isinstance(run.history, pandas.DataFrame)
    assert list(run.history.index) == [1, 2, 3] and run.history["train_loss"].notna().all()


def test_the_same_call_again_finds_the_finished_run(run, capsys):
    again = dropkey.train(dataclasses.replace(run.config))
    assert again.path == run.path and "done already" in capsys.readouterr().out


def test_compose_gives_a_config_that_may_be_changed_and_trained(tmp_path):
    cfg = dropkey.compose([*runs.SMALL, *runs.ONE_EPOCH, "regularizer=none"])
    cfg.output, cfg.seed = str(tmp_path), 5
    assert dropkey.train(cfg).path.name.startswith("vit_2x32-none-digits-s5-")


def test_a_mistake_is_one_line():
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        dropkey.train(["optim.lrr=1"])


def test_an_interrupted_call_goes_on_when_called_again(tmp_path, monkeypatch):
    words = [*runs.SMALL, f"output={tmp_path}"]
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send(2))
        with pytest.raises(Interrupted, match="all saved in"):
            dropkey.train(words)
    assert dropkey.train(words).summary["epochs"] == 3
