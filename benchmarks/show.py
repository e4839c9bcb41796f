"""Measurements as Markdown tables and as a picture."""

import itertools
import math
from pathlib import Path

from dropkey.plotting import COLORS, GREY, save, style, subplots


def setting(row: dict) -> str:
    """What a row was measured on."""
    if "shape" in row:
        return " × ".join(map(str, row["shape"])) + f", {row['dtype']}"
    compiled = ", compiled" if row["compiled"] else ""
    return f"{row['model']} at {row['pixels']} pixels, batch {row['batch']}, {row['dtype']}{compiled}"


def table(rows: list[dict]) -> str:
    """Markdown with everything measured: one block per setting."""
    lines = []
    for title, group in itertools.groupby(rows, setting):
        lines += ["", f"**{title}**", "", "| | ms | ratio | quartiles | MiB | error of output, gradients |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in group:
            if "failed" in row:
                lines.append(f"| {row['way']} | {row['failed']} | | | | |")
                continue
            low, high = row["quartiles"]
            error = "{output:.1e}, {gradients:.1e}".format(**row["error"]) if "error" in row else ""
            figures = f"{row['ms']:.2f} | {row['ratio']:.2f} | {low:.2f}–{high:.2f} | {row.get('MiB', '')} | {error}"
            lines.append(f"| {row['way']} | {figures} |")
    return "\n".join(lines[1:])


def summary(rows: list[dict], dtypes: tuple[str, ...]) -> str:
    """Markdown with the ratios alone, as in docs/operator.md: a row for each way, a column for each setting."""
    rows = [row for row in rows if row["dtype"] in dtypes]
    settings, ways = list(dict.fromkeys(map(setting, rows))), list(dict.fromkeys(row["way"] for row in rows))
    ratios = {(row["way"], setting(row)): f"{row['ratio']:.2f}" for row in rows if "failed" not in row}
    lines = ["| " + " | ".join(["B × H × N × D", *settings]) + " |", "|---" * (len(settings) + 1) + "|"]
    lines += ["| " + " | ".join([way, *(ratios.get((way, on), "–") for on in settings)]) + " |" for way in ways]
    return "\n".join(lines)


def picture(rows: list[dict], path: Path, title: str) -> None:
    """Ratios to plain attention as horizontal bars, one panel per setting."""
    rows = [row for row in rows if "failed" not in row]
    groups = [list(group) for _, group in itertools.groupby(rows, setting)]
    columns = min(3, len(groups))
    height = 0.9 + 0.3 * max(map(len, groups))
    with style():
        lines = math.ceil(len(groups) / columns)
        figure, axes = subplots(lines, columns, (4.2 * columns + 1.5, height * lines), sharey=True)
        for axis, group in itertools.zip_longest(axes.flat, groups):
            if group is None:
                axis.axis("off")
                continue
            for place, row in enumerate(group):
                low, high = row["quartiles"]
                axis.barh(place, row["ratio"], color=(GREY, COLORS[1])[place] if place < 2 else COLORS[0], height=0.7)
                axis.plot([low, high], [place, place], color="black", linewidth=1)
                text = axis.text(max(row["ratio"], high) + 0.04, place, f"{row['ratio']:.2f}", va="center", fontsize=8)
                text.set_in_layout(False)
            axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
            axis.set_yticks(range(len(group)), [row["way"] for row in group], fontsize=8)
            axis.set_xlim(0, 1.18 * max(row["ratio"] for row in group) + 0.1)
            axis.set_title(setting(group[0]))
        axes.flat[0].invert_yaxis()
        figure.suptitle(title, fontsize=10)
        save(figure, path)
