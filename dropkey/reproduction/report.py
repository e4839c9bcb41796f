"""The report of a table: Markdown, HTML with the pictures inside, LaTeX, CSV and JSON.

The text is in templates/; the HTML page is the Markdown report, rendered by markdown-it. The same records give the
same bytes.
"""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from dropkey.records import replace_file
from dropkey.reproduction import content, pictures
from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.statistics import LEVEL, least_p

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
    for name, written in files.items():
        replace_file(directory / name, lambda file, written=written: file.write(written.encode()))
    return text


def markdown(comparison: Comparison, drawn: dict[str, str]) -> str:
    table, findings = comparison.table, comparison.findings
    watched = {{"val": "validation"}.get(entry["watched"], entry["watched"]) for entry in comparison.done}
    compared = [cell.to_baseline for cell in comparison.cells.values() if cell.to_baseline]
    pairs = max((one.n for one in compared), default=0)
    environment = jinja2.Environment(**OPTIONS)
    environment.filters |= {"cell": escape_markdown, "named": content.named, "in_units": content.in_units}
    text = environment.get_template("report.md.j2").render(
        table=table,
        metric=comparison.metric,
        drawn=drawn,
        mixed=comparison.mixed,
        about=content.about(comparison),
        overview=content.overview(comparison),
        overview_caption=content.overview_caption(comparison),
        claims=content.claims(comparison) if findings else None,
        tested=sum(found.difference is not None and found.difference.adjusted is not None for found in findings),
        differences={column: content.differences(comparison, column) for column in table.columns},
        pairs=pairs,
        least_p=content.p_value(least_p(pairs)),
        needed=next(n for n in range(1, 30) if least_p(n) <= 1 - LEVEL),
        compared=len(compared),
        entropy=any(entry.get("entropy") is not None for entry in comparison.done),
        watched=" or ".join(sorted(watched)) or "validation",
        unfinished=[escape_markdown(line) for line in content.unfinished(comparison)],
        provenance=content.provenance(comparison),
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
    table, metric, rows = comparison.table, comparison.metric, []
    for row in table.rows:
        cells = [comparison.cells[row, column] for column in table.columns]
        ours = [show(cell, metric) for cell in cells for show in (content.mean, content.in_brackets)]
        rows.append([row, *ours, *content.papers(comparison, row)])
    caption = f"{table.title}. {content.about(comparison)} {content.overview_caption(comparison)}".replace("`", "")
    marks = {"variable_start_string": "<<", "variable_end_string": ">>", "block_start_string": "<%"}
    environment = jinja2.Environment(**OPTIONS, **marks, block_end_string="%>", finalize=escape_latex)
    environment.filters["named"] = content.named
    template = environment.get_template("report.tex.j2")
    return template.render(table=table, metric=metric, rows=rows, caption=caption)


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
    whole = {
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
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*|<])", r"\\\1", text)


def escape_latex(value) -> str:
    return "".join(NOT_LATEX.get(char, char) for char in str(value))
