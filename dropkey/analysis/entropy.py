"""Entropy of attention per layer and head, as a record of a run (paper: it is higher with DropKey than with Dropout).

-sum p log p in nats over the keys of a query, averaged over queries and images. Divided by log K, the entropy of
uniform attention, it lies in [0, 1] and layers with different numbers of keys can be compared.
"""

import hashlib
import math
from pathlib import Path
from typing import Iterable, Optional

import torch
from torch import Tensor, nn

from dropkey.analysis import capture
from dropkey.analysis.trained import config_of, open_run
from dropkey.code_version import code_of
from dropkey.errors import Diverged, StorageError, say
from dropkey.patching.patch import blocks_of
from dropkey.provenance import device_name, versions
from dropkey.records import RunDirectory, write_json

IMAGES = 512
RECORD = "entropy.json"
COUNTED = ("self", "class")  # layers whose mean speaks for the model: those that the paper regularizes


def row_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row (... K to ...), in float64 where the device has it."""
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64
    return torch.special.entr(weights).sum(-1, dtype=dtype)


def measure_entropy(model: nn.Module, batches: Iterable[Tensor]) -> list[dict]:
    """Mean entropy of each attention layer of a model over images (B C H W each).

    Returns:
        For each layer, in forward order: `name`, `kind`, `keys` (how many; a mean where images differ in size), `nats`
        and `normalised` (one number per head, 7 significant digits); and `stack`, encoder or decoder, where there are
        both.
    Raises:
        ConfigError: see `capture_attention`.
    """
    sums: dict[str, Tensor] = {}  # of each layer: nats and share of log K of each head, and keys
    kinds: dict[str, str] = {}

    def add(layer: capture.LayerAttention) -> None:
        nats = row_entropy(layer.weights).mean(-1).sum(0).cpu()  # over queries, then images
        count, keys = len(layer.weights), layer.weights.shape[-1]
        largest = math.log(keys) or 1.0  # a single key: entropy 0
        new = torch.stack([nats, nats / largest, torch.full_like(nats, count * keys)])
        sums[layer.name] = sums.get(layer.name, 0) + new
        kinds[layer.name] = layer.kind

    images = 0
    for batch in batches:
        capture.capture_attention(model, batch, add)
        images += len(batch)
    rows = []
    for (name, total), stack in zip(sums.items(), stacks(kinds), strict=True):
        nats, normalised, keys = (total / images).tolist()
        row = {"name": name, "kind": kinds[name], **({"stack": stack} if stack else {}), "keys": round(keys[0])}
        rows.append({**row, "nats": rounded(nats), "normalised": rounded(normalised)})
    return rows


def stacks(kinds: dict[str, str]) -> list[str]:
    """Of each layer, such as encoder or decoder; "" where there is no cross-attention, by name of the layer."""
    if "cross" not in kinds.values():
        return [""] * len(kinds)
    paths = [stack.split(".") for stack, _ in blocks_of(list(kinds.items()), "stack")]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    return [path[shared] for path in paths]


def record_entropy(path: str | Path, root: Optional[str] = None) -> tuple[dict, bool]:
    """The run's entropy.json, measured now unless it is there and up to date.

    Over 512 images spread evenly over the test split (all of a smaller one), in float32. `mean` and `mean_nats` are
    over the heads of self and class attention. The same run gives the same bytes.

    Args:
        path: a run directory.
        root: where its images lie now.
    Returns:
        The record, and whether it was there already. A run that is not finished is measured each time.
    Raises:
        ConfigError, DataError, StorageError: see dropkey.errors.
        Diverged: attention weights are NaN.
    """
    run = RunDirectory(Path(path))
    made_by = {"code": code_of(config_of(path)), "measure": digest()}
    old, summary = run.read_json(RECORD), run.summary()
    now = {"epoch": summary.get("epochs"), "step": summary.get("steps"), **made_by}
    if run.finished and all(old.get(key) == value for key, value in now.items()):
        return old, True
    trained = open_run(path, root)
    ids = trained.spread(IMAGES)
    layers = measure_entropy(trained.model, (batch.images for batch in trained.batches(ids)))
    counted = [row for row in layers if row["kind"] in COUNTED] or layers
    if not all(math.isfinite(value) for row in layers for value in row["nats"]):
        raise Diverged(f"{path}: attention weights are NaN because the model has diverged; leave this run out")
    new = {
        "mean": mean(counted, "normalised"),
        "mean_nats": mean(counted, "nats"),
        "images": len(ids),
        "split": "test",
        "checkpoint": "checkpoints/last.pt",
        "epoch": trained.position["epoch"],
        "step": trained.position["global_step"],
        "layers": layers,
        "hardware": device_name(trained.dist),
        "versions": versions(),
        **made_by,
    }
    try:
        write_json(run.path / RECORD, new)
    except StorageError as error:  # somebody else's run, say: it is measured again next time
        say(f"the entropy of {path} is not stored: {error}")
    return new, False


def mean(rows: list[dict], key: str) -> float:
    """Over heads, then over layers."""
    return rounded([sum(sum(row[key]) / len(row[key]) for row in rows) / len(rows)])[0]


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.7g}") for value in values]


def digest() -> str:
    """Ten hexadecimal digits over the code that measures, which `dropkey.code_version` leaves out."""
    files = [Path(capture.__file__), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]
