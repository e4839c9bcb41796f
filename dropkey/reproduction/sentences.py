"""The sentences of a report: what was run, what was planned, what is not finished, where it comes from."""

import math
from collections import Counter
from collections.abc import Callable

from dropkey.reproduction import results
from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.content import number, verdict


def about(comparison: Comparison, show: Callable[[str], str] = str) -> str:
    """`show` escapes the names and texts of the table."""
    table = comparison.table
    runs = show("; ".join(f"{column}: {trainings(comparison, column)}" for column in table.columns))
    overrides = (
        f" Overrides of every run: {code(' '.join(comparison.head['overrides']))}."
        if comparison.head["overrides"]
        else ""
    )
    return f"Scale {code(table.scale)}: {show(table.about)}. Ours is {runs}.{overrides}"


def code(text: str) -> str:
    """As code in Markdown, with a fence that the text does not end."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def plan(comparison: Comparison) -> list[str]:
    """How many seeds were planned, by which protocol, and what speaks against a verdict that looks planned."""
    table, head = comparison.table, comparison.head
    looks, over = table.design.looks, comparison_seeds(comparison)
    text = f"Planned: {looks[-1]} seeds" if len(looks) == 1 else f"Planned: at most {looks[-1]} seeds"
    if len(looks) > 1:
        text += f", with a look at the claims after {listed(looks)}; the runs end when all are decided"
    found = [f"{text}. Finished: {over}."]
    if head["protocol"]:
        found.append(f"The study follows {code(table.protocol)} (hash `{head['protocol']}`).")
        if results.protocol_hash(table) != head["protocol"]:
            found.append(f"**The protocol was changed since, to hash `{results.protocol_hash(table)}`.**")
    if head["seen_before"]:
        found.append(f"**{head['seen_before']} of its runs were finished before this plan was first used.**")
    for earlier in head["earlier_designs"]:
        changed = [
            f"{key} {show_plan(earlier.get(key))}" for key, now in head["design"].items() if earlier.get(key) != now
        ]
        found.append(f"**The plan was changed after results had been seen: before, it had {'; '.join(changed)}.**")
    verdicts = [verdict(comparison, one) for one in comparison.findings]
    seen = head["looks"].get(str(comparison.look))
    if seen and len(seen) == len(verdicts) and seen != verdicts:
        found.append(f"**Runs were replaced after this look, whose verdicts were: {'; '.join(seen)}.**")
    return found


def comparison_seeds(comparison: Comparison) -> int:
    """How many seeds have finished in every row and column."""
    seeds = [set(cell.values) for cell in comparison.cells.values()]
    return len(set.intersection(*seeds)) if seeds else 0


def show_plan(value) -> str:
    """A part of a plan: numbers, or claims by their labels."""
    if isinstance(value, list):
        return listed([one[0] if isinstance(one, list) else one for one in value]) if value else "none"
    return str(value)


def listed(values) -> str:
    """5, 10 and 15; each of 5 to 20"""
    texts = list(map(str, values))
    numbers = [int(text) for text in texts if text.isdigit()]
    if len(numbers) == len(texts) > 4 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"each of {texts[0]} to {texts[-1]}"
    return f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else texts[0]


def error(comparison: Comparison) -> str:
    """One error estimate for the table, pooled over rows, and what pairing by seed removes."""
    one, several = comparison.error, len(comparison.table.columns) > 1
    if one is None:
        return ""
    spread = number(one.deviation, comparison.metric.digits)
    return (
        f"{'The mean over columns' if several else 'A run'} varies by {spread} "
        f"within its row and seed (pooled over rows, {one.df} degrees of freedom); pairing by seed removes "
        f"{100 * one.seed_share:.0f} % of the variance."
    )


def trainings(comparison: Comparison, column: str) -> str:
    """Data, resolution and length of the baseline's training, and the rows that were trained in another way."""
    facts = {entry["row"]: entry["facts"] for entry in comparison.records if entry["column"] == column}
    usual = facts.get(comparison.table.baseline, "not started")
    others: dict[str, list[str]] = {}
    for label, row in comparison.table.rows.items():
        if facts.get(label, usual) != usual:
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
    return [*found, *comparison.head.get("left_out", [])]


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
    tuned = [run["seconds"] for entry in comparison.head["tuning"] for run in entry["runs"].values() if run]
    return [
        f"code: {', '.join(code)}",
        *(f"{key}: {counted([str(entry[key]) for entry in done])}" for key in ("commit", "torch", "hardware", "data")),
        f"{len(trained)} runs, {sum(trained.values()) / 3600:.1f} hours of training in total",
        *([f"before these, {len(tuned)} runs of tuning, {sum(tuned) / 3600:.1f} hours"] if tuned else []),
        f"{len(done)} of {len(comparison.records)} cells and seeds finished",
    ]
