"""Simulated tables: how often the designs of dropkey/reproduction/sequential.py find what is not there, and what is.

    python benchmarks/simulate_tables.py

takes a minute or two on one core and writes benchmarks/results/simulated-tables.{md,json}. A table has rows for a
baseline and m others, with independent noise per seed; its m claims are the rows minus the baseline, with a deviation
of 1.19 points between seeds, as measured in 76 small runs.
"""

import datetime
import itertools
import json
import math
import platform
import sys
from pathlib import Path

import numpy as np
import scipy
from scipy.special import stdtr, stdtrit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dropkey.reproduction.sequential import boundaries, decide, least_alphas  # noqa: E402
from dropkey.reproduction.statistics import mean_squares, over_columns  # noqa: E402

COMMAND, RESULTS = "python benchmarks/simulate_tables.py", ROOT / "benchmarks" / "results" / "simulated-tables"
SEED, TABLES, MOST = 0, 10_000, 20
DEVIATION, ALPHA, MARGIN = 1.19, 0.05, 1.0  # points; the margin is of the equivalence tests
EACH, FOUR = tuple(range(5, MOST + 1)), (5, 10, 15, MOST)
PEEKING, CALIBRATED, KNOWN = "every look at alpha", "calibrated", "calibrated for known variances"
DESIGNS = {  # name -> looks, how
    "fixed, 15 seeds": ((15,), CALIBRATED),
    "fixed, 20 seeds": ((20,), CALIBRATED),
    "peeking at 3, 4, 5": ((3, 4, 5), PEEKING),
    "peeking at each of 3 to 20": (tuple(range(3, MOST + 1)), PEEKING),
    "sequential, each of 5 to 20": (EACH, CALIBRATED),
    "sequential, 5, 10, 15, 20": (FOUR, CALIBRATED),
    "each of 5 to 20, boundaries for known variances": (EACH, KNOWN),
}
OURS = [name for name, (_, how) in DESIGNS.items() if how == CALIBRATED]


def normal(random, shape):
    return random.standard_normal(shape)


def heavy(random, shape):
    return random.standard_t(4, shape) / math.sqrt(2)


def skewed(random, shape):
    return random.standard_exponential(shape) - 1


def missing(random, shape):
    """Normal; one run in ten has no value."""
    return np.where(random.random(shape) < 0.1, np.nan, random.standard_normal(shape))


NOISES = {
    "normal": normal,
    "t with 4 df": heavy,
    "exponential": skewed,
    "normal, 10 % of runs missing": missing,
}


def claims(random, noise, effects) -> np.ndarray:
    """(table, claim, seed): rows with this noise minus the baseline, with these true differences."""
    rows = noise(random, (TABLES, len(effects) + 1, MOST)) * DEVIATION / math.sqrt(2)
    return rows[:, 1:] - rows[:, :1] + np.asarray(effects)[:, None]


def p_values(values: np.ndarray, looks, margin=None) -> np.ndarray:
    """(table, claim, look): two-sided p of the t-test, or with a margin that of the equivalence test, doubled."""
    here = ~np.isnan(values)
    known = np.where(here, values, 0.0)
    at = np.array(looks) - 1
    n, total, squares = (np.cumsum(x, axis=-1)[..., at] for x in (here, known, known**2))
    n = np.maximum(n, 2)
    mean = total / n
    error = np.sqrt(np.maximum(squares - n * mean**2, 1e-12) / (n - 1) / n)
    distance = np.abs(mean) if margin is None else margin - np.abs(mean)
    return np.where(n < 3, 1.0, np.minimum(1.0, 2 * stdtr(n - 1, -distance / error)))


def decided(ps: np.ndarray, looks, how: str, alpha: float) -> np.ndarray:
    """(table, claim, look): whether a claim is decided by then, with Holm's correction."""
    if how != PEEKING:
        scale = 1000 if how == KNOWN else 1  # with so many seeds, t-tests are those of known variances
        ps = np.minimum.accumulate(least_alphas(tuple(scale * n for n in looks), ps), axis=-1)
    order = np.argsort(ps, axis=1)
    factors = np.arange(ps.shape[1], 0, -1)[:, None]
    adjusted = np.maximum.accumulate(np.take_along_axis(ps, order, axis=1) * factors, axis=1)
    found = np.empty(ps.shape, bool)
    np.put_along_axis(found, order, adjusted <= alpha, axis=1)
    return np.logical_or.accumulate(found, axis=-1)


def share(hits: np.ndarray) -> tuple[float, float]:
    """In percent, with the standard error of the simulation; hits by table."""
    return 100 * float(hits.mean()), 100 * float(hits.std()) / math.sqrt(len(hits))


def false_findings(random) -> dict:
    """The chance of any false finding in a table: noise, claims -> design -> (percent, error)."""
    found = {}
    settings = {"1 claim": [0.0], "4 claims": [0.0] * 4, "4 claims, 2 of them true by 1.5": [0.0, 0.0, 1.5, 1.5]}
    for name, effects in settings.items():
        for noise, draw in NOISES.items():
            values = claims(random, draw, effects)
            found[f"{name}; {noise}"] = errors_of(values, np.equal(effects, 0))
    values = DEVIATION * skewed(random, (TABLES, 1, MOST))
    found["1 claim; the difference itself exponential"] = errors_of(values, np.array([True]))
    many = [errors_of(claims(random, normal, [0.0]), np.array([True])) for _ in range(100)]
    found["1 claim; normal, 1,000,000 tables"] = {
        name: (float(np.mean([one[name][0] for one in many])), float(np.mean([one[name][1] for one in many])) / 10)
        for name in DESIGNS
    }
    return found


def errors_of(values: np.ndarray, null: np.ndarray) -> dict:
    found = {}
    for name, (looks, how) in DESIGNS.items():
        hits = decided(p_values(values, looks), looks, how, ALPHA)[..., -1]
        found[name] = share(hits[:, null].any(axis=1))
    return found


def false_equivalence(random) -> dict:
    """The chance of any false "equivalent" where all true differences are as large as the margin."""
    found = {}
    for m in (1, 4):
        for noise, draw in NOISES.items():
            values = claims(random, draw, [MARGIN] * m)
            found[f"{m} claim{'s' * (m > 1)}; {noise}"] = {
                name: share(equivalent(values, name)[..., -1].any(axis=1)) for name in OURS
            }
    return found


def equivalent(values: np.ndarray, design: str, margin: float = MARGIN) -> np.ndarray:
    looks, how = DESIGNS[design]
    return decided(p_values(values, looks, margin), looks, how, 2 * ALPHA)


def power(random) -> dict:
    """Claims found in percent, its error, mean seeds until all claims of a table are decided (at most 20)."""
    found = {}
    for m in (1, 4):
        for effect in (0.5, 1.0, 1.5, 2.0):
            values = claims(random, normal, [effect] * m)
            found[f"{m} claim{'s' * (m > 1)}; difference {effect}"] = {
                name: found_and_seeds(decided(p_values(values, looks), looks, how, ALPHA), looks)
                for name, (looks, how) in DESIGNS.items()
                if name in OURS
            }
        values = claims(random, normal, [0.0] * m)
        for margin in (1.0, 1.5):
            found[f"{m} claim{'s' * (m > 1)}; equivalent within {margin}, true difference 0"] = {
                name: found_and_seeds(equivalent(values, name, margin), DESIGNS[name][0]) for name in OURS
            }
    return found


def found_and_seeds(hits: np.ndarray, looks) -> tuple[float, float, float]:
    over = hits.all(axis=1)  # (table, look)
    used = np.where(over.any(axis=1), np.array(looks)[over.argmax(axis=1)], looks[-1])
    return (*share(hits[..., -1].mean(axis=1)), float(used.mean()))


def summaries(random, tables: int = 4000) -> dict:
    """How often intervals over columns hold the true mean of 1, ours and two others; how often columns are found to
    differ that do not. Errors of columns in one seed are correlated, and up to twice as large in one as in another."""
    found = {}
    for k, n, shared, ratio in itertools.product((2, 3, 5), (5, 15), (0.0, 0.3, 0.6), (1, 2)):
        deviations = np.linspace(1, ratio, k)
        deviations /= math.sqrt(np.mean(deviations**2))
        row = {}
        for tau in (0.0, 0.5, 1.0):
            common, own = random.standard_normal((tables, n, 1)), random.standard_normal((tables, n, k))
            errors = deviations * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
            values = random.normal(1, tau, (tables, 1, k)) + errors
            every, effects = [over_columns(table) for table in values], "equal" if tau == 0 else f"differ by {tau}"
            row[f"effects {effects}"] = share(np.array([one.low <= 1 <= one.high for one in every]))
            if tau == 0:
                row["equal effects found to differ"] = share(np.array([one.equal_p <= ALPHA for one in every]))
                row["effects equal: columns as independent"] = share(np.array([*map(independent, values)]))
        row["effects differ by 1.0: Satterthwaite"] = share(np.array([*map(satterthwaite, values)]))
        alike = "alike" if ratio == 1 else "1 to 2"
        found[f"{k} columns, {n} seeds, correlation {shared}, deviations {alike}"] = row
    return found


def independent(table: np.ndarray) -> bool:
    """Whether the t-interval of the columns' means holds 1."""
    means = table.mean(axis=0)
    error = means.std(ddof=1) / math.sqrt(len(means))
    return abs(means.mean() - 1) <= stdtrit(len(means) - 1, 0.975) * error


def satterthwaite(table: np.ndarray) -> bool:
    """Whether the interval with Satterthwaite's degrees of freedom for the whole variance of the mean holds 1."""
    n, k = table.shape
    squares = seeds, columns, error = np.array(mean_squares(table))
    dfs = np.array([n - 1, k - 1, (n - 1) * (k - 1)])
    variance, df = seeds + columns - error, (seeds + columns - error) ** 2 / np.sum(squares**2 / dfs)
    if variance < max(seeds, columns):
        variance, df = (seeds, n - 1) if seeds > columns else (columns, k - 1)
    return abs(table.mean() - 1) <= stdtrit(df, 0.975) * math.sqrt(variance / table.size)


def compared(random, tables: int = 200) -> int:
    """Of so many tables, those where `decide` itself says something else than this file."""
    different = 0
    values = claims(random, missing, [0.0, 0.5, 1.0, 2.0])[:tables]
    for looks in (EACH, FOUR, (15,)):
        hits = decided(p_values(values, looks), looks, CALIBRATED, ALPHA)
        for table, ours in zip(values, hits, strict=True):
            cells = [{seed: x for seed, x in enumerate(claim.tolist()) if not math.isnan(x)} for claim in table]
            theirs = [one.sign != 0 for one in decide(cells, range(MOST), MOST, looks)]
            different += theirs != ours[:, -1].tolist()
    return different


def show(hit: float, error: float, seeds: float | None = None) -> str:
    return f"{hit:.2f} ± {error:.2f}" + (f", {seeds:.1f} seeds" if seeds else "")


def as_markdown(title: str, rows: dict) -> list[str]:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"## {title}", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for setting, row in rows.items():
        cells = [show(*row[name]) if name in row else "" for name in names]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    random = np.random.default_rng(SEED)
    measured = {
        "Any false finding in a table, %": false_findings(random),
        f'Any false "equivalent" in a table, true differences = margin = {MARGIN}, %': false_equivalence(random),
        "Claims found, %, and mean seeds of a table": power(random),
        "Intervals over columns hold the true mean, % of 4,000 tables": summaries(random),
    }
    different = compared(random)
    head = {
        "command": COMMAND,
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "tables": TABLES,
        "deviation": DEVIATION,
        "alpha": ALPHA,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "boundaries": {name: boundaries(DESIGNS[name][0], ALPHA) for name in OURS},
        "decide_differs_in_of_600_tables": different,
    }
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        "# Simulated tables",
        "",
        f"`{COMMAND}`, {head['date']}, seed {SEED}, {versions}.",
        f"{TABLES:,} tables per figure, if not stated otherwise; ± is the standard error of the simulation.",
        f"Alpha is {ALPHA}, with Holm's correction over the claims; the deviation of a difference between seeds is",
        f"{DEVIATION} points. A table's last seed is {MOST}.",
        f"`decide` itself says something else in {different} of 600 tables.",
        "Over columns, true effects are drawn around 1; they are equal, or differ by a standard deviation in units of",
        "that of one column between seeds (root mean square over columns); correlation is that of columns in a seed.",
        "",
        *(line for title, rows in measured.items() for line in as_markdown(title, rows)),
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines))
    RESULTS.with_suffix(".json").write_text(json.dumps({**head, **measured}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
