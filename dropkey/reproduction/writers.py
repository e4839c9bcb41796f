"""The report in the formats people need: Markdown, LaTeX, CSV, JSON, and one HTML page with the pictures inside.

All are functions of the records alone: made again, they are the same to the byte.
"""

import csv
import dataclasses
import html
import io
import json
import re
from pathlib import Path

from dropkey.records import replace_file
from dropkey.reproduction import document, pictures
from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.document import Grid, Heading, Items, Paragraph, Picture

CSV_KEYS = (
    *("row", "column", "seed", "state", "reason", "top1", "top5", "loss", "ece", "train_loss", "entropy", "epochs"),
    *("seconds", "images", "monte_carlo", "facts", "run", "code", "data", "commit", "torch", "hardware"),
)


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """report.md, .tex, .csv, .json, .html and the pictures in `directory`; returns their paths."""
    blocks = document.build(comparison)
    drawings = {"forest.svg": pictures.forest, "curves.svg": pictures.curves, "entropy.svg": pictures.entropy}
    wanted = [block.file for block in blocks if isinstance(block, Picture)]
    drawn = {name: drawings[name](comparison) for name in wanted}
    files = {
        "report.md": markdown(blocks),
        "report.html": page(blocks, drawn),
        "report.tex": latex(comparison),
        "report.csv": comma_separated(comparison.records),
        "report.json": as_json(comparison),
        **drawn,
    }
    for name, text in files.items():
        replace_file(directory / name, lambda file, text=text: file.write(text.encode()))
    return [directory / name for name in files]


# -------------------------------------------------------------------------------------------------------- Markdown


def markdown(blocks: list[document.Block]) -> str:
    return "\n\n".join(markdown_block(block) for block in blocks) + "\n"


def markdown_block(block: document.Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Picture(file, caption):
            return f"![{caption}]({file})\n\n{caption}"
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Grid(head, rows):
            escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
            lines = [f"| {' | '.join(row)} |" for row in escaped]
            return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


# ------------------------------------------------------------------------------------------------------------ HTML

STYLE = """
:root { color-scheme: light; --ink: #1a1c1f; --soft: #5c636e; --line: #d9dde3; --band: #f5f7f9; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; }
p { max-width: 46rem; } code { font-size: .9em; background: var(--band); padding: .1em .3em; border-radius: 3px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { border-bottom: 2px solid var(--ink); }
tbody tr:hover { background: var(--band); } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, p.note { color: var(--soft); font-size: .9rem; }
"""


def page(blocks: list[document.Block], drawn: dict[str, str]) -> str:
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(html_block(block, drawn) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def html_block(block: document.Block, drawn: dict[str, str]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{inline(text)}</p>"
        case Picture(file, caption):
            label = f'<svg role="img" aria-label="{html.escape(caption)}"'
            drawing = label + drawn[file].partition("<svg")[2]
            return f"<figure>\n{drawing}<figcaption>{inline(caption)}</figcaption>\n</figure>"
        case Items(texts):
            return "<ul>\n" + "\n".join(f"<li>{inline(text)}</li>" for text in texts) + "\n</ul>"
        case Grid(head, rows):
            top = "".join(f"<th>{inline(cell)}</th>" for cell in head)
            lines = ["<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows]
            whole = f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
            return f'<div class="wide"><table>\n{whole}\n</table></div>'


def inline(text: str) -> str:
    """The marks that our texts use: `code`, **strong**, *emphasis*."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


# ----------------------------------------------------------------------------------------------------------- LaTeX

LATEX = {
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


def escape(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def latex(comparison: Comparison) -> str:
    """A booktabs table: per column of ours the mean and deviation, and the paired difference with its interval; the
    paper's columns have their names in two lines, as they are wider than their numbers."""
    table = comparison.table
    ours = [f"\\multicolumn{{2}}{{c}}{{{escape(column)}}}" for column in table.columns]
    theirs = [[escape(part.strip()) for part in column.partition(",")[::2]] for column in table.paper]
    under = ["top-1 (\\%)", "difference"] * len(ours)
    lines = []
    for row in table.rows:
        parts = [escape(row)]
        for column in table.columns:
            cell = comparison.cells[row, column]
            one = cell.to_baseline
            shown = f"{document.signed(one.mean)} {document.interval(one.low, one.high)}" if one else document.NONE
            parts += [escape(document.top1(cell)), escape(shown)]
        for column in table.paper:
            value = table.paper[column].get(row)
            parts.append(document.UNKNOWN if value is None else document.number(value))
        lines.append(" & ".join(parts) + r" \\")
    caption = f"{table.title}. {document.what_was_run(comparison)} {document.overview_caption(comparison)}"
    rules = [f"\\cmidrule(lr){{{2 + 2 * i}-{3 + 2 * i}}}" for i in range(len(ours))]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            r"\setlength{\belowcaptionskip}{6pt}\setlength{\tabcolsep}{4pt}",
            f"\\caption{{{escape(caption.replace('`', ''))}}}",
            f"\\label{{tab:{table.slug}}}",
            f"\\begin{{tabular}}{{l{'rr' * len(ours)}{'r' * len(theirs)}}}",
            r"\toprule",
            " & ".join(["", *ours, *(f"paper: {name}" for name, _ in theirs)]) + r" \\",
            " ".join(rules),
            " & ".join(["", *under, *(rest for _, rest in theirs)]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


# ------------------------------------------------------------------------------------------------------ CSV, JSON


def comma_separated(records: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_KEYS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything in the report as numbers, and every seed's record but for its curves."""
    table = comparison.table
    content = {
        "table": table.name,
        "scale": table.scale,
        "title": table.title,
        "baseline": table.baseline,
        "extra": comparison.extra,
        "paper": table.paper,
        "cells": [dataclasses.asdict(cell) for cell in comparison.cells.values()],
        "claims": [
            {"claim": str(found.claim), **{k: v for k, v in dataclasses.asdict(found).items() if k != "claim"}}
            for found in comparison.findings
        ],
        "mixed": comparison.mixed,
        "runs": [{k: v for k, v in entry.items() if k not in ("curve", "heads")} for entry in comparison.records],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
