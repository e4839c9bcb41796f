"""Whether runs may be compared: the same code in the parts they share, the same torch, the same data."""

from collections import Counter, defaultdict

from dropkey.config.check import require
from dropkey.reproduction.jobs import DONE


def require_one_version(head: dict, records: list[dict], mixed: bool) -> list[str]:
    """Sentences on what differs between runs of a table that are compared, and between runs of its tuning. Runs
    conflict in the parts of the code they share, and in their data: those of a column or, with data.split_seed=run,
    where each seed may have data of its own, those of a seed.

    Raises:
        ConfigError: there are any, and `mixed` does not allow it.
    """
    done = [entry for entry in records if entry["state"] == DONE]
    runs = [run for entry in head["tuning"] for run in entry["runs"].values() if run]
    found = [*different_code(done, ""), *different_code(runs, " in tuning")]
    data, drawn = defaultdict(list), drawn_anew(head["settings"])
    for entry in done:
        seed = f", seed {entry['seed']}" if entry["column"] in drawn else ""
        data[f"versions of the data in column '{entry['column']}'{seed}"].append(entry["data"])
    found += [several(values, what) for what, values in data.items()]
    found = [sentence for sentence in found if sentence]
    ways_out = "Train the older ones again with outdated=retrain, or allow it with mixed=true, which the report shows"
    require(mixed or not found, f"these runs are not comparable: {'; '.join(found)}. {ways_out}")
    return found


def drawn_anew(settings: dict) -> set[str]:
    """The columns with data.split_seed=run."""
    cells = ((column, {**settings["shared"], **own}) for _, column, own in settings["cells"])
    return {column for column, keys in cells if keys.get("data.split_seed") == "run"}


def different_code(entries: list[dict], where: str) -> list[str]:
    """`where` ends each sentence."""
    parts = dict.fromkeys(part for entry in entries for part in entry["code"])
    values = {f"versions of the code of {part}": [one["code"].get(part) for one in entries] for part in parts}
    values["versions of torch"] = [one["torch"] for one in entries]
    return [several(found, f"{what}{where}") for what, found in values.items()]


def several(values: list, what: str) -> str:
    counts = Counter(value for value in values if value is not None)
    listed = ", ".join(f"{value}: {n} runs" for value, n in counts.most_common())
    return f"{len(counts)} {what} ({listed})" if len(counts) > 1 else ""
