"""Arguments of scripts: typed, with one-line errors and a generated help."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import pytest

from dropkey.config.script_args import arg, parse, run_script, split
from dropkey.errors import ConfigError


@dataclass
class Args:
    action: str = arg("", "what to do", choices=("draw", "list"))
    output: str = arg("runs", "where results go")
    head: int = arg(1, "attention head")
    scale: float = arg(1.0, "enlargement")
    all: bool = arg(False, "every layer")
    layers: List[int] = arg([0, 1], "which layers")
    limit: Optional[int] = arg(5, "at most this many")
    mode: str = arg("fast", "how", choices=("fast", "exact"))
    slurm: Dict[str, str] = arg({}, "parameters of submitit")


def test_without_words_the_defaults_hold():
    assert parse(Args, ["draw"]) == Args(action="draw")


def test_words_become_typed_values():
    words = (
        "draw output=1e3 head=2 scale=1e-3 all=true layers=3,4 limit=null mode=exact slurm.partition=gpu slurm.mem=010"
    )
    expected = Args("draw", "1e3", 2, 1e-3, True, [3, 4], None, "exact", {"partition": "gpu", "mem": "010"})
    assert parse(Args, words.split()) == expected


def test_a_value_may_contain_an_equals_sign():
    assert parse(Args, ["draw", "output=runs/lr=3"]).output == "runs/lr=3"


WRONG = {
    "draw hed=2": "hed is not an argument; did you mean head?",
    "draw head=two": "head=two: Value 'two' of type 'str' could not be converted to Integer",
    "draw all=2x": "all=2x: Value '2x' is not a valid bool",
    "draw layers=a": "layers=a: Value 'a' of type 'str' could not be converted to Integer",
    "draw mode=quick": "mode=quick does not exist; choices: fast, exact",
    "darw": "darw does not exist; choices: draw, list",
    "head=2": "an action is missing; choices: draw, list",
    "draw head.x=2": "head.x=2: ",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=str)
def test_a_mistake_is_one_line_with_the_way_out(words, message):
    with pytest.raises(ConfigError) as error:
        parse(Args, words.split())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_without_an_action_every_word_needs_a_key():
    @dataclass
    class Plain:
        head: int = arg(1, "attention head")

    with pytest.raises(ConfigError, match="'draw': arguments look like key=value"):
        parse(Plain, ["draw"])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_docstring_and_every_key_with_its_default(flag, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Args, [flag], "Draws things.\n")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith("Draws things.\n")
    for text in ("action  ", "what to do: draw, list", "head=1 ", "all=false ", "layers=0,1 ", "slurm= ", "scale=1.0 "):
        assert text in shown


def test_other_words_are_kept_apart():
    words = ["draw", "head=2", "optim.lr=1e-3", "slurm.mem=1", "+model.args.head=2"]
    assert split(Args, words) == (["draw", "head=2", "slurm.mem=1"], ["optim.lr=1e-3", "+model.args.head=2"])


def test_a_script_ends_with_the_code_of_its_error(tmp_path):
    program = (
        "from dropkey.config.script_args import run_script\nfrom dropkey.errors import DataError\n"
        "def main(words): raise DataError('no images')\nrun_script(main)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "error: no images\n")


def test_ctrl_c_gives_the_exit_code_of_its_signal():
    def main(words):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 130
