"""Whether runs may be compared: the same code in the parts they share, the same torch, the same data."""

from collections import Counter
from collections.abc import Sequence

from dropkey.config.check import require
from dropkey.reproduction.jobs import DONE


def require_one_version(records: list[dict], mixed: bool, tuned: Sequence[dict] = ()) -> list[str]:
    """Sentences on what differs between runs that are compared, and between runs of tuning. Runs conflict in the parts
    of the code they share.

    Raises:
        ConfigError: there are any, and `mixed` does not allow it.
    """
    done = [entry for entry in records if entry["state"] == DONE]
    runs = [run for entry in tuned for run in entry["runs"].values() if run]
    found = [*different_code(done, ""), *different_code(runs, " in tuning")]
    for column in dict.fromkeys(entry["column"] for entry in done):
        here = [entry["data"] for entry in done if entry["column"] == column]
        found.append(several(here, f"versions of the data in column '{column}'"))
    found = [sentence for sentence in found if sentence]
    ways_out = "Train the older ones again with outdated=retrain, or allow it with mixed=true, which the report shows"
    require(mixed or not found, f"these runs are not comparable: {'; '.join(found)}. {ways_out}")
    return found


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
