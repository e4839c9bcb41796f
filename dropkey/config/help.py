"""What --help prints of keys and groups. The meaning of a key is the comment behind it in schema.py."""

import ast
import dataclasses
import functools
import inspect
import io
import re
import shutil
import textwrap
import tokenize
import typing
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from dropkey.config import schema

WIDEST = 100  # columns; longer lines are hard to read
LEFT = 32  # columns for keys and values; where they need more, the meaning begins on the next line


def two_columns(pairs: Iterable[tuple[str, str]], left: int = LEFT) -> str:
    """Names and what they mean, side by side, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    left = min(left, width // 2)
    lines = []
    for name, meaning in pairs:
        text = textwrap.wrap(meaning, max(width - left - 4, 20), break_on_hyphens=False) or [""]
        if len(name) > left:
            lines.append(f"  {name}")
            name = ""
        names = [name, *[""] * (len(text) - 1)]
        lines += [f"  {word:<{left}}  {part}".rstrip() for word, part in zip(names, text, strict=True)]
    return "\n".join(lines)


def meanings(kind: type = schema.TrainConfig, prefix: str = "") -> dict[str, str]:
    """'trainer.epochs' -> its meaning, for every key of a config, in the order of schema.py."""
    found, types = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        kinds = (types[field.name], *typing.get_args(types[field.name]))  # Optional[DataConfig] has two
        nested = [one for one in kinds if dataclasses.is_dataclass(one)]
        text = comments().get((kind.__name__, field.name), "")
        if text or not nested:
            found[key] = text
        if nested:
            found |= meanings(nested[0], f"{key}.")
    return found


@functools.lru_cache(maxsize=1)
def comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind it; where it says one of NAMES, the names themselves."""
    source = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}

    def written_out(name: re.Match) -> str:
        names = getattr(schema, name[0], name[0])
        return ", ".join(names) if isinstance(names, tuple) else name[0]

    return {
        (kind.name, field.target.id): re.sub(r"\b[A-Z_]{3,}\b", written_out, behind.get(field.end_lineno, ""))
        for kind in ast.parse(source).body
        if isinstance(kind, ast.ClassDef)
        for field in kind.body
        if isinstance(field, ast.AnnAssign)
    }


def keys(kind: type, cfg: DictConfig) -> str:
    """Every key with its value in `cfg` and its meaning, a blank line between groups."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, meaning in meanings(kind).items():
        group, value = key.rpartition(".")[0], OmegaConf.select(cfg, key)
        there = not group or OmegaConf.select(cfg, group) is not None
        if there and not dataclasses.is_dataclass(OmegaConf.get_type(value)):
            groups.setdefault(group, []).append((f"{key}={shown(value)}", meaning))
    text = "\n\n".join(map(two_columns, groups.values()))
    return text.replace("$", "$$")  # for Hydra's template


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    if OmegaConf.is_list(value):
        return f"[{','.join(map(shown, value))}]"
    if OmegaConf.is_dict(value):
        return "{" + ",".join(f"{key}:{shown(one)}" for key, one in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
