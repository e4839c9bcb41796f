"""A table is one YAML under configs/table/: rows x columns x seeds, the paper's numbers, and its claims."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import yaml

from dropkey.config.check import nearest, require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError

TABLES = CONFIGS / "table"
SCALES = TABLES / "scales.yaml"  # what all tables have in common
MAX_SEEDS = 20  # up to which all sign flips are counted


@dataclass(frozen=True)
class Row:
    """Runs of one row: trained with `words`; or, where it is made from the runs of another row `of`, these runs
    trained on (`words`) or evaluated in another way (`evaluate`)."""

    label: str
    words: tuple[str, ...] = ()  # overrides of train.py
    of: Optional[str] = None
    evaluate: tuple[str, ...] = ()  # overrides of eval.py


@dataclass(frozen=True)
class Claim:
    """The paper says that `better` has a higher top-1 than `worse`."""

    better: str
    worse: str

    def __str__(self) -> str:
        return f"{self.better} > {self.worse}"


@dataclass(frozen=True)
class Table:
    """One table at one scale."""

    name: str
    scale: str
    title: str
    asks: str  # the question
    figure: str  # of the paper, or that it has none
    about: str  # what this scale is: data, model, time, hardware
    baseline: str  # label of the row that the others are compared with
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    columns: dict[str, tuple[str, ...]]  # label -> overrides of train.py
    claims: tuple[Claim, ...] = ()
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # the paper's column -> row -> top-1 in percent
    extra: tuple[str, ...] = ()  # overrides laid over every run, from the command line

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.scale}"


def names() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.yaml") if file != SCALES)


def load(table: str, scale: str, seeds: Optional[tuple[int, ...]] = None, extra: tuple[str, ...] = ()) -> Table:
    """The table of that name, or in that YAML file, at one of its own scales or of those common to all.

    Args:
        seeds: instead of the scale's own.
        extra: overrides for every run.
    Raises:
        ConfigError: no such table or scale, or a file that cannot be understood.
    """
    own = table.endswith((".yaml", ".yml"))
    path = Path(table) if own else TABLES / f"{table}.yaml"
    if not path.exists():
        hint = "" if own else f"{nearest(table, names())} (or the path of a YAML file)"
        raise ConfigError(f"table={table} does not exist{hint}")
    content, where = read_yaml(path), f"{path}: "
    only(content, ("title", "asks", "figure", "baseline", "rows", "claims", "paper", "scales"), where)
    for key in ("title", "baseline", "rows"):
        require(bool(content.get(key)), f"{where}{key} is missing")
    common, own_scales = read_yaml(SCALES), content.get("scales") or {}
    known = [*common, *(name for name in own_scales if name not in common)]
    require(scale in known, f"scale={scale} does not exist{nearest(scale, known)}")
    chosen = {**common.get(scale, {}), **(own_scales.get(scale) or {})}
    only(chosen, ("about", "seeds", "columns", "rows"), f"{where}scales.{scale}: ")
    require(bool(chosen.get("columns")), f"{where}scales.{scale} has no columns")
    for key in ("rows", "columns"):
        require(
            isinstance(chosen.get(key, {}), dict) and isinstance(content["rows"], dict), f"{where}{key} must be named"
        )
    written = {**content["rows"], **chosen.get("rows", {})}
    rows = {}
    for label, value in written.items():
        if value is not None:  # a scale leaves a row out by setting it to null
            rows[str(label)] = read_row(str(label), value, where)
    for row in rows.values():
        require(row.of is None or row.of in rows, f"{where}row '{row.label}' is of '{row.of}', which is no row")
        require(row.of is None or rows[row.of].of is None, f"{where}row '{row.label}' is of a row that is of another")
    baseline = content["baseline"]
    require(baseline in rows, f"{where}baseline '{baseline}' is no row{nearest(baseline, rows)}")
    columns = {str(label): words(value, f"{where}column '{label}'") for label, value in chosen["columns"].items()}
    return Table(
        name=path.stem,
        scale=scale,
        title=content["title"],
        asks=content.get("asks", ""),
        figure=content.get("figure", "none"),
        about=chosen.get("about", ""),
        baseline=baseline,
        seeds=read_seeds(seeds if seeds is not None else chosen.get("seeds", 5)),
        rows=rows,
        columns=columns,
        claims=tuple(
            claim for text in content.get("claims") or () if (claim := read_claim(text, rows, set(written), where))
        ),
        paper=read_paper(content.get("paper") or {}, written, where),
        extra=extra,
    )


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    require(isinstance(content, dict), f"{path} holds no keys")
    return content


def only(content: dict, keys: tuple[str, ...], where: str) -> None:
    for key in content:
        require(key in keys, f"{where}{key} is no key of a table{nearest(key, keys)}")


def words(text, where: str) -> tuple[str, ...]:
    """The overrides in a line such as "regularizer=dropkey schedule=constant"."""
    require(isinstance(text, str), f"{where} must be one line of overrides, not {text!r}")
    found = tuple(shlex.split(text))
    for word in found:
        require("=" in word and not word.startswith("seed="), f"{where}: '{word}' is no key=value (seeds have a key)")
    return found


def read_row(label: str, value, where: str) -> Row:
    where = f"{where}row '{label}'"
    if not isinstance(value, dict):
        return Row(label, words(value, where))
    only(value, ("of", "train", "evaluate"), f"{where}: ")
    require("of" in value, f"{where} needs of: <the row whose runs it takes>")
    require(("train" in value) != ("evaluate" in value), f"{where} needs either train: or evaluate:")
    return Row(
        label,
        words(value.get("train", ""), where),
        value["of"],
        words(value.get("evaluate", ""), where),
    )


def read_seeds(value) -> tuple[int, ...]:
    """5 means 0 to 4."""
    seeds = tuple(range(value)) if isinstance(value, int) else tuple(value)
    good = seeds and all(isinstance(seed, int) and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(good, f"seeds={value}: a number of seeds from 1, or a list of different seeds")
    require(len(seeds) <= MAX_SEEDS, f"seeds: {len(seeds)} are more than the {MAX_SEEDS} whose sign flips are counted")
    return seeds


def read_claim(text: str, rows: dict[str, Row], known: set[str], where: str) -> Optional[Claim]:
    """ "A > B"; None where this scale has left one of the rows out."""
    better, _, worse = (part.strip() for part in str(text).partition(" > "))
    require(bool(better and worse), f"{where}claim '{text}' must read 'row > row'")
    for row in (better, worse):
        require(row in known, f"{where}claim '{text}': '{row}' is no row{nearest(row, known)}")
    return Claim(better, worse) if better in rows and worse in rows else None


def read_paper(content: dict, rows, where: str) -> dict[str, dict[str, float]]:
    for column, numbers in content.items():
        for row in numbers:
            require(row in rows, f"{where}paper '{column}': '{row}' is no row{nearest(row, rows)}")
    return content
