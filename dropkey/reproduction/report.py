"""The report of a table: Markdown, HTML with the pictures inside, LaTeX, CSV and JSON.

The text is in templates/; the HTML page is the Markdown report, rendered by markdown-it. The same records give the
same bytes.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Optional

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from dropkey.metrics import Metric
from dropkey.records import replace_file
from dropkey.reproduction import pictures
from dropkey.reproduction.comparison import Cell, Comparison
from dropkey.reproduction.statistics import LEVEL, Difference, least_p

NONE, UNKNOWN = "–", "not known"
TEMPLATES = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
OPTIONS = {"loader": TEMPLATES, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
NOT_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "≤": r"$\le$",
}


def write(comparison: Comparison, directory: Path) -> str:
    """Writes report.md, .html, .tex, .csv, .json and the pictures into `directory`; returns the Markdown."""
    drawn = {"forest.svg": pictures.forest(comparison), "curves.svg": pictures.curves(comparison)}
    if any(entry.get("heads") for entry in comparison.done):
        drawn["entropy.svg"] = pictures.entropy(comparison)
    text = markdown(comparison, drawn)
    files = {
        "report.md": text,
        "report.html": page(comparison.table.title, text, drawn),
        "report.tex": latex(comparison),
        "report.csv": comma_separated(comparison),
        "report.json": as_json(comparison),
        **drawn,
    }
    for name, content in files.items():
        replace_file(directory / name, lambda file, content=content: file.write(content.encode()))
    return text


def markdown(comparison: Comparison, drawn: dict[str, str]) -> str:
    table, findings = comparison.table, comparison.findings
    watched = {{"val": "validation"}.get(entry["watched"], entry["watched"]) for entry in comparison.done}
    compared = [cell.to_baseline for cell in comparison.cells.values() if cell.to_baseline]
    pairs = max((one.n for one in compared), default=0)
    environment = jinja2.Environment(**OPTIONS)
    environment.filters |= {"cell": escape_markdown, "named": named, "in_units": in_units}
    text = environment.get_template("report.md.j2").render(
        table=table,
        metric=comparison.metric,
        drawn=drawn,
        mixed=comparison.mixed,
        about=about(comparison),
        overview=overview(comparison),
        overview_caption=overview_caption(comparison),
        claims=claims(comparison) if findings else None,
        tested=sum(found.difference is not None and found.difference.adjusted is not None for found in findings),
        differences={column: differences(comparison, column) for column in table.columns},
        pairs=pairs,
        least_p=p_value(least_p(pairs)),
        needed=next(n for n in range(1, 30) if least_p(n) <= 1 - LEVEL),
        compared=len(compared),
        entropy=any(entry.get("entropy") is not None for entry in comparison.done),
        watched=" or ".join(sorted(watched)) or "validation",
        unfinished=[escape_markdown(line) for line in unfinished(comparison)],
        provenance=provenance(comparison),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def page(title: str, text: str, drawn: dict[str, str]) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def figure(found: re.Match) -> str:
        return f'<figure>\n<svg role="img" aria-label="{found[2]}"{drawn[found[1]].partition("<svg")[2]}</figure>'

    body = re.sub(r'<p><img src="(\w+\.svg)" alt="([^"]*)" /></p>', figure, body)
    template = jinja2.Environment(autoescape=True, **OPTIONS).get_template("report.html.j2")
    return template.render(title=title, body=Markup(body))


def latex(comparison: Comparison) -> str:
    """A booktabs table: for each column of ours the mean and deviation, and the paired difference with its interval."""
    table, rows = comparison.table, []
    for row in table.rows:
        cells = [comparison.cells[row, column] for column in table.columns]
        ours = [
            text for cell in cells for text in (mean(cell, comparison.metric), in_brackets(cell, comparison.metric))
        ]
        rows.append([row, *ours, *papers(comparison, row)])
    caption = f"{table.title}. {about(comparison)} {overview_caption(comparison)}".replace("`", "")
    marks = {"variable_start_string": "<<", "variable_end_string": ">>", "block_start_string": "<%"}
    environment = jinja2.Environment(**OPTIONS, **marks, block_end_string="%>", finalize=escape_latex)
    environment.filters["named"] = named
    template = environment.get_template("report.tex.j2")
    return template.render(table=table, metric=comparison.metric, rows=rows, caption=caption)


def comma_separated(comparison: Comparison) -> str:
    """A line per cell and seed."""
    metrics = [metric.key for metric in comparison.metrics]
    keys = [
        "row",
        "column",
        "seed",
        "state",
        "reason",
        *metrics,
        "train_loss",
        "entropy",
        "epochs",
        "seconds",
        "samples",
    ]
    keys += ["monte_carlo", "facts", "run", "code", "data", "commit", "torch", "hardware"]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in comparison.records:
        writer.writerow({**entry, "code": " ".join(f"{part}:{one}" for part, one in entry.get("code", {}).items())})
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Every number of the report, and every record without its curves."""
    table = comparison.table
    content = {
        "table": table.name,
        "scale": table.scale,
        "title": table.title,
        "baseline": table.baseline,
        "overrides": comparison.overrides,
        "metrics": [dataclasses.asdict(metric) for metric in comparison.metrics],
        "paper": table.paper,
        "cells": [dataclasses.asdict(cell) for cell in comparison.cells.values()],
        "claims": [{**dataclasses.asdict(found), "claim": str(found.claim)} for found in comparison.findings],
        "mixed": comparison.mixed,
        "runs": [{k: v for k, v in entry.items() if k not in ("curve", "heads")} for entry in comparison.records],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------- numbers and names


def number(value: Optional[float], digits: int, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def interval(one: Difference, digits: int) -> str:
    return NONE if one.low is None else f"[{number(one.low, digits, '+')}, {number(one.high, digits, '+')}]"


def p_value(p: Optional[float]) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}".rstrip("0").rstrip(".") if p < 1 else "1"


def mean(cell: Cell, metric: Metric) -> str:
    """mean ± sample deviation (n), or (3/5) where seeds are missing"""
    done, seeds = len(cell.values), len(cell.values) + len(cell.unfinished)
    count = f"({done})" if done == seeds else f"({done}/{seeds})"
    if cell.estimate is None:
        return f"{NONE} {count}"
    spread = "" if cell.estimate.deviation is None else f" ± {number(cell.estimate.deviation, metric.digits)}"
    return f"{number(cell.estimate.mean, metric.digits)}{spread} {count}"


def in_brackets(cell: Cell, metric: Metric) -> str:
    one = cell.to_baseline
    return f"{number(one.mean, metric.digits, '+')} {interval(one, metric.digits)}" if one else NONE


def named(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def in_units(metric: Metric) -> str:
    """What a difference of this metric is measured in."""
    unit = "percentage points" if metric.unit == "%" else metric.unit
    return f"{metric.label} ({unit})" if unit else metric.label


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*|<])", r"\\\1", text)


def escape_latex(value) -> str:
    return "".join(NOT_LATEX.get(char, char) for char in str(value))


# ------------------------------------------------------------------------------------------- tables of the report


def overview(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    table = comparison.table
    head = ["", *[f"ours: {column}" for column in table.columns], *[f"paper: {column}" for column in table.paper]]
    rows = []
    for row in table.rows:
        ours = [mean(comparison.cells[row, column], comparison.metric) for column in table.columns]
        rows.append([row, *ours, *papers(comparison, row)])
    return head, rows


def papers(comparison: Comparison, row: str) -> list[str]:
    values = [results.get(row) for results in comparison.table.paper.values()]
    return [UNKNOWN if value is None else number(value, comparison.metric.digits) for value in values]


def claims(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    several = len(comparison.table.columns) > 1
    head = ["claim", *["column"] * several, "difference", "95 % interval", "seeds", "t-test p, Holm", "verdict"]
    rows, digits = [], comparison.metric.digits
    for found in comparison.findings:
        one = found.difference
        numbers = [NONE] * 4
        if one:
            numbers = [number(one.mean, digits, "+"), interval(one, digits), str(one.n), p_value(one.adjusted)]
        rows.append([str(found.claim), *[found.column] * several, *numbers, found.verdict])
    return head, rows


def differences(comparison: Comparison, column: str) -> tuple[list[str], list[list[str]]]:
    digits, cells = comparison.metric.digits, comparison.column(column)
    others = {metric.key: (named(metric), metric.digits) for metric in comparison.metrics[1:]}
    others["train_loss"] = ("training loss", 3)
    if any(cell.others["entropy"] for cell in cells):
        others["entropy"] = ("entropy", 3)
    head = ["", "difference", "95 % interval", "sign-flip p", "Holm", *(label for label, _ in others.values())]
    rows = []
    for cell in cells:
        one, numbers = cell.to_baseline, [NONE] * 4
        if cell.row == comparison.table.baseline:
            numbers = ["baseline", "", "", ""]
        elif one:
            p = f"{p_value(one.p)} (least {p_value(one.least_p)})"
            numbers = [number(one.mean, digits, "+"), interval(one, digits), p, p_value(one.adjusted)]
        found = [(cell.others[key], digits) for key, (_, digits) in others.items()]
        rows.append([cell.row, *numbers, *(number(one and one.mean, digits) for one, digits in found)])
    return head, rows


# --------------------------------------------------------------------------------------------------------- sentences


def about(comparison: Comparison) -> str:
    table = comparison.table
    runs = "; ".join(f"{column}: {trainings(comparison, column)}" for column in table.columns)
    overrides = f" Overrides of every run: `{' '.join(comparison.overrides)}`." if comparison.overrides else ""
    return f"Scale `{table.scale}`: {table.about}. Ours is {runs}.{overrides}"


def trainings(comparison: Comparison, column: str) -> str:
    """Data, resolution and length of the baseline's training, and the rows that were trained in another way."""
    facts = {entry["row"]: entry["facts"] for entry in comparison.records if entry["column"] == column}
    usual = facts[comparison.table.baseline]
    others: dict[str, list[str]] = {}
    for label, row in comparison.table.rows.items():
        if facts[label] != usual:
            start = f", starting from the runs of '{row.of}'" if row.of else ""
            others.setdefault(facts[label] + start, []).append(f"'{label}'")
    return "; ".join([usual, *(f"{' and '.join(labels)}: {how}" for how, labels in others.items())])


def overview_caption(comparison: Comparison) -> str:
    text = "Mean ± sample standard deviation over seeds (number of seeds)."
    means = [cell.estimate.mean for cell in comparison.cells.values() if cell.estimate]
    if comparison.metric.proportion and means:
        share, count = sum(means) / len(means) / 100, min(entry["samples"] for entry in comparison.done)
        error = number(100 * math.sqrt(share * (1 - share) / count), 2)
        text += f" The choice of the {count:,} test samples adds ± {error} (binomial standard error), which is the same"
        text += " for all rows and not in the deviations."
    if comparison.table.paper:
        text += " The paper's numbers are from other models, resolutions and trainings: compare orders, not values."
    return text


def unfinished(comparison: Comparison) -> list[str]:
    found = []
    for (row, column), cell in comparison.cells.items():
        for state, reason in dict.fromkeys(cell.unfinished.values()):
            seeds = ", ".join(str(seed) for seed, how in cell.unfinished.items() if how == (state, reason))
            place = f"{row}, {column}" if len(comparison.table.columns) > 1 else row
            found.append(f"{place}, seed {seeds}: {state}{': ' + reason if reason else ''}")
    return found


def provenance(comparison: Comparison) -> list[str]:
    done = comparison.done
    if not done:
        return ["no run is finished yet"]

    def counted(values: list[str]) -> str:
        counts = Counter(values)
        return values[0] if len(counts) == 1 else ", ".join(f"{value} ({n} cells)" for value, n in counts.items())

    parts = sorted({part for entry in done for part in entry["code"]})
    code = [f"{part} {counted([e['code'][part] for e in done if part in e['code']])}" for part in parts]
    trained = {entry["run"]: entry["seconds"] for entry in done}
    return [
        f"code: {', '.join(code)}",
        *(f"{key}: {counted([str(entry[key]) for entry in done])}" for key in ("commit", "torch", "hardware", "data")),
        f"{len(trained)} runs, {sum(trained.values()) / 3600:.1f} hours of training in total",
        f"{len(done)} of {len(comparison.records)} cells and seeds finished",
    ]
