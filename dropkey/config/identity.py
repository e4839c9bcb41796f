"""A run is its config: the hash, and the directory named after it."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from dropkey.config.geometry import family
from dropkey.config.schema import BY_ROOT, EvalConfig, ScheduleConfig, TrainConfig, flatten

# Keys that do not change the result: where files are, what is logged, how fast it runs.
NO_EFFECT = (
    "output",
    "overwrite",
    "logger",
    "data.root",
    "data.download",
    "data.num_workers",
    "trainer.device",
    "trainer.eval_batch_size",
    "trainer.checkpoint_minutes",
    "trainer.log_every",
    "trainer.find_unused_parameters",
)
# Keys that came later, at the value at which they change nothing: left out, so that earlier runs keep their hash.
NEUTRAL = {
    **{"schedule.over": "depth", "optim.layer_decay": None, "optim.cooldown_epochs": 0.0, "trainer.ema_warmup": True},
    **{"augment.border": "reflect", "augment.interpolation": "bicubic", "augment.erase_mixed": False},
    **{"data.token_labels": None, "regularizer.modules": [], "regularizer.scope": "model"},
    **{"optim.filter_bias_and_bn": True, "optim.sched": "cosine", "optim.decay_epochs": None, "optim.decay_rate": 0.1},
}


def has_no_effect(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in NO_EFFECT)


def canonical(cfg: TrainConfig) -> dict[str, object]:
    """Every key that changes the result, flat, with its value.

    Defaults are included: a changed default is a changed config. Configs that mean the same training give the same
    dictionary, so keys without a meaning are left out: the regularizer's details when it is `none`, the end of a
    constant schedule, the steps of a cosine.
    """
    keys = {key: value for key, value in flatten(asdict(cfg)).items() if not has_no_effect(key)}
    keys = {key: value for key, value in keys.items() if key not in NEUTRAL or value != NEUTRAL[key]}
    if cfg.regularizer.name == "none":
        keys = {k: v for k, v in keys.items() if not k.startswith(("regularizer.", "schedule."))}
        keys["regularizer.name"] = "none"
    elif cfg.schedule.name == "constant":
        del keys["schedule.end"]
        keys.pop("schedule.over", None)
    if cfg.optim.sched == "cosine":
        keys = {key: value for key, value in keys.items() if not key.startswith("optim.decay_")}
    if cfg.data.name in BY_ROOT:  # a folder is identified by its path, a named data set is the same anywhere
        keys["data.root"] = str(Path(cfg.data.root).resolve())
    if cfg.data.token_labels is not None:
        keys["data.token_labels"] = str(Path(cfg.data.token_labels).expanduser().resolve())
    if cfg.init_from is not None:
        start = Path(cfg.init_from).resolve()
        by_hash = re.search(r"-([0-9a-f]{10})$", start.name)  # a run; tables name runs before they exist
        keys["init_from"] = str(start) if start.is_file() else by_hash.group(1) if by_hash else start.name
    return keys


def digest(keys: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:10]


def run_hash(cfg: TrainConfig) -> str:
    """Ten hexadecimal digits over everything that changes the result."""
    return digest(canonical(cfg))


def group_hash(cfg: TrainConfig) -> str:
    """The same without the seed: runs to be averaged share it."""
    return digest({k: v for k, v in canonical(cfg).items() if k != "seed"})


def model_label(cfg: TrainConfig) -> str:
    """vit_6x128 for a resized ViT, volo_d1, t2t_vit_14: what a person would call it."""
    model = cfg.model
    name = re.sub(r"_patch\d+_\d+.*|_\d{3}(\..*)?$", "", model.name)
    if family(model.name) == "vit" and model.depth and model.embed_dim:
        name = f"vit_{model.depth}x{model.embed_dim}"
    return name


def data_label(cfg: TrainConfig | EvalConfig) -> str:
    name = cfg.data.name if cfg.data.name not in BY_ROOT else Path(cfg.data.root).resolve().name
    return re.sub(r"[^\w.]+", "_", name) or "folder"


def regularizer_label(cfg: TrainConfig) -> str:
    """dropkey 0.3 decreasing, dropkey_block 0.1 constant (window 3), no regularizer."""
    regularizer = cfg.regularizer
    if regularizer.name == "none":
        return "no regularizer"
    window = "" if regularizer.window is None else f" (window {regularizer.window})"
    return f"{regularizer.name} {regularizer.ratio:g} {schedule_label(cfg.schedule)}{window}"


def schedule_label(schedule: ScheduleConfig) -> str:
    """decreasing, decreasing to 0.1, increasing over training"""
    if schedule.name == "constant":
        return "constant"
    end = f" {'from' if schedule.name == 'increasing' else 'to'} {schedule.end:g}" if schedule.end else ""
    return f"{schedule.name}{end}{' over training' if schedule.over == 'training' else ''}"


def training_facts(cfg: TrainConfig) -> str:
    """Data, resolution and length of a training for captions: 'digits, 8 px, 480 training samples, 25 epochs'."""
    data, trainer = cfg.data, cfg.trainer
    samples = f", {data.max_train_samples:,} training samples" if data.max_train_samples else ""
    samples += " drawn anew for each seed" if data.max_train_samples and data.split_seed == "run" else ""
    steps = f", at most {trainer.max_steps} steps" if trainer.max_steps else ""
    size = f", {data.image_size} px" if cfg.task.name == "classification" else ""
    return f"{data_label(cfg)}{size}{samples}, {trainer.epochs} epochs{steps}"


def evaluation_settings(cfg: EvalConfig) -> dict[str, object]:
    """Every key of an evaluation that changes its result, flat; kept in its file, so that a table notices a change."""
    keys = flatten({"eval": asdict(cfg.eval), "data": asdict(cfg.data) if cfg.data else None})
    keys["checkpoint"] = Path(cfg.checkpoint).name if cfg.checkpoint else None
    return {key: value for key, value in keys.items() if key != "eval.device" and not has_no_effect(key)}


def evaluation_name(cfg: EvalConfig) -> str:
    """eval-test.json, eval-val-best-mc16.json, eval-test-cifar10.json: one file per question."""
    parts = ["eval", cfg.eval.split]
    if cfg.data is not None:
        parts.append(data_label(cfg))
    if cfg.checkpoint or cfg.eval.weights != "last":
        parts.append(Path(cfg.checkpoint).stem if cfg.checkpoint else cfg.eval.weights)
    if cfg.eval.monte_carlo:
        parts.append(f"mc{cfg.eval.monte_carlo}")
    return "-".join(parts) + ".json"


def run_directory(cfg: TrainConfig) -> Path:
    """<output>/<model>-<regularizer>-<ratio>-<data>-s<seed>-<hash>; every process of a job computes the same one.

    The hash alone identifies a run: a directory that ends in it is taken whatever its name (renamed, or of an earlier
    version)."""
    none = cfg.regularizer.name == "none"
    regularizer = "none" if none else f"{cfg.regularizer.name}-{cfg.regularizer.ratio:g}"
    name = "-".join((model_label(cfg), regularizer, data_label(cfg), f"s{cfg.seed}", run_hash(cfg)))
    path = Path(cfg.output) / name
    others = [] if path.exists() else [one for one in Path(cfg.output).glob(f"*-{run_hash(cfg)}") if one.is_dir()]
    return min(others, default=path)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """'key: old -> new' for every key that changes the result and differs."""
    a, b = (NEUTRAL | canonical(cfg) for cfg in (old, new))
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
