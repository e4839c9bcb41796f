"""Arguments of the scripts: `key=value` words that fill a dataclass, one-line errors, and a generated --help.

@dataclass
class Args:
    action: str = arg("", "what to draw", choices=("maps", "masks"))
    run: str = arg("", "run directory, or several with commas")
    head: int = arg(0, "attention head")

args = parse(Args, sys.argv[1:], __doc__)  # dropkey visualize maps run=runs/x head=2
"""

import dataclasses
import json
import signal
import sys
import typing
from collections.abc import Callable

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dropkey.config.check import nearest, require
from dropkey.config.help import two_columns
from dropkey.errors import ConfigError, RunError, edge, say
from dropkey.invocation import as_started

HELP = {"--help", "-h"}


def arg(default, help: str, choices: tuple[str, ...] = ()):
    """A field of the dataclass: its default, what --help prints, and the values it may have (empty: any)."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(schema: type, words: list[str], doc: str = ""):
    """An instance of the dataclass `schema`, filled from the command line. --help and -h print help and exit.

    A list takes `key=a,b`, a dictionary `key.name=value`, an optional value `key=null`. If there is a field `action`,
    a word without `=` is its value, and it is required unless it has a default.

    Raises:
        ConfigError: an unknown key, with the nearest one; a value of the wrong type or not among the choices.
    """
    fields, types = {field.name: field for field in dataclasses.fields(schema)}, typing.get_type_hints(schema)
    if HELP & set(words):
        print(help_text(list(fields.values()), doc))
        raise SystemExit(0)
    cfg = OmegaConf.structured(schema)
    for word in words:
        key, equals, value = word.partition("=") if "=" in word or "action" not in fields else ("action", "=", word)
        require(bool(equals), f"'{word}': arguments look like key=value")
        name = key.partition(".")[0]
        require(name in fields, f"{key} is not an argument{nearest(name, fields)}")
        choices = fields[name].metadata["choices"]
        require(not choices or value in choices, f"{word} does not exist; choices: {', '.join(choices)}")
        try:
            OmegaConf.update(cfg, key, convertible(value, types[name]))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{word}: {str(error).splitlines()[0]}") from None
    try:
        args = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation such as ${name}
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    if "action" in fields:
        require(bool(args.action), f"an action is missing; choices: {', '.join(fields['action'].metadata['choices'])}")
    return args


def convertible(text: str, kind):
    """What OmegaConf converts to `kind`. A string stays as it is, so a directory may be named 1e3."""
    if text == "null" and type(None) in typing.get_args(kind):
        return None
    if typing.get_origin(kind) is list:
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    return text


def split(schema: type, words: list[str]) -> tuple[list[str], list[str]]:
    """The words that `parse` understands, and all others, such as overrides for training."""
    names = {field.name for field in dataclasses.fields(schema)}
    own = [word for word in words if "=" not in word or word.partition("=")[0].partition(".")[0] in names]
    return own, [word for word in words if word not in own]


def help_text(fields: list[dataclasses.Field], doc: str) -> str:
    """The docstring, commands named as the user starts them; then every key with default, meaning and choices."""
    pairs = []
    for field in fields:
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if not isinstance(default, str):
            default = ",".join(map(str, default)) if isinstance(default, (list, dict)) else json.dumps(default)
        choices = f": {', '.join(field.metadata['choices'])}" if field.metadata["choices"] else ""
        shown = field.name if field.name == "action" else f"{field.name}={default}"
        pairs.append((shown, f"{field.metadata['help']}{choices}"))
    return f"{as_started(doc.strip())}\n\nArguments:\n{two_columns(pairs, left=18)}"


def run_script(main: Callable[[list[str]], int | None]) -> typing.NoReturn:
    """Calls `main` with the command line's words and exits with its code; a RunError becomes one line."""
    try:
        with edge():
            sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except RunError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
