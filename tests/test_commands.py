"""The program `dropkey`, the scripts of a checkout, and messages that name either as the user started it."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dropkey import __main__ as program
from dropkey.invocation import COMMANDS, as_started, invocation

ROOT = Path(__file__).parents[1]


def run(monkeypatch, capsys, *words: str) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of `dropkey <words>`, in this process."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dropkey", *words])
    code = 0
    try:
        program.main()
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ------------------------------------------------------------------------------------------------------ the program


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_and_its_script_starts_the_same(name, monkeypatch):
    module = importlib.import_module(f"dropkey.commands.{name.replace('-', '_')}")
    spec = importlib.util.spec_from_file_location("script", ROOT / COMMANDS[name].script)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.start is module.start


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)], ids=str)
def test_help_lists_the_commands(words, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    assert re.findall(r"^  ([\w-]+) ", out, re.M) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_names_it_as_it_was_started(name, monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, name, "--help")
    assert f"dropkey {name} " in out
    assert ".py" not in out


def test_a_command_that_does_not_exist_ends_in_one_line_with_the_choices(monkeypatch, capsys):
    choices = "train, eval, predict, export, runs, reproduce, visualize, label-maps, search"
    error = f"error: dropkey trian does not exist; choices: {choices}\n"
    assert run(monkeypatch, capsys, "trian") == (2, "", error)


@pytest.mark.parametrize("name, package, extra", [("train", "hydra", "train"), ("search", "optuna", "sweeps")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(name, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [module for module in sys.modules if module.startswith(("dropkey.commands", "dropkey.cli"))]:
        monkeypatch.delitem(sys.modules, module)
    error = f"error: dropkey {name} needs {package}: pip install 'dropkey[{extra}]'\n"
    assert run(monkeypatch, capsys, name) == (2, "", error)


def test_dropkey_train_cannot_be_imported_and_so_hides_no_function_of_that_name():
    with pytest.raises(ImportError, match=r"its code is in dropkey\.commands\.train"):
        importlib.import_module("dropkey.train")


@pytest.mark.parametrize("words", [["-m", "dropkey.train"], ["-m", "dropkey", "train"], ["train.py"]], ids=" ".join)
def test_every_way_to_start_a_training_names_itself(words):
    done = subprocess.run([sys.executable, *words, "table=x"], cwd=ROOT, capture_output=True, text=True)
    other = "python scripts/reproduce.py" if words == ["train.py"] else "python -m dropkey reproduce"
    assert done.stderr == f"error: a table is many runs: {other} run table=<name> scale=smoke\n"


# ------------------------------------------------------------------------------------------------- what messages say

STARTED = {  # sys.argv[0] -> what starts the training itself, an evaluation, a training with two processes
    "train.py": ("python train.py", "python eval.py", "torchrun --nproc-per-node=2 train.py"),
    str(ROOT / "train.py"): (
        f"python {ROOT}/train.py",
        f"python {ROOT}/eval.py",
        f"torchrun --nproc-per-node=2 {ROOT}/train.py",
    ),
    "dropkey train": ("dropkey train", "dropkey eval", "torchrun --nproc-per-node=2 -m dropkey train"),
    "python -m dropkey train": (
        "python -m dropkey train",
        "python -m dropkey eval",
        "torchrun --nproc-per-node=2 -m dropkey train",
    ),
    "python -m dropkey.train": (
        "python -m dropkey.train",
        "python -m dropkey eval",
        "torchrun --nproc-per-node=2 -m dropkey.train",
    ),
}


@pytest.mark.parametrize("typed", STARTED)
def test_commands_are_named_as_this_one_was_started(typed, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [typed])
    assert (invocation(), invocation("eval"), invocation(processes=2)) == STARTED[typed]
    assert as_started("Try dropkey eval run=x.") == f"Try {STARTED[typed][1]} run=x."


def test_a_script_is_named_from_where_the_user_is(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search.py"])
    monkeypatch.chdir(ROOT / "scripts")
    assert invocation("train") == "python ../train.py"


def test_the_users_own_train_py_is_not_taken_for_ours(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert invocation("eval") == "dropkey eval"
    assert invocation() == "python train.py"  # it runs, so it is what goes on


# -------------------------------------------------------------------------------------------- completion in the shell


def completed(line: str, directory: Path, environment: dict) -> list[str]:
    """What bash offers for `line`, with the completion installed as the README says."""
    install = line.rpartition(" ")[0]
    script = f"""
        eval "$({install} -sc install=bash)"
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_CWORD={len(line.split()) - 1} hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.fixture
def shell(tmp_path):
    """The environment of a shell that knows `python` and `dropkey`."""
    (tmp_path / "dropkey").write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[0] = {str(ROOT)!r}\nfrom dropkey.__main__ import main\nmain()\n"
    )
    (tmp_path / "dropkey").chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


@pytest.mark.parametrize("program", ["python train.py", "dropkey train"])
def test_bash_completes_options(program, shell):
    assert completed(f"{program} regularizer=dropatt", ROOT, shell) == ["regularizer=dropattention"]


def test_bash_completes_commands(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "dropkey tr")
    assert run(monkeypatch, capsys, "-sc", "query=bash")[1].split() == list(COMMANDS)
