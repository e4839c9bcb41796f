"""A table is one YAML file under configs/table/: rows x columns x seeds, the paper's numbers, and its claims."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import yaml

from dropkey.config.check import nearest, require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError

TABLES = CONFIGS / "table"
SCALES = TABLES / "scales.yaml"  # shared by all tables
MAX_SEEDS = 20  # the sign-flip test enumerates 2^seeds signs


@dataclass(frozen=True)
class Row:
    """Runs trained with `overrides`. A row `of` another one starts from its runs: it trains them further with
    `overrides`, or evaluates them in another way with `evaluate`."""

    label: str
    overrides: tuple[str, ...] = ()  # of train.py
    of: Optional[str] = None
    evaluate: tuple[str, ...] = ()  # overrides of eval.py


@dataclass(frozen=True)
class Claim:
    """The paper says that the row `better` has a better result than the row `worse`."""

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
    question: str
    figure: str  # of the paper
    about: str  # this scale: data, model, time, hardware
    baseline: str  # the row that all others are compared with
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    columns: dict[str, tuple[str, ...]]  # label -> overrides of train.py
    claims: tuple[Claim, ...] = ()
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # column of the paper -> row -> result
    overrides: tuple[str, ...] = ()  # of every run, from the command line

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.scale}"


def names() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.yaml") if file != SCALES)


def load(table: str, scale: str, seeds: Optional[tuple[int, ...]] = None, overrides: tuple[str, ...] = ()) -> Table:
    """The table with this name, or in this YAML file, at one scale.

    Args:
        seeds: replace the seeds of the scale.
        overrides: of train.py, for every run.
    Raises:
        ConfigError: no such table or scale, or a mistake in the file.
    """
    own = table.endswith((".yaml", ".yml"))
    path = Path(table) if own else TABLES / f"{table}.yaml"
    hint = "" if own else f"{nearest(table, names())} (or the path of a YAML file)"
    require(path.exists(), f"table={table} does not exist{hint}")
    content, where = read_yaml(path), f"{path}: "
    check_keys(content, ("title", "question", "figure", "baseline", "rows", "claims", "paper", "scales"), where)
    for key in ("title", "baseline", "rows"):
        require(bool(content.get(key)), f"{where}{key} is missing")
    scales = {**read_yaml(SCALES), **(content.get("scales") or {})}
    require(scale in scales, f"scale={scale} does not exist{nearest(scale, scales)}")
    chosen = {**read_yaml(SCALES).get(scale, {}), **(scales[scale] or {})}
    check_keys(chosen, ("about", "seeds", "columns", "rows"), f"{where}scales.{scale}: ")
    for key, value in (("rows", content["rows"]), ("rows", chosen.get("rows", {})), ("columns", chosen.get("columns"))):
        require(isinstance(value, dict), f"{where}{key} of scale={scale} must map labels to overrides")
    written = {**content["rows"], **chosen.get("rows", {})}
    rows = {str(label): read_row(str(label), value, where) for label, value in written.items() if value is not None}
    for row in rows.values():
        require(row.of is None or row.of in rows, f"{where}row '{row.label}' is of '{row.of}', which is not a row")
        require(row.of is None or rows[row.of].of is None, f"{where}row '{row.label}' is of a row that is of another")
    baseline = content["baseline"]
    require(baseline in rows, f"{where}baseline '{baseline}' is not a row{nearest(baseline, rows)}")
    claims = [read_claim(text, written, where) for text in content.get("claims") or ()]
    paper = content.get("paper") or {}
    for column, results in paper.items():
        for label in results:
            require(label in written, f"{where}paper '{column}': '{label}' is not a row{nearest(label, written)}")
    return Table(
        name=path.stem,
        scale=scale,
        title=content["title"],
        question=content.get("question", ""),
        figure=content.get("figure", "none"),
        about=chosen.get("about", ""),
        baseline=baseline,
        seeds=read_seeds(seeds if seeds is not None else chosen.get("seeds", 5)),
        rows=rows,
        columns={
            str(label): read_overrides(value, f"{where}column '{label}'") for label, value in chosen["columns"].items()
        },
        claims=tuple(claim for claim in claims if claim.better in rows and claim.worse in rows),
        paper=paper,
        overrides=overrides,
    )


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    require(isinstance(content, dict), f"{path} has no keys")
    return content


def check_keys(content: dict, keys: tuple[str, ...], where: str) -> None:
    for key in content:
        require(key in keys, f"{where}{key} is not a key of a table{nearest(key, keys)}")


def read_overrides(text, where: str) -> tuple[str, ...]:
    """The overrides in a line such as "regularizer=dropkey schedule=constant"."""
    require(isinstance(text, str), f"{where} must be one line of overrides, not {text!r}")
    found = tuple(shlex.split(text))
    for override in found:
        good = "=" in override and not override.startswith("seed=")
        require(good, f"{where}: '{override}' is not key=value (seeds have a key of their own)")
    return found


def read_row(label: str, value, where: str) -> Row:
    where = f"{where}row '{label}'"
    if not isinstance(value, dict):
        return Row(label, read_overrides(value, where))
    check_keys(value, ("of", "train", "evaluate"), f"{where}: ")
    require("of" in value, f"{where} needs of: <the row whose runs it starts from>")
    require(("train" in value) != ("evaluate" in value), f"{where} needs either train: or evaluate:")
    train, evaluate = (read_overrides(value.get(key, ""), where) for key in ("train", "evaluate"))
    return Row(label, train, value["of"], evaluate)


def read_seeds(value) -> tuple[int, ...]:
    """5 means 0 to 4."""
    seeds = tuple(range(value)) if isinstance(value, int) else tuple(value)
    good = seeds and all(isinstance(seed, int) and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(good, f"seeds={value}: a number of seeds from 1, or a list of different seeds")
    require(
        len(seeds) <= MAX_SEEDS, f"seeds: {len(seeds)} are more than {MAX_SEEDS}, the most that the tests can count"
    )
    return seeds


def read_claim(text: str, rows: dict, where: str) -> Claim:
    better, _, worse = (part.strip() for part in str(text).partition(" > "))
    require(bool(better and worse), f"{where}claim '{text}' must read 'row > row'")
    for row in (better, worse):
        require(row in rows, f"{where}claim '{text}': '{row}' is not a row{nearest(row, rows)}")
    return Claim(better, worse)
