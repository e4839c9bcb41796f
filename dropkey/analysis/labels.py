"""Names of runs: in a legend, by what differs between them, and in the file name of their picture."""

import hashlib
from itertools import combinations

from dropkey.config import identity
from dropkey.config.identity import regularizer_label
from dropkey.config.schema import TrainConfig

NAMED = ("regularizer.", "schedule.", "model.", "data.")  # keys that have names of their own below
LONGEST = 90  # characters of the part of a file name that tells the runs


def labels(configs: list[TrainConfig], *, seeds: bool) -> list[str]:
    """For each run its name in a legend: regularizer, model and data set where they differ, then other keys that
    differ. Runs in which nothing differs are named by their regularizer.

    Args:
        seeds: whether the seed is one of the keys.
    """
    flat = [identity.canonical(cfg) for cfg in configs]
    keys = sorted({key for one in flat for key in one if len({repr(other.get(key)) for other in flat}) > 1})
    keys = [key for key in keys if seeds or key != "seed"]
    names = [[] for _ in configs]
    for name_of in (regularizer_label, identity.model_label, identity.data_label):
        if len({name_of(cfg) for cfg in configs}) > 1:
            for name, cfg in zip(names, configs, strict=True):
                name.append(name_of(cfg))
    for key in sorted(keys, key=lambda key: (key.startswith(NAMED), key)):
        if not key.startswith(NAMED) or confused(key, names, flat):
            for name, one in zip(names, flat, strict=True):
                if key in one:
                    name.append(f"{key.split('.')[-1]} {one[key]}")
    return [", ".join(name) or regularizer_label(cfg) for name, cfg in zip(names, configs, strict=True)]


def confused(key: str, names: list[list[str]], flat: list[dict]) -> bool:
    """Whether two runs that differ in `key` have the same name without it."""
    pairs = combinations(zip(names, flat, strict=True), 2)
    return any(a == b and repr(one.get(key)) != repr(other.get(key)) for (a, one), (b, other) in pairs)


def file_stem(configs: list[TrainConfig]) -> str:
    """Which runs a picture shows, for its file name: vit_4x64-none+dropkey_0.1-digits-s0+1-<hash>, the hash
    taken over the runs."""
    parts = [
        "+".join(dict.fromkeys(identity.model_label(cfg) for cfg in configs)),
        "+".join(dict.fromkeys(regularizer_name(cfg) for cfg in configs)),
        "+".join(dict.fromkeys(identity.data_label(cfg) for cfg in configs)),
        "s" + "+".join(dict.fromkeys(str(cfg.seed) for cfg in configs)),
    ]
    told = "-".join(parts)
    if len(told) > LONGEST:
        told = f"{len(configs)}-runs"
    hashes = " ".join(identity.run_hash(cfg) for cfg in configs)
    return f"{told}-{hashlib.sha256(hashes.encode()).hexdigest()[:6]}"


def regularizer_name(cfg: TrainConfig) -> str:
    return "none" if cfg.regularizer.name == "none" else f"{cfg.regularizer.name}_{cfg.regularizer.ratio:g}"
