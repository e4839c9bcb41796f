"""A table is one YAML file under configs/table/: rows x columns x seeds, its claims, and when these are tested."""

import itertools
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dropkey.config.check import nearest, require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError

TABLES = CONFIGS / "table"
SCALES = TABLES / "scales.yaml"  # shared by all tables
KEYS = (
    "title",
    "question",
    "figure",
    "baseline",
    "rows",
    "claims",
    "margin",
    "tuning",
    "paper",
    "published_baseline",
    "protocol",
    "scales",
)
FEWEST = 3  # seeds at a look; two cannot show their spread
TUNING_SEED = 1000  # the first seed of tuning; a comparison has seeds of its own


@dataclass(frozen=True)
class Row:
    """Runs trained with `overrides`.

    A row `of` another one starts from its runs: it trains them further with `overrides`, or evaluates them in another
    way with `evaluate`. A row `like` another one is trained with its overrides and then its own. A row with
    `candidates` is trained like the candidate that is best on validation data.
    """

    label: str
    overrides: tuple[str, ...] = ()  # of train.py
    of: Optional[str] = None
    evaluate: tuple[str, ...] = ()  # overrides of eval.py
    like: Optional[str] = None
    candidates: tuple[tuple[str, ...], ...] = ()  # overrides of train.py for each


@dataclass(frozen=True)
class Claim:
    """The mean of some rows is better than the mean of others, on average over the columns; usually one row each."""

    label: str
    better: tuple[str, ...]
    worse: tuple[str, ...]

    def __str__(self) -> str:
        return self.label

    @property
    def rows(self) -> tuple[str, ...]:
        return self.better + self.worse


@dataclass(frozen=True)
class Design:
    """When claims are tested. Fixed before the first run.

    Attributes:
        seeds: planned, in this order.
        looks: numbers of seeds after which claims are tested; the last is all.
        margin: differences below it, in the metric's unit, do not matter; None: equivalence is not tested.
    """

    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    margin: Optional[float] = None


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
    design: Design
    seeds: tuple[int, ...]  # to run now
    rows: dict[str, Row]
    columns: dict[str, tuple[str, ...]]  # label -> overrides of train.py
    claims: tuple[Claim, ...] = ()
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # column of the paper -> row -> result
    published_baseline: Optional[str] = None  # a row of `paper`: ours must come near before its claims count
    protocol: Optional[str] = None  # a file with the plan of the study
    tuning_seeds: tuple[int, ...] = ()
    tuning_column: Optional[str] = None  # where candidates are compared; None: in each column for itself
    chosen: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # (row, column) -> the best candidate
    overrides: tuple[str, ...] = ()  # of every run, from the command line

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.scale}"


def names() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.yaml") if file != SCALES)


def load(table: str, scale: str, seeds: Optional[tuple[int, ...]] = None, overrides: tuple[str, ...] = ()) -> Table:
    """The table with this name, or in this YAML file, at one scale.

    Args:
        seeds: to run now, in place of the planned ones.
        overrides: of train.py, for every run.
    Raises:
        ConfigError: no such table or scale, or a mistake in the file.
    """
    own = table.endswith((".yaml", ".yml"))
    path = Path(table) if own else TABLES / f"{table}.yaml"
    hint = "" if own else f"{nearest(table, names())} (or the path of a YAML file)"
    require(path.exists(), f"table={table} does not exist{hint}")
    content, where = read_yaml(path), f"{path}: "
    check_keys(content, KEYS, where)
    for key in ("title", "baseline", "rows"):
        require(bool(content.get(key)), f"{where}{key} is missing")
    scales = {**read_yaml(SCALES), **(content.get("scales") or {})}
    require(scale in scales, f"scale={scale} does not exist{nearest(scale, scales)}")
    chosen = {**read_yaml(SCALES).get(scale, {}), **(scales[scale] or {})}
    check_keys(chosen, ("about", "seeds", "looks", "columns", "rows"), f"{where}scales.{scale}: ")
    for key, value in (("rows", content["rows"]), ("rows", chosen.get("rows", {})), ("columns", chosen.get("columns"))):
        require(isinstance(value, dict), f"{where}{key} of scale={scale} must map labels to overrides")
    written = {**content["rows"], **chosen.get("rows", {})}
    rows = {str(label): read_row(str(label), value, where) for label, value in written.items() if value is not None}
    check_rows(rows, where)
    columns = {str(name): read_overrides(text, f"{where}column '{name}'") for name, text in chosen["columns"].items()}
    for key in ("baseline", "published_baseline"):
        label = content.get(key)
        require(label is None or label in rows, f"{where}{key} '{label}' is not a row{nearest(label, rows)}")
    claims = [read_claim(claim, written, where) for claim in content.get("claims") or ()]
    paper = content.get("paper") or {}
    for column, results in paper.items():
        for label in results:
            require(label in written, f"{where}paper '{column}': '{label}' is not a row{nearest(label, written)}")
    design = read_design(content, chosen, where)
    return Table(
        name=path.stem,
        scale=scale,
        title=content["title"],
        question=content.get("question", ""),
        figure=content.get("figure", "none"),
        about=chosen.get("about", ""),
        baseline=content["baseline"],
        design=design,
        seeds=design.seeds if seeds is None else read_seeds(seeds, where),
        rows=rows,
        columns=columns,
        claims=tuple(claim for claim in claims if all(row in rows for row in claim.rows)),
        paper=paper,
        published_baseline=content.get("published_baseline"),
        protocol=content.get("protocol"),
        overrides=overrides,
        **read_tuning(content.get("tuning") or {}, columns, where),
    )


def until_decided(table: Table, max_seeds: int) -> Table:
    """The table with a look after every seed from 5 on, up to `max_seeds`."""
    first = min(5, max_seeds)
    require(max_seeds >= FEWEST, f"max_seeds={max_seeds} must be {FEWEST} or more")
    seeds = tuple(range(max_seeds))
    design = replace(table.design, seeds=seeds, looks=tuple(range(first, max_seeds + 1)))
    return replace(table, design=design, seeds=seeds)


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
    if "best_of" in value:
        check_keys(value, ("best_of",), f"{where}: ")
        return Row(label, candidates=read_candidates(value["best_of"], where))
    if "like" in value:
        check_keys(value, ("like", "train"), f"{where}: ")
        return Row(label, read_overrides(value.get("train"), where), like=value["like"])
    check_keys(value, ("of", "train", "evaluate"), f"{where}: ")
    require("of" in value, f"{where} needs of: <the row whose runs it starts from>, or like:, or best_of:")
    require(("train" in value) != ("evaluate" in value), f"{where} needs either train: or evaluate:")
    train, evaluate = (read_overrides(value.get(key, ""), where) for key in ("train", "evaluate"))
    return Row(label, train, value["of"], evaluate)


def check_rows(rows: dict[str, Row], where: str) -> None:
    for row in rows.values():
        for key in ("of", "like"):
            other = getattr(row, key)
            require(other is None or other in rows, f"{where}row '{row.label}' is {key} '{other}', which is not a row")
            chain = other is not None and (rows[other].of is not None or rows[other].like is not None)
            require(not chain, f"{where}row '{row.label}' is {key} a row that is of or like another")


def read_candidates(text, where: str) -> tuple[tuple[str, ...], ...]:
    """Every combination of the values with commas, as in a Hydra sweep: "schedule=constant,decreasing optim.lr=1,2"."""
    overrides = list(read_overrides(text, where))
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [written]
        for one, written in zip(parsed, overrides, strict=True)
    ]
    found = tuple(itertools.product(*choices))
    require(len(found) > 1, f"{where}: best_of needs values with commas to choose from, such as schedule=constant,none")
    return found


def read_seeds(value, where: str = "") -> tuple[int, ...]:
    """5 means 0 to 4."""
    seeds = tuple(range(value)) if isinstance(value, int) else tuple(value)
    good = seeds and all(isinstance(seed, int) and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(good, f"{where}seeds={value}: a number of seeds from 1, or a list of different seeds")
    return seeds


def read_design(content: dict, scale: dict, where: str) -> Design:
    looks = scale.get("looks")
    seeds = read_seeds(scale.get("seeds", 5) if looks is None else max(looks), where)
    looks = (len(seeds),) if looks is None else tuple(looks)
    good = looks[0] >= FEWEST and list(looks) == sorted(set(looks))
    require(good or len(looks) == 1, f"{where}looks={list(looks)}: ascending numbers of seeds from {FEWEST}")
    margin = content.get("margin")
    require(margin is None or margin > 0, f"{where}margin={margin} must be above 0")
    return Design(seeds, looks, margin)


def read_tuning(value: dict, columns: dict, where: str) -> dict:
    check_keys(value, ("seeds", "column"), f"{where}tuning: ")
    count = value.get("seeds", 3)
    require(isinstance(count, int) and count > 0, f"{where}tuning: seeds={count} must be a number from 1")
    column = value.get("column")
    hint = nearest(str(column), columns)
    require(column is None or column in columns, f"{where}tuning: column '{column}' does not exist{hint}")
    return {"tuning_seeds": tuple(range(TUNING_SEED, TUNING_SEED + count)), "tuning_column": column}


def read_claim(value, rows: dict, where: str) -> Claim:
    """A claim is "row > row", or for means over several rows claim (the sentence), better and worse (lists of rows)."""
    if isinstance(value, dict):
        check_keys(value, ("claim", "better", "worse"), f"{where}claims: ")
        require(len(value) == 3, f"{where}a claim needs claim, better and worse")
        sides = [[side] if isinstance(side, str) else side for side in (value["better"], value["worse"])]
        claim = Claim(str(value["claim"]), *(tuple(map(str, side)) for side in sides))
    else:
        better, _, worse = (part.strip() for part in str(value).partition(" > "))
        require(bool(better and worse), f"{where}claim '{value}' must read 'row > row'")
        claim = Claim(f"{better} > {worse}", (better,), (worse,))
    for row in claim.rows:
        require(row in rows, f"{where}claim '{claim}': '{row}' is not a row{nearest(row, rows)}")
    return claim
