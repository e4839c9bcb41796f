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

from dropkey.page import page
from dropkey.records import replace_file
from dropkey.reproduction import content, pictures, sentences
from dropkey.reproduction.comparison import Comparison

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
    if comparison.findings:
        drawn["claims.svg"] = pictures.claims(comparison)
    if comparison.head["tuning"]:
        drawn["tuning.svg"] = pictures.tuning_budget(comparison)
    if any(entry.get("heads") for entry in comparison.done):
        drawn["entropy.svg"] = pictures.entropy(comparison)
    text = markdown(comparison, drawn)
    files = {
        "report.md": text,
        "report.html": html(comparison.table.title, text, drawn),
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
    environment = jinja2.Environment(**OPTIONS)
    environment.filters |= {
        "cell": escape_markdown,
        "line": escape_line,
        "code": sentences.code,
        "named": content.named,
        "in_units": content.in_units,
    }
    text = environment.get_template("report.md.j2").render(
        table=table,
        design=table.design,
        metric=comparison.metric,
        drawn=drawn,
        mixed=comparison.mixed,
        about=sentences.about(comparison, escape_markdown),
        overview=content.overview(comparison),
        overview_caption=sentences.overview_caption(comparison),
        recipes=content.recipes(comparison),
        columns=[[escape_markdown(column), " ".join(overrides)] for column, overrides in table.columns.items()],
        crowded=pictures.crowded(comparison),
        claims=content.claims(comparison) if findings else None,
        checks=content.checks(comparison) if findings else None,
        other_metrics=content.other_metrics(comparison) if findings and comparison.other_metrics else None,
        over_columns=content.over_columns(comparison) if comparison.summaries else None,
        candidates=content.candidates(comparison) if comparison.head["tuning"] else None,
        plan=sentences.plan(comparison),
        error=sentences.error(comparison),
        differences={column: content.differences(comparison, column) for column in table.columns},
        entropy=any(entry.get("entropy") is not None for entry in comparison.done),
        watched=" or ".join(sorted(watched)) or "validation",
        unfinished=[escape_line(line) for line in sentences.unfinished(comparison)],
        provenance=sentences.provenance(comparison),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def html(title: str, text: str, drawn: dict[str, str]) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def figure(found: re.Match) -> str:
        return f'<figure>\n<svg role="img" aria-label="{found[2]}"{drawn[found[1]].partition("<svg")[2]}</figure>'

    body = re.sub(r'<p><img src="(\w+\.svg)" alt="([^"]*)" /></p>', figure, body)
    return page(title, body)


def latex(comparison: Comparison) -> str:
    """A booktabs table: for each column of ours the mean and deviation, and the paired difference with its interval."""
    table, metric, rows = comparison.table, comparison.metric, []
    for row in table.rows:
        cells = [comparison.cells[row, column] for column in table.columns]
        ours = [show(cell, metric) for cell in cells for show in (content.mean, content.in_brackets)]
        rows.append([row, *ours, *content.papers(comparison, row)])
    caption = f"{table.title}. {sentences.about(comparison)} {sentences.overview_caption(comparison)}".replace("`", "")
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
        "overrides": comparison.head["overrides"],
        "design": comparison.head["design"],
        "tuning": comparison.head["tuning"],
        "protocol": comparison.head["protocol"],
        "metrics": comparison.head["metrics"],
        "paper": table.paper,
        "cells": [dataclasses.asdict(cell) for cell in comparison.cells.values()],
        "claims": [
            {**dataclasses.asdict(found), "claim": str(found.claim), "verdict": content.verdict(comparison, found)}
            for found in comparison.findings
        ],
        "over_columns": {
            claim: {
                "columns": {c: dataclasses.asdict(one) for c, one in found.items()},
                "summary": summary and vars(summary),
            }
            for claim, (found, summary) in comparison.summaries.items()
        },
        "mixed": comparison.mixed,
        "runs": [
            {key: value for key, value in entry.items() if key not in ("curve", "heads", "layers", "correct")}
            for entry in comparison.records
        ],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def escape_markdown(text: str) -> str:
    """Text as it is inside a line: no link, no emphasis, no entity, no HTML."""
    return re.sub(r"([\\`*|<]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", text)


def escape_line(text: str) -> str:
    """The same at the start of a line: no heading, list or quotation."""
    return re.sub(r"^(\d*)([#>+=~.)-])", r"\1\\\2", escape_markdown(text))


def escape_latex(value) -> str:
    return "".join(NOT_LATEX.get(char, char) for char in str(value))
