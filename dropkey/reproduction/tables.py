"""A table is one YAML file under configs/table/: rows x columns x seeds, its claims, and when these are tested."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import yaml

from dropkey.config.check import nearest, require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError
from dropkey.reproduction.table_parts import (
    FEWEST,
    MOST_SEEDS,
    Claim,
    Design,
    Row,
    check_rows,
    check_types,
    read_claims,
    read_design,
    read_overrides,
    read_row,
    read_seeds,
    read_text,
    read_tuning,
)

TABLES = CONFIGS / "table"
SCALES = TABLES / "scales.yaml"  # shared by all tables
TEXTS = ("title", "question", "figure")
TABLE_KEYS = {  # the keys of a table, and what each holds
    **dict.fromkeys(("title", "question", "figure", "baseline"), str),
    **{
        "rows": dict,
        "claims": list,
        "margin": (int, float),
        "tuning": dict,
        "paper": dict,
        "published": dict,
        "scales": dict,
    },
}
SCALE_KEYS = {"about": str, "seeds": (int, list), "looks": list, "columns": dict, "rows": dict, "protocol": str}


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
    published: dict[str, float] = field(default_factory=dict)  # column -> baseline, which ours must come near
    protocol: Optional[str] = None  # a file with the plan of the study, which fixes the design at this scale
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
    check_types(content, TABLE_KEYS, where)
    for key in ("title", "baseline", "rows"):
        require(bool(content.get(key)), f"{where}{key} is missing")
    texts = {key: read_text(content.get(key, ""), where + key) for key in TEXTS}
    chosen = read_scale(content.get("scales") or {}, scale, where)
    columns = {
        read_text(str(name), f"{where}column '{name}'"): read_overrides(text, f"{where}column '{name}'")
        for name, text in chosen["columns"].items()
    }
    written = {
        read_text(str(label), f"{where}row '{label}'"): value
        for label, value in {**content["rows"], **chosen.get("rows", {})}.items()
    }
    rows = {label: read_row(label, value, where) for label, value in written.items() if value is not None}
    check_rows(rows, where)
    label = content["baseline"]
    require(label in rows, f"{where}baseline '{label}' is not a row{nearest(str(label), rows)}")
    design, tuning = read_design(content, chosen, where), read_tuning(content.get("tuning") or {}, columns, where)
    chosen_seeds = design.seeds if seeds is None else read_seeds(list(seeds), "")
    if any(row.candidates for row in rows.values()):
        both = sorted({*design.seeds, *chosen_seeds} & {*tuning["tuning_seeds"]})
        require(not both, f"{where}seeds={both} are seeds of tuning; a comparison needs fresh ones")
    return Table(
        name=path.stem,
        scale=scale,
        title=texts["title"],
        question=texts["question"],
        figure=texts["figure"] or "none",
        about=read_text(chosen.get("about", ""), f"{where}scales.{scale}: about"),
        baseline=content["baseline"],
        design=design,
        seeds=chosen_seeds,
        rows=rows,
        columns=columns,
        claims=read_claims(content.get("claims") or [], rows, written, where),
        paper=read_paper(content.get("paper") or {}, written, where),
        published=read_numbers(content.get("published") or {}, f"{where}published: "),
        protocol=chosen.get("protocol"),
        overrides=overrides,
        **tuning,
    )


def read_paper(paper: dict, rows: dict, where: str) -> dict[str, dict[str, float]]:
    """The paper's column -> row -> number."""
    for column, results in paper.items():
        check_types({"paper": results}, {"paper": dict}, f"{where}column '{column}' of ")
        at = f"{where}paper '{column}': "
        for label in read_numbers(results or {}, at):
            require(label in rows, f"{at}'{label}' is not a row{nearest(str(label), rows)}")
    return {read_text(str(name), f"{where}paper"): results or {} for name, results in paper.items()}


def read_numbers(numbers: dict, where: str) -> dict[str, float]:
    for label, value in numbers.items():
        check_types({label: value}, {label: (int, float)}, where)
        require(value is None or math.isfinite(value), f"{where}{label}={value} must be a number")
    return numbers


def read_scale(own: dict, scale: str, where: str) -> dict:
    """The keys of a scale: those common to all tables, changed by the table's own."""
    common = read_yaml(SCALES)
    require(scale in {**common, **own}, f"scale={scale} does not exist{nearest(scale, {**common, **own})}")
    check_types(own, dict.fromkeys(own, dict), f"{where}scales: ")
    found = {**common.get(scale, {}), **(own.get(scale) or {})}
    found = {key: value for key, value in found.items() if value is not None}
    check_types(found, SCALE_KEYS, f"{where}scales.{scale}: ")
    require(bool(found.get("columns")), f"{where}scale={scale} has no columns")
    protocol = found.get("protocol")
    exists = protocol is None or (CONFIGS.parent / protocol).exists()
    require(exists, f"{where}scales.{scale}: protocol={protocol} does not exist")
    return found


def until_decided(table: Table, max_seeds: int) -> Table:
    """The table with a look after every seed from 5 on, up to `max_seeds`."""
    require(max_seeds >= FEWEST, f"max_seeds={max_seeds} must be {FEWEST} or more")
    require(max_seeds <= MOST_SEEDS, f"max_seeds={max_seeds} must be {MOST_SEEDS:,} or fewer")
    first, seeds = min(5, max_seeds), tuple(range(max_seeds))
    require(table.protocol is None, f"scale={table.scale} follows {table.protocol}, which fixes when it ends")
    design = replace(table.design, seeds=seeds, looks=tuple(range(first, max_seeds + 1)), until_decided=True)
    return replace(table, design=design, seeds=seeds)


class OneOfEach(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses a key that is there twice, of which YAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        seen: set = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else id(key)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A mapping, without keys that are null."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), OneOfEach)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    require(isinstance(content, dict), f"{path} has no keys")
    return {key: value for key, value in content.items() if value is not None}
