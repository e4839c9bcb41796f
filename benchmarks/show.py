"""Measurements as a Markdown table and as a picture."""

import itertools
import math
from pathlib import Path


def setting(row: dict) -> str:
    """What a row was measured on."""
    if "shape" in row:
        return " × ".join(map(str, row["shape"])) + f", {row['dtype']}"
    compiled = ", compiled" if row["compiled"] else ""
    return f"{row['model']} at {row['pixels']} pixels, batch {row['batch']}, {row['dtype']}{compiled}"


def table(rows: list[dict]) -> str:
    """Markdown: one block per shape and dtype."""
    lines = []
    for told, group in itertools.groupby(rows, setting):
        lines += ["", f"**{told}**", "", "| | ms | ratio | quartiles | MiB | error of output, gradients |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in group:
            if "failed" in row:
                lines.append(f"| {row['way']} | {row['failed']} | | | | |")
                continue
            low, high = row["quartiles"]
            off = row.get("error", {})
            off = f"{off['output']:.1e}, {off['gradients']:.1e}" if off else ""
            told = f"{row['ms']:.2f} | {row['ratio']:.2f} | {low:.2f}–{high:.2f} | {row.get('MiB', '')} | {off}"
            lines.append(f"| {row['way']} | {told} |")
    return "\n".join(lines[1:])


def picture(rows: list[dict], path: Path, title: str) -> None:
    """Ratios to plain attention as horizontal bars, one panel per setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "failed" not in row]
    settings = [list(group) for _, group in itertools.groupby(rows, setting)]
    columns = min(3, len(settings))
    lines = math.ceil(len(settings) / columns)
    height = 0.9 + 0.3 * max(len(group) for group in settings)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns + 1.5, height * lines), squeeze=False, sharey=True
    )
    for axis, group in itertools.zip_longest(axes.flat, settings):
        if group is None:
            axis.axis("off")
            continue
        for place, row in enumerate(group):
            low, high = row["quartiles"]
            colour = "#888888" if place == 0 else "#c0392b" if place == 1 else "#9fb8d0"
            axis.barh(place, row["ratio"], color=colour, height=0.7)
            axis.plot([low, high], [place, place], color="black", linewidth=1)
            axis.text(max(row["ratio"], high) + 0.04, place, f"{row['ratio']:.2f}", va="center", fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(group)), [row["way"] for row in group], fontsize=8)
        axis.set_xlim(0, 1.18 * max(row["ratio"] for row in group) + 0.1)
        axis.set_title(setting(group[0]), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def summary(rows: list[dict], dtypes: tuple[str, ...]) -> str:
    """Markdown: a row for each way, a column for each shape and dtype, ratios alone. What the README shows."""
    rows = [row for row in rows if row["dtype"] in dtypes]
    settings, ways = ([*dict.fromkeys(row[key] for row in cells)] for key, cells in (("on", on(rows)), ("way", rows)))
    ratios = {(row["way"], row["on"]): f"{row['ratio']:.2f}" for row in on(rows) if "failed" not in row}
    lines = ["| " + " | ".join(["B × H × N × D", *settings]) + " |", "|---" * (len(settings) + 1) + "|"]
    lines += ["| " + " | ".join([way, *(ratios.get((way, place), "–") for place in settings)]) + " |" for way in ways]
    return "\n".join(lines)


def on(rows: list[dict]) -> list[dict]:
    return [{**row, "on": setting(row)} for row in rows]
