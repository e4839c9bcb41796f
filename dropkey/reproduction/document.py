"""The report as blocks (headings, paragraphs, tables, lists, pictures), which Markdown and HTML write in their ways."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Optional

from dropkey.reproduction.comparison import Cell, Comparison, Finding
from dropkey.reproduction.statistics import AGREES, DISAGREES, LEVEL, Difference, least_p

UNKNOWN = "not known"
ENTROPY = (
    "Entropy of attention over depth in evaluation, as a share of that of uniform attention; mean over heads and "
    "seeds, bars are ± one sample standard deviation over seeds."
)
NONE = "–"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Grid:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Items:
    texts: list[str]


@dataclass(frozen=True)
class Picture:
    file: str
    caption: str


Block = Heading | Paragraph | Grid | Items | Picture


def build(comparison: Comparison) -> list[Block]:
    table = comparison.table
    blocks: list[Block] = [
        Heading(table.title, 1),
        Paragraph(f"{table.asks} Paper: {table.figure}."),
        Paragraph(what_was_run(comparison)),
    ]
    if comparison.mixed:
        blocks.append(Paragraph(f"**Mixed on request, so compare with care: {'; '.join(comparison.mixed)}.**"))
    blocks += [Heading("Top-1 on the test split, last epoch (%)"), overview(comparison)]
    blocks.append(Paragraph(overview_caption(comparison)))
    if table.claims:
        blocks += [Heading("The paper's claims"), claims(comparison.findings, len(table.columns))]
        blocks.append(Paragraph(rule(comparison.findings)))
    blocks.append(Heading(f"Differences to '{table.baseline}'"))
    blocks.append(Picture("forest.svg", "Differences in top-1, paired by seed, with 95 % t-intervals; dots are seeds."))
    for column in table.columns:
        if len(table.columns) > 1:
            blocks.append(Heading(column, 3))
        blocks.append(differences(comparison, column))
    blocks.append(Paragraph(differences_caption(comparison)))
    blocks.append(Heading("Training"))
    blocks.append(Picture("curves.svg", curves_caption(comparison)))
    if any(entry.get("heads") for entry in comparison.done):
        blocks += [Heading("Attention"), Picture("entropy.svg", ENTROPY)]
    lacking = unfinished(comparison)
    if lacking:
        blocks += [Heading("Not there yet"), Items(lacking)]
    return [*blocks, Heading("Made with"), Items(provenance(comparison))]


# --------------------------------------------------------------------------------------------------------- numbers


def number(value: Optional[float], digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(low: Optional[float], high: Optional[float]) -> str:
    return NONE if low is None else f"[{signed(low)}, {signed(high)}]"


def small(p: Optional[float]) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}".rstrip("0").rstrip(".") if p < 1 else "1"


def of_all(cell: Cell) -> str:
    """3/5, or 5 where none is missing."""
    done, all_seeds = len(cell.values), len(cell.values) + len(cell.unfinished)
    return str(done) if done == all_seeds else f"{done}/{all_seeds}"


def top1(cell: Cell) -> str:
    """mean ± sample deviation (n)"""
    if cell.top1 is None:
        return f"{NONE} ({of_all(cell)})"
    spread = "" if cell.top1.deviation is None else f" ± {number(cell.top1.deviation)}"
    return f"{number(cell.top1.mean)}{spread} ({of_all(cell)})"


# ---------------------------------------------------------------------------------------------------------- parts


def what_was_run(comparison: Comparison) -> str:
    table = comparison.table
    runs = "; ".join(f"{column}: {trainings(comparison, column)}" for column in table.columns)
    extra = f" Laid over every run: `{' '.join(comparison.extra)}`." if comparison.extra else ""
    return f"Scale `{table.scale}`: {table.about}. Ours is {runs}.{extra}"


def trainings(comparison: Comparison, column: str) -> str:
    """Data, resolution and length of the baseline's training, and the rows that were trained in another way."""
    facts = {entry["row"]: entry["facts"] for entry in comparison.records if entry["column"] == column}
    usual = facts[comparison.table.baseline]
    others: dict[str, list[str]] = {}
    for name, row in comparison.table.rows.items():
        if facts[name] != usual:
            start = f", starting from the runs of '{row.of}'" if row.of else ""
            others.setdefault(facts[name] + start, []).append(f"'{name}'")
    return "; ".join([usual, *(f"{' and '.join(names)}: {how}" for how, names in others.items())])


def overview(comparison: Comparison) -> Grid:
    table = comparison.table
    head = ["", *[f"ours: {column}" for column in table.columns], *[f"paper: {column}" for column in table.paper]]
    rows = []
    for row in table.rows:
        ours = [top1(comparison.cells[row, column]) for column in table.columns]
        theirs = [number(table.paper[column].get(row)) for column in table.paper]
        rows.append([row, *ours, *[UNKNOWN if text == NONE else text for text in theirs]])
    return Grid(head, rows)


def overview_caption(comparison: Comparison) -> str:
    text = "Mean ± sample standard deviation over seeds (number of seeds)."
    images = {entry["images"] for entry in comparison.done}
    if images:
        accuracies = [cell.top1.mean for cell in comparison.cells.values() if cell.top1 is not None]
        share, count = sum(accuracies) / len(accuracies) / 100, min(images)
        error = 100 * math.sqrt(share * (1 - share) / count)
        text += f" The choice of the {count:,} test images alone is worth ± {error:.2f} (binomial standard error)"
        text += ", which is the same for all rows and not in the deviations."
    if comparison.table.paper:
        text += " The paper's numbers are of other models, sizes of images and trainings: compare orders, not values."
    return text


def claims(findings: list[Finding], columns: int) -> Grid:
    head = [
        "claim",
        *(["column"] if columns > 1 else []),
        "difference",
        "95 % interval",
        "seeds",
        "t-test p, Holm",
        "verdict",
    ]
    rows = []
    for found in findings:
        one = found.difference
        middle = [signed(one.mean), interval(one.low, one.high), str(one.n), small(one.adjusted)] if one else [NONE] * 4
        rows.append([str(found.claim), *([found.column] if columns > 1 else []), *middle, found.verdict])
    return Grid(head, rows)


def rule(findings: list[Finding]) -> str:
    tested = sum(found.difference is not None and found.difference.adjusted is not None for found in findings)
    return (
        f"The verdict is *{AGREES}* where the difference is positive and its paired t-test, adjusted by Holm over the "
        f"{tested} claims tested here, has p ≤ {1 - LEVEL:.2f}; *{DISAGREES}* where it is negative with such a "
        "p; otherwise the runs *cannot tell yet*. With a few seeds a t-test leans on differences being normally "
        "distributed. The verdict speaks of these runs, not of the paper's models and data."
    )


def differences(comparison: Comparison, column: str) -> Grid:
    entropy = any(cell.others["entropy"] for cell in comparison.column(column))
    head = ["", "difference", "95 % interval", "sign-flip p", "Holm", "test loss", "ECE (%)"]
    head += ["training loss", *(["entropy"] if entropy else [])]
    keys = ("loss", "ece", "train_loss", *(("entropy",) if entropy else ()))
    rows = []
    for cell in comparison.column(column):
        others = [number(found.mean, 1 if key == "ece" else 3) if (found := cell.others[key]) else NONE for key in keys]
        one = cell.to_baseline
        if cell.row == comparison.table.baseline:
            rows.append([cell.row, "baseline", "", "", "", *others])
        elif one is None:
            rows.append([cell.row, *[NONE] * 4, *others])
        else:
            tests = [with_least(one), small(one.adjusted)]
            rows.append([cell.row, signed(one.mean), interval(one.low, one.high), *tests, *others])
    return Grid(head, rows)


def with_least(one: Difference) -> str:
    return f"{small(one.p)} (least {small(one.least_p)})"


def differences_caption(comparison: Comparison) -> str:
    pairs = max((cell.to_baseline.n for cell in comparison.cells.values() if cell.to_baseline), default=0)
    text = (
        "Percentage points of top-1, paired by seed: runs of one seed share initialisation and order of the data. "
        "Intervals are 95 % t-intervals, each by itself. The sign-flip p is exact, two-sided"
    )
    if pairs:
        text += f"; with {pairs} {'pair' if pairs == 1 else 'pairs'} it cannot be below {small(least_p(pairs))}"
        needed = next(n for n in range(1, 30) if least_p(n) <= 1 - LEVEL)
        text += "" if pairs >= needed else f", and below {1 - LEVEL:.2f} only from {needed} seeds on"
    tests = sum(cell.to_baseline is not None for cell in comparison.cells.values())
    text += f". Holm: adjusted over the {tests} differences of this table. ECE: expected calibration error."
    if any(entry.get("entropy") is not None for entry in comparison.done):
        text += (
            " Entropy: of attention in evaluation, as a share of that of uniform attention, mean over heads and layers."
        )
    return text


def curves_caption(comparison: Comparison) -> str:
    watched = sorted({{"val": "validation"}.get(entry["watched"], entry["watched"]) for entry in comparison.done})
    split = " or ".join(watched) or "validation"
    return f"Training loss and top-1 on the {split} split, mean over seeds; bands are ± one sample standard deviation."


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
        return ["no run is done yet"]

    def counted(key: str) -> str:
        counts = Counter(str(entry[key]) for entry in done)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{k} ({n} cells)" for k, n in counts.items())

    trained = {entry["run"]: entry["seconds"] for entry in done}
    hours = sum(trained.values()) / 3600
    return [
        f"code {counted('code')}, commit {counted('commit')}",
        f"torch {counted('torch')} on {counted('hardware')}",
        f"data {counted('data')}",
        f"{len(trained)} runs, {hours:.1f} hours of training in all",
        f"{len(done)} of {len(comparison.records)} cells and seeds done",
    ]
