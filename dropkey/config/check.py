"""Turns a composed config into one that can run, or into one line that says what is wrong (ConfigError)."""

import difflib
import os
import sys
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Iterable

from dropkey.config import schema
from dropkey.config.geometry import default_patch, family, grid_side, known_models, t2t_tokens
from dropkey.config.schema import EvalConfig, ModelConfig, RegularizerConfig, ScheduleConfig, TrainConfig, flatten
from dropkey.errors import ConfigError

FEW = 10  # choices that a message lists in full
RESIZED = "vit_tiny_patch16_224"  # the architecture whose sizes configs/model/vit_<depth>x<width>.yaml set
MIN_T2T_TOKENS = 9
OWN_ARGUMENTS = {  # of timm's constructors, and the key that sets each
    **{key: f"model.{key}" for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "pretrained")},
    **{"drop_path_rate": "model.drop_path", "img_size": "data.image_size"},
    **{"in_chans": "data.channels", "num_classes": "data.num_classes"},
}

# ---------------------------------------------------------------------------------------------------- single values


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint that ends a message: the closest choice, and all of them where they are few."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    if len(choices) <= FEW or not close:
        hint += f"{' ' if close else '; '}choices: {', '.join(choices[:40])}"
    return hint


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value, choices: Iterable) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value} does not exist{nearest(value, choices)}")


def in_range(key: str, value: float, name: str, most: float = sys.float_info.max) -> None:
    """Refuses a number outside the range of that name in schema.RANGES or above `most`; NaN and infinity always."""
    limit = "" if name.endswith(("]", ")")) else f" and at most {most:g}"
    number = isinstance(value, (int, float)) and schema.RANGES[name](value) and value <= most
    require(number, f"{key}={value} must be {name}{limit}")


def check_values(cfg: TrainConfig | EvalConfig) -> None:
    """Applies schema.VALUES to each key that the config has; to each element where the value is a list."""
    for keys, *rule in schema.VALUES:
        for key in keys.split():
            value = reduce(lambda node, name: getattr(node, name, None), key.split("."), cfg)
            for item in value if isinstance(value, list) else [] if value is None else [value]:
                (in_range if isinstance(rule[0], str) else one_of)(key, item, *rule)
    for key, value in flatten(asdict(cfg)).items():
        for item in [] if ".args." in key else value if isinstance(value, list) else [value]:
            require(
                not isinstance(item, (list, dict)), f"{key} holds {item}, a list or mapping; it takes single values"
            )
            if isinstance(item, str):
                require(bool(item.strip()), f"{key} is empty{'; null stands for none' if key == 'init_from' else ''}")
                require("\0" not in item, f"{key} has a character with the code 0")
                longest = max(item.split("/"), key=len)
                require(len(longest.encode()) < 256, f"{key}={item}: no name may have more than 255 letters")


# ------------------------------------------------------------------------------------------------ model and image


def check_model(model: ModelConfig, image_size: int) -> None:
    """Fills in `model.patch_size` and refuses sizes that the architecture cannot cut into tokens."""
    base = model.name.split(".")[0]  # timm's names may carry a pretrained tag
    kind, names = family(base), known_models()
    if base not in names:
        raise ConfigError(f"model.name={model.name} is not in timm or dropkey.models{nearest(base, names)}")
    for name in OWN_ARGUMENTS.keys() & model.args.keys():
        raise ConfigError(f"model.args.{name}: take {OWN_ARGUMENTS[name]}, which sets it")
    sized = base == RESIZED or base.startswith(("t2t", "ceit", "detr", "qpic"))
    require(
        model.depth is None or model.embed_dim is None or sized,
        f"model.name={model.name} with the depth and width of another model; take model=timm model.name={model.name}",
    )
    require(
        not model.embed_dim or not model.num_heads or model.embed_dim % model.num_heads == 0,
        f"model.embed_dim={model.embed_dim} is not divisible by model.num_heads={model.num_heads}",
    )
    require(
        not model.args.get("use_mix_token") or (kind == "volo" and model.args.get("use_aux_head", True)),
        "model.args.use_mix_token: only VOLO has it, and with model.args.use_aux_head=true",
    )
    if kind == "t2t":
        require(model.patch_size is None, f"model.patch_size: {base} has soft splits, no patches; leave it null")
        tokens = t2t_tokens(base, image_size)
        require(
            tokens >= MIN_T2T_TOKENS,
            f"data.image_size={image_size} leaves {base} {tokens} tokens; "
            "take model=t2t_vit_small_image, or images of 48 px and more",
        )
    if kind in ("vit", "volo", "ceit"):
        fit_patches(model, kind, base, image_size)


def fit_patches(model: ModelConfig, kind: str, base: str, image_size: int) -> None:
    least = 4 if model.patch_size is None else 2  # patches a side; a patch size that is asked for may leave fewer
    if model.patch_size is None:
        model.patch_size = default_patch(base, image_size)
    patch = model.patch_size
    step, why = patch, "model.patch_size"
    if kind == "volo":
        require(patch in (4, 8, 16), f"model.patch_size={patch}: VOLO has 4, 8 and 16")
        step, why = 2 * patch, "twice model.patch_size"  # it halves its grid between outlook and self-attention
    if kind == "ceit":
        require(patch % 4 == 0, f"model.patch_size={patch}: CeiT has multiples of 4, the stride of its stem")
    require(
        image_size % step == 0,
        f"data.image_size={image_size} is not divisible by {why} ({step}); "
        f"take data.image_size={step * max(2, -(-image_size // step))}",
    )
    require(
        image_size >= least * patch,
        f"data.image_size={image_size} is cut into {image_size // patch} x {image_size // patch} patches of "
        f"{patch} px, too few; take data.image_size={8 * (-(-max(image_size, 16) // 8))}, or set model.patch_size",
    )


# --------------------------------------------------------------------------------------------- values that must fit


def check_regularizer(regularizer: RegularizerConfig, schedule: ScheduleConfig) -> None:
    name, window = regularizer.name, regularizer.window
    layers = regularizer.layers
    require(bool(layers), f"regularizer.layers is empty; choices: {', '.join(schema.LAYERS)}")
    require(len(set(layers)) == len(layers), f"regularizer.layers=[{','.join(layers)}] names one twice")
    if name.startswith(("dropkey_block", "dropkey_cross")):
        cross = name.startswith("dropkey_cross")
        require(
            "layer" not in layers,
            f"regularizer.layers=[{','.join(layers)}]: {name} needs keys on an image; leave out layer",
        )
        odd = isinstance(window, int) and window > 0 and window % 2 == 1
        share = isinstance(window, float) and 0 < window < 1
        require(
            odd or share or (cross and window == "full"),
            f"regularizer.window={window}: {name} takes an odd number of cells (3, 5, 7 ...), "
            f"{'a' if cross else 'or a'} share of the grid (such as 0.4){', or full' if cross else ''}",
        )
    else:
        require(window is None, f"regularizer.window={window}: only dropkey_block and dropkey_cross have a window")
    require(
        name == "none" or schedule.name == "constant" or schedule.end <= regularizer.ratio,
        f"schedule.end={schedule.end} exceeds regularizer.ratio={regularizer.ratio}, which is the peak",
    )


def check_window(cfg: TrainConfig) -> None:
    """Refuses a window that reaches over the whole grid from every cell and beyond: one training, several hashes."""
    window, side = cfg.regularizer.window, grid_side(cfg.model, cfg.data.image_size, cfg.regularizer.layers)
    whole = 2 * side - 1 if side else None
    require(
        whole is None or not isinstance(window, int) or window <= whole,
        f"regularizer.window={window}: the grid has {side} x {side} keys, which a window of {whole} already spans; "
        f"take regularizer.window={whole} or less",
    )


def check_data(data: schema.DataConfig) -> None:
    if ":" not in data.name:  # module:function is the user's own
        one_of("data.name", data.name, schema.DATASETS + schema.SCENES + schema.MESHES)
    seed = data.split_seed
    require(
        seed == "run" or (type(seed) is int and 0 <= seed < 2**63),
        f"data.split_seed={seed} must be a number from 0, or run: each run's own seed",
    )
    require(
        data.crop_pct == 1 or not data.in_memory,
        f"data.crop_pct={data.crop_pct} needs data.in_memory=false, as images in memory have no margin; or set it to 1",
    )
    for key in ("mean", "std"):
        values = getattr(data, key)
        require(
            values is None or len(values) in (1, data.channels),
            f"data.{key} has {len(values or [])} values for data.channels={data.channels}; give one, or null",
        )


def check_token_labels(cfg: TrainConfig) -> None:
    data, augment = cfg.data, cfg.augment
    require(
        bool(cfg.model.args.get("use_mix_token")),
        "data.token_labels: only VOLO with MixToken learns from them; take model=volo_d1 "
        "model.args={use_aux_head: true, use_mix_token: true}",
    )
    require(not data.in_memory, "data.token_labels: the crop of maps needs the whole pictures; data.in_memory=false")
    require(augment.crop_scale is not None, "data.token_labels needs augment.crop_scale, such as [0.08, 1]")
    for key in ("crop_padding", "mixup", "cutmix"):
        value = getattr(augment, key)
        require(value == 0, f"augment.{key}={value} does not go with data.token_labels; set it to 0")


def check_warmup(optim: schema.OptimConfig, trainer: schema.TrainerConfig) -> None:
    """Refuses a warm-up and cool-down that leave nothing between. How many steps an epoch has is known with the data
    only, so that `trainer.max_steps` (for debugging) may end a run within its warm-up."""
    require(
        optim.warmup_epochs < trainer.epochs,
        f"optim.warmup_epochs={optim.warmup_epochs:g} must be below trainer.epochs={trainer.epochs}, or the learning "
        f"rate never falls; take optim.warmup_epochs={trainer.epochs / 10:g}",
    )
    require(
        optim.warmup_epochs + optim.cooldown_epochs < trainer.epochs,
        f"optim.warmup_epochs={optim.warmup_epochs:g} and optim.cooldown_epochs={optim.cooldown_epochs:g} leave "
        f"none of trainer.epochs={trainer.epochs} for the cosine; take fewer",
    )


def check_sched(optim: schema.OptimConfig, trainer: schema.TrainerConfig) -> None:
    if optim.sched == "cosine":
        return
    require(optim.decay_epochs is not None, "optim.sched=step: after how many epochs? optim.decay_epochs=200")
    require(
        optim.warmup_epochs < optim.decay_epochs < trainer.epochs,
        f"optim.decay_epochs={optim.decay_epochs:g} must be above optim.warmup_epochs={optim.warmup_epochs:g} and "
        f"below trainer.epochs={trainer.epochs}, or the learning rate never falls; take {2 * trainer.epochs / 3:g}",
    )
    require(
        optim.cooldown_epochs == 0,
        f"optim.cooldown_epochs={optim.cooldown_epochs:g} is of the cosine; set it to 0 with optim.sched=step",
    )


def check_lr_scale(scales: dict) -> None:
    for key, value in flatten(scales).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(
            number and 0 <= value <= schema.FACTOR,
            f"optim.lr_scale.{key}={value} must be a number from 0, which freezes that part, to {schema.FACTOR}",
        )


def check(cfg: TrainConfig) -> TrainConfig:
    """The config with derived values filled in.

    Raises:
        ConfigError: a value or a pair of values that cannot work; one line with the key and the remedy.
    """
    check_values(cfg)
    check_regularizer(cfg.regularizer, cfg.schedule)
    check_data(cfg.data)
    check_model(cfg.model, cfg.data.image_size)
    for kind, what, task, data in (
        ("detr", "boxes", "detection", "digit_scenes"),
        ("qpic", "boxes", "interaction", "digit_pairs"),
        ("metro", "meshes", "mesh", "stick_figures"),
    ):
        require(
            cfg.task.name != "classification" or not cfg.model.name.startswith(kind),
            f"model.name={cfg.model.name} finds {what}; add task={task} and its data, such as data={data}",
        )
    frozen = cfg.model.name.startswith(("detr_r", "qpic_r")) and not cfg.model.pretrained and cfg.init_from is None
    require(
        not frozen,
        f"model.name={cfg.model.name} has frozen BatchNorms, which need trained weights: model.pretrained=true "
        "(ImageNet, needs a network) or init_from=<checkpoint>",
    )
    check_window(cfg)
    if cfg.data.token_labels is not None:
        check_token_labels(cfg)
    augment, trainer, size = cfg.augment, cfg.trainer, cfg.data.image_size
    scale = augment.crop_scale
    require(
        scale is None or (len(scale) == 2 and scale[0] <= scale[1] <= 1),
        f"augment.crop_scale={scale} must be two shares of the area, such as [0.08, 1]",
    )
    require(
        augment.crop_padding < size, f"augment.crop_padding={augment.crop_padding} must be below data.image_size={size}"
    )
    check_warmup(cfg.optim, trainer)
    check_sched(cfg.optim, trainer)
    check_lr_scale(cfg.optim.lr_scale)
    parts = trainer.grad_accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    require(
        trainer.batch_size % parts == 0,
        f"trainer.batch_size={trainer.batch_size} is not divisible by processes x trainer.grad_accum_steps = {parts}",
    )
    if cfg.init_from is not None:
        require(not cfg.model.pretrained, "init_from and model.pretrained=true both give weights; take one")
        cfg.init_from = start_of(cfg)
    return cfg


def start_of(cfg: TrainConfig) -> str:
    """`init_from` as the path of a run or a file that exists."""
    if Path(cfg.init_from).is_file() or (Path(cfg.init_from) / "checkpoints").is_dir():
        return cfg.init_from
    from dropkey.config.run_lookup import find_run  # which composes configs

    return str(find_run(cfg.init_from, cfg.output, key="init_from"))


def check_evaluation(cfg: EvalConfig) -> EvalConfig:
    """The same for an evaluation: exactly one of `run` and `checkpoint`, which must exist."""
    require(
        (cfg.run is None) != (cfg.checkpoint is None),
        "an evaluation takes either run=<run directory> or checkpoint=<file in one>",
    )
    check_values(cfg)
    path, key = cfg.run or cfg.checkpoint, "run" if cfg.run else "checkpoint"
    require(Path(path).exists(), f"{key}={path} does not exist")
    if cfg.data is not None:
        check_data(cfg.data)
    return cfg
