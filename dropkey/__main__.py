"""The program `dropkey <command> ...`, also as `python -m dropkey`."""

import importlib
import os
import sys
from typing import NoReturn

from dropkey import __version__
from dropkey.errors import ConfigError, edge, say
from dropkey.invocation import COMMANDS


def main(program: str = "dropkey") -> None:
    """Runs the command that sys.argv names; `program` is what the user typed before it."""
    with edge():
        run(program)


def run(program: str) -> None:
    name, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("--help", "-h"):
        lines = [f"  {known:<10} {command.about}" for known, command in COMMANDS.items()]
        print("\n".join([f"{program} <command> ...", "", *lines, "", f"{program} <command> --help says more."]))
    elif name == "--version":
        print(__version__)
    elif name == "-sc":
        complete(sys.argv[1:])
    elif name in COMMANDS:
        start(program, name, words)
    else:
        fail(f"{program} {name} does not exist; choices: {', '.join(COMMANDS)}")


def start(program: str, name: str, words: list[str]) -> None:
    sys.argv = [f"{program} {name}", *words]
    try:
        command = importlib.import_module(f"dropkey.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "dropkey":
            raise
        fail(f"{program} {name} needs {error.name}: pip install 'dropkey[{COMMANDS[name].extra}]'")
    command.start()


def complete(words: list[str]) -> None:
    """What Hydra's completion in the shell offers after `dropkey`: commands, then the keys and options of train and
    eval. Hydra asks the program with the words `-sc query=bash`, and has the line in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "dropkey train ").split(maxsplit=1)
    rest = line[1] if len(line) > 1 else ""
    name, space, _ = rest.partition(" ")
    if not space:
        print(*COMMANDS)
    elif name in ("train", "eval"):
        os.environ["COMP_LINE"] = rest
        start("dropkey", name, words)


def fail(message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main("python -m dropkey")
