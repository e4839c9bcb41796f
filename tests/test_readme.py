"""Every command and every piece of Python in README.md and docs/ works."""

import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import runs
from dropkey import cli, invocation
from dropkey.commands import eval as evaluating
from dropkey.commands import export, label_maps, predict, reproduce, search, train, visualize
from dropkey.commands import runs as listing
from dropkey.config.check import check
from dropkey.config.compose import CONFIGS, compose
from dropkey.config.identity import run_directory
from dropkey.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
README = (ROOT / "README.md").read_text()
PAGES = {file: file.read_text() for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
BASH = list({tuple(shlex.split(line, comments=True)): line for line in LINES}.values())  # each command once


def of_a_checkout(words: list[str]) -> list[str]:
    """A command of the installed program as the script that is the same. That both are: test_commands.py."""
    if words[0] == "dropkey" and words[1] in invocation.COMMANDS:
        return ["python", invocation.COMMANDS[words[1]].script, *words[2:]]
    return shlex.split(shlex.join(words).replace("-m dropkey.train", "train.py"))


COMMANDS = [
    of_a_checkout(shlex.split(line, comments=True)) for line in BASH if not line.startswith(("RUN=", "PYTHONPATH="))
]
# Other pieces: test_detector_use.py, test_mesh_use.py
PYTHON = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if not re.search("detr|metro", code)]
TRAIN = [words[words.index("train.py") + 1 :] for words in COMMANDS if "train.py" in words]
EVAL = [words[2:] for words in COMMANDS if "eval.py" in words]
SCRIPTS = [words for words in COMMANDS if words[1].startswith("scripts/") and words[0] == "python"]
NO_NETWORK = [
    words for words in TRAIN if not any(w.startswith(("data=", "experiment=", "-", "hydra")) for w in words)
]  # training under joblib: test_sweeps.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run that the README's commands speak of, but briefly trained."""
    return runs.train(tmp_path_factory.mktemp("runs"), "regularizer.ratio=0.1")


@pytest.fixture
def elsewhere(run, tmp_path, monkeypatch):
    """The current directory for one test: in it are a copy of the run, and the pictures that commands name."""
    from PIL import Image

    shutil.copytree(run.path, tmp_path / "runs" / f"vit_4x64-dropkey-0.1-digits-s0-{run.path.name[-10:]}")
    for name in ("photo.png", "digit.png", "pictures/1.png", "more/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)


def named(words: list[str], run) -> list[str]:
    return [word.replace("$RUN", str(run.path)).replace("path/to/images", str(run.path)) for word in words]


def test_the_commands_name_the_run_that_make_train_leaves():
    (pattern,) = set(re.findall(r"^RUN=\$\(ls -d (\S+)\)", TEXT, re.M))
    assert fnmatch.fnmatch(str(run_directory(check(compose()))), pattern)


def test_every_line_is_of_a_kind_that_is_tested_here():
    known = {"python", "torchrun", "make", "sbatch", "wandb", "eval", "pip", "dropkey", "pytest", "source"}
    assert {words[0] for words in COMMANDS} <= known
    assert len(TRAIN) >= 12 and len(EVAL) >= 3 and len(PYTHON) >= 3


def test_what_pip_installs_exists():
    """That it works: test_packaging.py."""
    named = {extra for words in COMMANDS if words[0] == "pip" for extra in re.findall(r"\[(\w+)\]", words[2])}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"train"} <= named <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("words", TRAIN, ids=" ".join)
def test_training_commands_compose_and_pass_the_checks(words, run):
    words = named(words, run)
    overrides = [word for word in words if "=" in word and not word.startswith("hydra")]
    singles = [re.sub(r"=([^\[{,]*),.*", r"=\1", word) for word in overrides]  # the first job of a multirun
    check(compose(singles))


def run_here(monkeypatch, capsys, script, words: list[str]) -> str:
    """The output of train.py or eval.py, run in this process: importing torch takes seconds each time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with cli.command():
        script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("words", NO_NETWORK, ids=" ".join)
def test_training_commands_that_need_no_network_train(words, run, tmp_path, monkeypatch, capsys):
    short = [*named(words, run), "trainer.max_steps=2", f"output={tmp_path}", "logger.mode=offline"]
    sizes = [word for word in runs.SMALL if word.startswith("model.")] if "init_from" in str(words) else []
    assert "top-1" in run_here(monkeypatch, capsys, train, [*short, *sizes])


@pytest.mark.parametrize("words", EVAL, ids=" ".join)
def test_evaluation_commands_evaluate(words, run, monkeypatch, capsys):
    assert "top-1" in run_here(monkeypatch, capsys, evaluating, named(words, run))


def test_a_command_works_from_the_shell(tmp_path):
    command = [sys.executable, "train.py", *runs.SMALL, "trainer.max_steps=2", f"output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout


def load_script(path: str, monkeypatch):
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", script)
    spec.loader.exec_module(script)
    return script


def of(name: str) -> list[list[str]]:
    """Those of a run that finds boxes or meshes: test_detector_use.py, test_mesh_use.py."""
    other = {"run=$DETR", "run=$METRO"}
    return [words[2:] for words in SCRIPTS if words[1] == f"scripts/{name}.py" and not other & {*words}]


def test_every_script_of_the_readme_is_run_here():
    assert {words[1] for words in SCRIPTS} == {
        f"scripts/{name}.py"
        for name in (
            "benchmark",
            "coverage",
            "export",
            "label_maps",
            "predict",
            "reproduce",
            "runs",
            "search",
            "visualize",
        )
    }


@pytest.mark.parametrize("words", of("benchmark"), ids=" ".join)
def test_benchmark_takes_what_it_is_told(words, monkeypatch, tmp_path):
    """What it then does: test_benchmark.py."""
    script = load_script("scripts/benchmark.py", monkeypatch)
    assert words[0] in (*script.MEASURED, "all", "tune", "decoding")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(script, "picture", lambda *args: None)
    row = {"way": "plain", "failed": "not measured here", "shape": [1], "dtype": "none"}
    monkeypatch.setattr(script, "MEASURED", {name: lambda *args: [row] for name in script.MEASURED})
    monkeypatch.setattr(script, "tune", lambda *args: [row])
    monkeypatch.setattr(script.decoding, "run", lambda *args: None)
    script.main([*words, f"output={tmp_path}"])


@pytest.mark.parametrize("words", of("coverage"), ids=" ".join)
def test_coverage_takes_what_it_is_told(words, monkeypatch, capsys):
    """What it then does: test_patching_timm.py."""
    script = load_script("scripts/coverage.py", monkeypatch)
    assert script.main([*words, "models=vit_tiny_patch16_224"]) == 0
    assert "1 / 1" in capsys.readouterr().out


@pytest.mark.parametrize("words", of("search"), ids=" ".join)
def test_search_takes_what_it_is_told(words, monkeypatch, tmp_path):
    """What it then does: test_sweeps.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda cfg: cfg.regularizer.ratio)
    search.search([*(word for word in words if not word.startswith("trials=")), "trials=1"])


@pytest.mark.parametrize("words", of("visualize"), ids=" ".join)
def test_pictures_are_drawn(words, run, monkeypatch, capsys, tmp_path):
    words = [word.replace("runs/*-digits-*", str(run.path)) for word in named(words, run)]
    picture = tmp_path / ("page.html" if words[0] == "gallery" else "picture.png")
    visualize.main([*words, f"output={picture}"])
    assert str(picture) in capsys.readouterr().out
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize("words", of("runs"), ids=" ".join)
def test_runs_are_listed(words, run, monkeypatch, capsys, tmp_path):
    """What it then shows: test_runs.py."""
    monkeypatch.chdir(tmp_path)
    given = [word for word in named(words, run) if "=" not in word or word.startswith("csv")]
    if "delete" in given:  # nothing has failed here
        with pytest.raises(ConfigError, match="no others are deleted"):
            listing.main([*given, f"output={run.path.parent}"])
        return
    listing.main([*given, f"output={run.path.parent}"])
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize("words", of("predict"), ids=" ".join)
def test_images_are_classified(words, run, elsewhere, capsys):
    assert predict.main(named(words, run)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", of("export"), ids=" ".join)
def test_models_are_exported(words, run, elsewhere, capsys):
    if "format=onnx" in words:
        pytest.importorskip("onnxscript", reason="comes with pip install 'dropkey[export]'")
    export.main([*named(words, run), "overwrite=true"])
    assert "check  read again" in capsys.readouterr().out


@pytest.mark.parametrize("words", of("label_maps"), ids=" ".join)
def test_label_maps_take_what_they_are_told(words, run, tmp_path):
    """What they then do: test_label_maps.py."""
    with pytest.raises(DataError, match="no folder"):
        label_maps.main([*named(words, run), f"data.root={tmp_path / 'none'}", f"output={tmp_path}"])


@pytest.mark.parametrize("words", of("reproduce"), ids=" ".join)
def test_tables_are_planned(words, monkeypatch, tmp_path):
    """What the words say can be done; that it then is: test_reproduce.py."""
    from dropkey.reproduction.jobs import jobs_of
    from dropkey.reproduction.slots import slots

    shutil.copy(ROOT / "configs" / "table" / "schedule.yaml", tmp_path / "mine.yaml")
    args, overrides = reproduce.read([word.replace("mine.yaml", str(tmp_path / "mine.yaml")) for word in words])
    table = reproduce.load(args, overrides)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert slots(args.jobs, args.gpus, args.per_gpu, args.gpus_per_run)
    known = [row for row in table.rows.values() if not row.candidates and row.like is None]  # before any tuning
    assert len(jobs_of(table, "runs")) == len(known) * len(table.columns) * len(table.seeds)


SHOWN = {f"{task}-cpu": ROOT / "docs" / f"{task}.md" for task in ("detection", "interaction")}
SHOWN["best-cpu"] = ROOT / "README.md"


@pytest.mark.parametrize("study", [path.name for path in sorted((ROOT / "results").iterdir())])
def test_the_verdicts_of_a_committed_study_are_shown(study):
    report, page = (ROOT / "results" / study / "report.md").read_text(), SHOWN[study].read_text()
    (claims,) = re.findall(r"(?:^\|.*\n)+", report.split("## Claims")[1].split("A claim")[0], re.M)
    assert claims in page
    for name in ("report.md", "claims.svg"):
        assert f"results/{study}/{name})" in page


def test_the_readme_is_read_in_minutes():
    assert len(README.splitlines()) <= 200


def test_the_report_that_the_readme_shows_is_what_apply_prints():
    import timm

    import dropkey

    printed = str(dropkey.apply(timm.create_model("vit_small_patch16_224"), "dropkey", ratio=0.1)).splitlines()
    (shown,) = re.findall(r"```\n(dropkey \(decreasing\).*?)```", README, re.S)
    head, *lines = (line for line in shown.splitlines() if line != "...")
    assert head.split(", impl")[0] == printed[0].split(", impl")[0] and set(lines) <= set(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", (page.parent / file).read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_make_table_reproduces_a_table():
    from dropkey.reproduction import tables

    lines = [words for words in COMMANDS if words[:2] == ["make", "table"]]
    for words in lines:
        name, scale = (word.split("=")[1] for word in words[2:])
        assert tables.load(name, scale)
    made = subprocess.run(["make", "-n", *lines[0][1:]], cwd=ROOT, capture_output=True, text=True).stdout
    assert "scripts/reproduce.py run table=schedule scale=smoke" in made


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[:2] == ["wandb", "sweep"]], ids=" ".join)
def test_sweep_definitions_exist(words):
    """What an agent makes of them: test_sweeps.py."""
    assert (ROOT / words[2]).exists()


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_examples_run(code, monkeypatch, run, elsewhere):
    from dropkey import regularizers

    monkeypatch.setattr(regularizers, "REGULARIZERS", dict(regularizers.REGULARIZERS))
    names = {}
    if "local-dir:digits" in code:
        export.main(["run=vit_4x64", "output=digits"])
    exec(compile(code, "README.md", "exec"), names)
    if "drophead" in code:
        import torch

        import dropkey

        q = torch.randn(64, 8, 5, 4)
        out = dropkey.attention(q, q, q, regularizer="drophead", ratio=0.5)
        silent = (out == 0).flatten(2).all(-1).float().mean()
        assert 0.3 < silent < 0.7
        near = regularizers.draw_mask("dropkey_far", (2, 2, 9, 9), 0.9).diagonal(dim1=-2, dim2=-1)
        assert not near.any()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for words in (w for w in COMMANDS if w[0] == "make"):
        assert re.search(rf"^{words[1]}:", makefile, re.M)


def test_the_slurm_script_is_sound_and_hands_its_arguments_on():
    script = ROOT / "scripts" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert 'train.py "$@"' in text
    for words in (w for w in COMMANDS if w[0] == "sbatch"):
        assert (ROOT / words[1]).exists()
        check(compose(words[2:]))


def test_every_option_is_named():
    for file in CONFIGS.glob("*/*.yaml"):
        if file.parent.name != "local" and file.stem != "scales":
            assert re.sub(r"_?(d?\d+|tiny|small|base)$", "", file.stem) in TEXT, file
