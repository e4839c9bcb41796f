"""Files that are read back and are not what they should be: one line, one failed run, and everything else goes on."""

import base64
import json
import shutil
from pathlib import Path

import pytest

import runs
import stand_in as standing_in
from dropkey.commands import reproduce
from dropkey.config import check, compose, identity
from dropkey.errors import ConfigError, Interrupted
from dropkey.records import RunDirectory
from dropkey.reproduction import record_file, runner, slots, tables
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, distinct, jobs_of, state

TABLE = """
title: A small table
baseline: none
rows:
  none: regularizer=none
  dropkey: regularizer=dropkey regularizer.ratio=0.3
  several passes: { of: dropkey, evaluate: eval.monte_carlo=4 }
claims: [dropkey > none]
scales: { smoke: { seeds: 3 } }
"""
DAMAGES = {
    "empty": b"",
    "torn": b'{"state": "do',
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "no keys": b"{}",
    "other keys": b'{"a": 1}',
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "huge number": b'{"state": ' + b"1" * 5000 + b"}",
    "wrong types": b'{"state": 5, "metrics": 3, "reason": [], "samples": "x", "layers": 5, "settings": 1}',
    "metrics of another shape": b'{"metrics": [{"key": 1}], "samples": 1, "state": "a", "layers": [1], "mean": ""}',
    "directory": None,
}


def damage(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    path.mkdir() if DAMAGES[how] is None else path.write_bytes(DAMAGES[how])


BUILT: list[Path] = []


@pytest.fixture
def finished(tmp_path, stand_in, tmp_path_factory):
    """The directory of a finished table of three rows and three seeds: a copy, as launching it takes seconds."""
    if not BUILT:
        place = tmp_path_factory.mktemp("finished")
        (place / "mini.yaml").write_text(TABLE)
        launch(place)
        BUILT.append(place)
    shutil.copytree(BUILT[0], tmp_path, dirs_exist_ok=True)
    standing_in.announce(distinct(all_jobs(tmp_path)), tmp_path / "runs")
    return tmp_path


def launch(place: Path, **options) -> dict[str, runner.JobState]:
    todo = distinct(all_jobs(place))
    standing_in.announce(todo, place / "runs")
    return {one.job.name: one for one in runner.Launcher(todo, slots.slots(2, "none", 1, 1), **options).run()}


def all_jobs(place: Path) -> dict:
    return jobs_of(tables.load(str(place / "mini.yaml"), "smoke"), str(place / "runs"))


def call(place: Path, action: str, *words: str) -> int:
    """In this process; a traceback would fail the test."""
    common = (f"table={place}/mini.yaml", "scale=smoke", f"output={place}/runs", f"results={place}/results")
    return reproduce.main([action, *common, "entropy=false", "gpus=none", *words])


# ------------------------------------------------------------------------------------------------- files of one run


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["summary.json", "status.json"])
def test_a_damaged_file_is_one_failed_run_and_the_rest_is_planned_and_reported(name, how, finished, capsys):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    damage(job.run / name, how)
    assert state(job)[0] == FAILED and str(job.run / name) in state(job)[1] and "\n" not in state(job)[1]
    assert call(finished, "plan") == 0 and call(finished, "report", "mixed=true") == 0
    text = (finished / "results" / "mini-smoke" / "report.md").read_text()
    assert "none, seed 1: failed: " in text and "| none | 51.00 ± 1.41 (2/3) |" in text
    capsys.readouterr()


def test_retry_mends_what_was_damaged(finished):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    for name in ("summary.json", "status.json"):
        damage(job.run / name, "torn")
        assert launch(finished)[job.name].state == FAILED
        assert launch(finished, retry=True)[job.name].state == DONE
        assert state(job)[0] == DONE


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_evaluation_is_that_evaluation_alone(how, finished, capsys):
    job = all_jobs(finished)["several passes", "ViT 2 x 32", 1]
    damage(job.run / job.result, how)
    assert state(job)[0] in (FAILED, "missing") and state(job.needs)[0] == DONE
    assert call(finished, "report", "mixed=true") == 0
    capsys.readouterr()


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_lines_of_metrics_are_left_out_and_never_become_a_number(how, finished, capsys):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    damage(job.run / "metrics.jsonl", how)
    assert call(finished, "report", "mixed=true") == 0
    lines = (finished / "results" / "mini-smoke" / record_file.FILE).read_text().splitlines()
    entry = next(e for e in map(json.loads, lines[1:]) if (e["row"], e["seed"]) == ("none", 1))
    assert entry["train_loss"] is None and entry["top1"] == 51.0
    capsys.readouterr()


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_entropy_is_as_if_it_had_not_been_measured(how, finished):
    run = RunDirectory(all_jobs(finished)["none", "ViT 2 x 32", 1].run)
    damage(run.path / "entropy.json", how)
    if how not in ("no keys", "other keys"):
        assert run.entropy() == {}


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_result_that_is_no_number_has_diverged(value, finished, capsys):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    summary = job.run / "summary.json"
    summary.write_text(summary.read_text().replace('"top1": 51.0', f'"top1": {value}'))
    assert state(job)[0] == DIVERGED
    assert call(finished, "report", "mixed=true") == 0
    text = (finished / "results" / "mini-smoke" / "report.md").read_text()
    assert "none, seed 1: diverged: top-1 is " in text and "± nan" not in text and "| nan" not in text
    capsys.readouterr()


def test_bits_of_another_number_of_samples_are_not_taken(finished, capsys):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    (job.run / "summary.bits").write_bytes(b"\x01")  # of 10 samples: 2 bytes
    assert call(finished, "report", "mixed=true") == 0
    assert (
        base64.b64encode(b"\x01").decode() not in (finished / "results" / "mini-smoke" / record_file.FILE).read_text()
    )
    capsys.readouterr()


def test_a_status_whose_process_id_was_recycled_does_not_keep_the_launcher_waiting(finished):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    (job.run / "summary.json").unlink()
    RunDirectory(job.run).set_status("running")  # with the id of this process, which lives and has no lock
    assert launch(finished)[job.name].state == DONE


def test_a_run_directory_that_is_a_file_fails_alone(finished):
    job = all_jobs(finished)["none", "ViT 2 x 32", 1]
    shutil.rmtree(job.run)
    job.run.write_text("")
    states = launch(finished, retry=True)
    assert states.pop(job.name).state == FAILED and {one.state for one in states.values()} == {DONE}


@pytest.mark.parametrize("how", DAMAGES)
def test_overwrite_starts_over_whatever_is_damaged(how, tmp_path):
    from dropkey.commands import train

    words = [*runs.SMALL, *runs.ONE_EPOCH, f"output={tmp_path}", "overwrite=true"]
    cfg = compose.compose(words)
    run = RunDirectory(identity.run_directory(check.check(cfg)))
    run.path.mkdir()
    for name in ("summary.json", "status.json", "metrics.jsonl"):
        damage(run.path / name, how)
    assert train.train(cfg) >= 0 and run.state() == ("done", "")


@pytest.mark.fault(6)
def test_a_torn_last_line_loses_no_epoch_on_resume(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 6, runs.send())  # the end of the second epoch
        with pytest.raises(Interrupted):
            runs.train(tmp_path / "parts")
    (run,) = (tmp_path / "parts").iterdir()
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    assert runs.records(runs.train(tmp_path / "parts")) == runs.records(whole)


# --------------------------------------------------------------------------------------------------- records, tables


def test_a_damaged_record_is_named_and_left_out_and_the_old_file_is_kept(finished, capsys):
    call(finished, "report", "mixed=true")
    file = finished / "results" / "mini-smoke" / record_file.FILE
    text = file.read_text().replace('"top1": 51.0', '"top1": "high"', 1)
    file.write_text(text)
    capsys.readouterr()
    assert call(finished, "report", f"records={file}", "mixed=true") == 0
    assert 'top1 is "high", not a whole number' in (file.parent / "report.md").read_text().replace("\\", "")
    capsys.readouterr()
    assert call(finished, "report", "mixed=true") == 0
    assert "left out: " in (said := capsys.readouterr().out) and "the old file is kept" in said
    assert (file.parent / "records.kept-1.jsonl").read_text() == text and '"high"' not in file.read_text()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_of_records_of_another_shape_stops_nothing(how, finished, capsys):
    file = finished / "results" / "mini-smoke" / record_file.FILE
    file.parent.mkdir(parents=True)
    damage(file, how)
    with pytest.raises(ConfigError, match=r"records\.jsonl (has no records of a table|cannot be read)"):
        call(finished, "report", f"records={file}")
    assert call(finished, "plan") == 0 and call(finished, "report", "mixed=true") == 0
    capsys.readouterr()


MISTAKES = {
    "rows: [1]": "rows=[1] must be a mapping",
    "title: [a]": "title=['a'] must be text",
    "title: 5": "title=5 must be text",
    'title: "\\a"': "title has characters that cannot be printed",
    "rows:\n  a: regularizer=none\n  a: regularizer=dropkey": "'a' is there twice",
    "rows:\n  a: regularizer=none 'b": "row 'a'",
    "rows:\n  a: !!python/object/apply:os.system [ls]": "cannot be read as YAML",
    "claims: [5]": "claim 5 must be text",
    "claims: [{claim: null, better: none, worse: dropkey}]": "a claim needs claim, better and worse",
    "claims: [{claim: [x], better: none, worse: dropkey}]": "claim=['x'] must be text",
    "paper: {x: {none: high}}": "none=high must be a number",
    "paper: {x: 5}": "paper=5 must be a mapping",
    "margin: .inf": "margin=inf must be above 0",
    "margin: .nan": "margin=nan must be above 0",
    "scales: {smoke: {seeds: 99999999999999}}": "at most 10,000",
    "scales: {smoke: {seeds: [x]}}": "seeds=['x']",
    "scales: {smoke: {columns: [a]}}": "columns=['a'] must be a mapping",
    "scales: {smoke: {about: 5}}": "about=5 must be text",
    "scales: [smoke]": "scales=['smoke'] must be a mapping",
    "tuning: {seeds: 0}": "tuning: seeds=0",
    "rows:\n  none: regularizer=none\n  x: { of: none, evaluate: eval.monte_carlo=two }": "row 'x'",
    "rows:\n  none: {best_of: 'optim.lr=1,2'}\n  x: { of: none, evaluate: eval.monte_carlo=two }": "row 'x'",
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=str)
def test_what_would_fail_in_the_report_is_refused_by_the_plan(line, message, tmp_path, capsys):
    keys = {"title": "t", "baseline": "none", "rows": "{none: regularizer=none, dropkey: regularizer=dropkey}"}
    name = line.partition(":")[0]
    others = "".join(f"{key}: {value}\n" for key, value in keys.items() if key != name)
    (tmp_path / "mini.yaml").write_text(f"{others}{line}\n")
    with pytest.raises(ConfigError) as error:
        call(tmp_path, "plan", "seeds=1")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1", b"5", b"{a: &b [*b]}"], ids=str)
def test_a_table_that_is_no_table_is_one_line(content, tmp_path):
    (tmp_path / "mini.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mini\.yaml"):
        call(tmp_path, "plan")


@pytest.mark.parametrize("word", ["seeds=²", "seeds=" + "9" * 5000, "seeds=99999999999", "jobs=" + "9" * 20])
def test_numbers_beyond_sense_are_refused(word, finished):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        call(finished, "plan", word)


ODD = "[ours](x) [/red] <b>&lt;_i_ $x^ {y}"


def test_a_label_is_printed_whole_in_every_output(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = TABLE.replace("  none:", f'  "{ODD}":').replace("baseline: none", f'baseline: "{ODD}"')
    (finished / "mini.yaml").write_text(text.replace("dropkey > none", f'"dropkey > {ODD}"'))
    assert call(finished, "plan") == 0
    assert ODD in capsys.readouterr().out
    assert call(finished, "report", "mixed=true") == 0
    place = finished / "results" / "mini-smoke"
    page = (place / "report.html").read_text()
    shown = ODD.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in page and "<b>" not in page and 'href="x"' not in page
    assert ODD in (place / "report.csv").read_text()
    assert r"{}[ours](x) [/red] $<$b$>$\&lt;\_i\_ \$x\textasciicircum{} \{y\} & " in (place / "report.tex").read_text()
    assert shown in (place / "claims.svg").read_text()
    capsys.readouterr()
