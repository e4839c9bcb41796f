"""The parts of a table's YAML file: rows, claims, the design, tuning; each with how it is read and checked."""

import itertools
import math
import shlex
from dataclasses import dataclass
from typing import Optional

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dropkey.config.check import nearest, require
from dropkey.errors import ConfigError

NAMES = {str: "text", dict: "a mapping", list: "a list", int: "a number", (int, float): "a number"}
NAMES |= {(int, list): "a number or a list", (str, list): "a row or a list of rows"}
MOST_SEEDS = 10_000  # of a table
FEWEST = 3  # seeds at a look; two cannot show their spread
SET_BY_TABLES = ("seed", "output", "overwrite", "init_from")  # for each run
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
        until_decided: the looks are those of until=decided, not the table's.
        margin: differences below it, in the metric's unit, do not matter; None: equivalence is not tested.
    """

    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    margin: Optional[float] = None
    until_decided: bool = False


def check_types(content: dict, keys: dict[str, type | tuple[type, ...]], where: str) -> None:
    """Refuses keys that are not in `keys`, and values of another type. null counts as left out."""
    for key, value in content.items():
        require(key in keys, f"{where}{key} is not a key of a table{nearest(str(key), keys)}")
        good = isinstance(value, keys[key]) and not isinstance(value, bool)
        require(value is None or good, f"{where}{key}={value} must be {NAMES[keys[key]]}")


def read_text(text: str, where: str) -> str:
    """In one line, as reports and terminals show it."""
    found = " ".join(text.split())
    require(found.isprintable(), f"{where} has characters that cannot be printed: {ascii(found)[:80]}")
    return found


def read_overrides(text, where: str) -> tuple[str, ...]:
    """The overrides in a line such as "regularizer=dropkey schedule=constant"."""
    require(isinstance(text, str), f"{where} must be one line of overrides, not {text!r}")
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} cannot be read ({error})") from None
    for override in found:
        key = override.partition("=")[0].lstrip("+~")
        require("=" in override, f"{where}: '{override}' is not key=value")
        require(key not in SET_BY_TABLES, f"{where}: '{override}': a table sets {key} itself")
    return found


def read_row(label: str, value, where: str) -> Row:
    where = f"{where}row '{label}'"
    if not isinstance(value, dict):
        return Row(label, read_overrides(value, where))
    check_types(value, dict.fromkeys(("of", "like", "train", "evaluate", "best_of"), str), f"{where}: ")
    if "best_of" in value:
        require(len(value) == 1, f"{where} is best_of candidates and nothing else")
        return Row(label, candidates=read_candidates(value["best_of"], where))
    if "like" in value:
        require(not {*value} - {"like", "train"}, f"{where} is like another row, so it has train: and nothing else")
        return Row(label, read_overrides(value.get("train") or "", where), like=value["like"])
    require("of" in value, f"{where} needs of: <the row whose runs it starts from>, or like:, or best_of:")
    require(("train" in value) != ("evaluate" in value), f"{where} needs either train: or evaluate:")
    train, evaluate = (read_overrides(value.get(key) or "", where) for key in ("train", "evaluate"))
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
        choices = [
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            if one.is_sweep_override()
            else [written]
            for one, written in zip(parsed, overrides, strict=True)
        ]
    except HydraException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    found = tuple(itertools.product(*choices))
    require(len(found) > 1, f"{where}: best_of needs values with commas to choose from, such as schedule=constant,none")
    return found


def read_seeds(value: int | list, where: str) -> tuple[int, ...]:
    """5 means 0 to 4."""
    count = value if isinstance(value, int) else len(value)
    require(count <= MOST_SEEDS, f"{where}seeds={value if count == value else count}: at most {MOST_SEEDS:,}")
    seeds = tuple(range(value)) if isinstance(value, int) else tuple(value)
    good = seeds and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(bool(good), f"{where}seeds={value}: a number of seeds from 1, or a list of different seeds below 2**63")
    return seeds


def read_design(content: dict, scale: dict, where: str) -> Design:
    looks = scale.get("looks")
    if looks is not None:
        good = looks and all(type(look) is int for look in looks) and looks == sorted(set(looks)) and looks[0] >= FEWEST
        require(bool(good), f"{where}looks={looks}: ascending numbers of seeds from {FEWEST}")
    seeds = scale.get("seeds") if looks is None or isinstance(scale.get("seeds"), list) else looks[-1]
    seeds = read_seeds(5 if seeds is None else seeds, where)
    looks = (len(seeds),) if looks is None else tuple(looks)
    require(len(seeds) == looks[-1], f"{where}looks={list(looks)} end at another number than there are seeds")
    margin = content.get("margin")
    require(margin is None or 0 < margin < math.inf, f"{where}margin={margin} must be above 0")
    return Design(seeds, looks, margin)


def read_tuning(value: dict, columns: dict, where: str) -> dict:
    check_types(value, {"seeds": int, "column": str}, f"{where}tuning: ")
    count, column = value.get("seeds", 3), value.get("column")
    require(0 < count <= MOST_SEEDS, f"{where}tuning: seeds={count} must be a number from 1 to {MOST_SEEDS:,}")
    hint = nearest(str(column), columns)
    require(column is None or column in columns, f"{where}tuning: column '{column}' does not exist{hint}")
    return {"tuning_seeds": tuple(range(TUNING_SEED, TUNING_SEED + count)), "tuning_column": column}


def read_claims(values: list, rows: dict, written: dict, where: str) -> tuple[Claim, ...]:
    """The claims about rows that this scale has."""
    claims = [read_claim(value, written, where) for value in values]
    labels = [claim.label for claim in claims]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    require(twice is None, f"{where}claim '{twice}' is there twice")
    return tuple(claim for claim in claims if all(row in rows for row in claim.rows))


def read_claim(value, rows: dict, where: str) -> Claim:
    """A claim is "row > row", or for means over several rows claim (the sentence), better and worse (lists of rows)."""
    if isinstance(value, dict):
        check_types(value, {"claim": str, "better": (str, list), "worse": (str, list)}, f"{where}claims: ")
        need = len(value) == 3 and all(value.values())
        require(need, f"{where}a claim needs claim, better and worse")
        sides = [[side] if isinstance(side, str) else side for side in (value["better"], value["worse"])]
        claim = Claim(read_text(value["claim"], f"{where}claim"), *(tuple(map(str, side)) for side in sides))
    else:
        require(isinstance(value, str), f"{where}claim {value} must be text: 'row > row'")
        better, _, worse = (" ".join(part.split()) for part in value.partition(" > "))
        require(bool(better and worse), f"{where}claim '{value}' must read 'row > row'")
        claim = Claim(f"{better} > {worse}", (better,), (worse,))
    for row in claim.rows:
        require(row in rows, f"{where}claim '{claim}': '{row}' is not a row{nearest(row, rows)}")
    good = claim.better and claim.worse and len(set(claim.rows)) == len(claim.rows)
    require(bool(good), f"{where}claim '{claim}' needs different rows on both sides")
    return claim
