"""Turns a composed config into one that can run, or into one line that says what is wrong (ConfigError)."""

import difflib
import importlib.util
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Iterable

from dropkey.config import schema
from dropkey.config.schema import DataConfig, EvalConfig, ModelConfig, RegularizerConfig, ScheduleConfig, TrainConfig
from dropkey.errors import ConfigError

RESIZED = "vit_tiny_patch16_224"  # the architecture whose sizes configs/model/vit_<depth>x<width>.yaml set
SMALL_IMAGE = 96  # pixels; below, a patch of 16 leaves fewer than 6 x 6 tokens
SOFT_SPLITS = {"t2t_vit_small_image": ((3, 2, 1), (3, 2, 1))}  # kernel, stride, padding; all others:
IMAGENET_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
MIN_T2T_TOKENS = 9


def nearest(word: str, choices: Iterable[str]) -> str:
    """'; did you mean X?' or '; choices: a, b, c' when nothing comes close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choices: {', '.join(choices[:40])}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:  # what comes near is looked for only then: among 1,400 models it takes a while
        raise ConfigError(f"{key}={value} does not exist{nearest(value, choices)}")


def within(key: str, value: float, low: float, high: float, *, high_open: bool = False) -> None:
    inside = low <= value < high if high_open else low <= value <= high
    bracket = ")" if high_open else "]"
    require(inside, f"{key}={value} lies outside [{low:g}, {high:g}{bracket}")


def positive(key: str, value, *, zero: bool = False) -> None:
    if value is None:
        return
    floor = "0 or more" if zero else "above 0"
    require(value >= 0 if zero else value > 0, f"{key}={value} must be {floor}")


# ------------------------------------------------------------------------------------------------ model and image


def family(name: str) -> str:
    """The geometry a model's name implies: 'vit', 'volo', 't2t', or 'other' (left to the model itself)."""
    for prefix in ("t2t_vit", "volo"):
        if name.startswith(prefix):
            return prefix.removesuffix("_vit")
    return "vit" if re.match(r"(vit|deit3?)_\w*patch\d+", name) else "other"


@lru_cache(maxsize=1)
def known_models() -> frozenset[str]:
    """Names of timm's registry and of ours, read from the source: importing timm takes seconds, this 0.1 s."""
    spec = importlib.util.find_spec("timm")
    files = list(Path(spec.origin).parent.glob("models/*.py")) if spec else []
    files.append(Path(__file__).parents[1] / "models" / "t2t_vit.py")
    pattern = re.compile(r"^@register_model\s*\ndef (\w+)\(|^(t2t_vit_\w+) = _register\(", re.MULTILINE)
    return frozenset(
        name
        for file in files
        if file.exists()
        for pair in pattern.findall(file.read_text(encoding="utf-8"))
        for name in pair
        if name
    )


def own_patch(name: str) -> int:
    """The patch size in pixels that a model's name carries; 8 for VOLO."""
    found = re.search(r"patch(\d+)", name)
    return int(found.group(1)) if found else 8


def default_patch(name: str, image_size: int) -> int:
    """The model's own patch, or on small images one of 2 px or more that leaves about 8 x 8 tokens."""
    if image_size >= SMALL_IMAGE:
        return own_patch(name)
    if family(name) == "volo":
        return 4
    divisors = [size for size in range(2, image_size + 1) if image_size % size == 0]
    return min(divisors, default=1, key=lambda size: abs(image_size / size - 8))


def t2t_tokens(name: str, image_size: int) -> int:
    side = image_size
    for kernel, stride, padding in SOFT_SPLITS.get(name, IMAGENET_SPLITS):
        side = (side + 2 * padding - kernel) // stride + 1
    return max(side, 0) ** 2


def check_model(model: ModelConfig, image_size: int) -> None:
    """Fills `model.patch_size` and refuses sizes that the architecture cannot cut into tokens."""
    base = model.name.split(".")[0]  # timm's names may carry a pretrained tag
    names = known_models()
    if base not in names:
        raise ConfigError(f"model.name={model.name} is not in timm or dropkey.models{nearest(base, names)}")
    sized = model.depth is not None and model.embed_dim is not None
    require(
        not sized or base == RESIZED or family(base) == "t2t",
        f"model.name={model.name} with the depth and width of another model; take model=timm model.name={model.name}",
    )
    within("model.drop_path", model.drop_path, 0, 1, high_open=True)
    for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
        positive(f"model.{key}", getattr(model, key))
    if model.embed_dim and model.num_heads:
        require(
            model.embed_dim % model.num_heads == 0,
            f"model.embed_dim={model.embed_dim} is not divisible by model.num_heads={model.num_heads}",
        )
    kind = family(base)
    if kind == "t2t":
        require(model.patch_size is None, f"model.patch_size: {base} has soft splits, no patches; leave it null")
        tokens = t2t_tokens(base, image_size)
        require(
            tokens >= MIN_T2T_TOKENS,
            f"data.image_size={image_size} leaves {base} {tokens} tokens; "
            "take model=t2t_vit_small_image, or images of 48 px and more",
        )
    if kind in ("vit", "volo"):
        least = 4 if model.patch_size is None else 2  # patches a side; whoever asks for a patch may have fewer
        if model.patch_size is None:
            model.patch_size = default_patch(base, image_size)
        patch = model.patch_size
        if kind == "volo":
            require(patch in (4, 8, 16), f"model.patch_size={patch}: VOLO knows 4, 8 and 16")
        step = 2 * patch if kind == "volo" else patch  # VOLO halves its grid between outlook and self-attention
        why = "twice model.patch_size" if kind == "volo" else "model.patch_size"
        good = step * max(2, -(-image_size // step))
        require(
            image_size % step == 0,
            f"data.image_size={image_size} is not divisible by {why} ({step}); take data.image_size={good}",
        )
        require(
            image_size >= least * patch,
            f"data.image_size={image_size} is cut into {image_size // patch} x {image_size // patch} patches of "
            f"{patch} px, too few; take data.image_size={8 * (-(-max(image_size, 16) // 8))}, or set model.patch_size",
        )


# ------------------------------------------------------------------------------------------- regularizer, schedule


def check_regularizer(regularizer: RegularizerConfig, schedule: ScheduleConfig) -> None:
    one_of("regularizer.name", regularizer.name, schema.REGULARIZER_NAMES)
    within("regularizer.ratio", regularizer.ratio, 0, 1, high_open=True)
    one_of("regularizer.impl", regularizer.impl, schema.IMPLS)
    for site in regularizer.layers:
        one_of("regularizer.layers", site, schema.LAYERS)
    require(bool(regularizer.layers), f"regularizer.layers is empty; choices: {', '.join(schema.LAYERS)}")
    window, kind = regularizer.window, regularizer.name
    if kind in ("dropkey_block", "dropkey_cross"):
        full = kind == "dropkey_cross" and window == "full"
        odd = isinstance(window, int) and window > 0 and window % 2 == 1
        allowed = "3, 5, 7 ..." + (" or full" if kind == "dropkey_cross" else "")
        require(full or odd, f"regularizer.window={window}: {kind} takes an odd number of cells, {allowed}")
    else:
        require(window is None, f"regularizer.window={window}: only dropkey_block and dropkey_cross have a window")
    one_of("schedule.name", schedule.name, schema.SCHEDULES)
    within("schedule.end", schedule.end, 0, 1, high_open=True)
    if schedule.name != "constant" and kind != "none":
        require(
            schedule.end <= regularizer.ratio,
            f"schedule.end={schedule.end} exceeds regularizer.ratio={regularizer.ratio}, which is the peak",
        )


# ------------------------------------------------------------------------------------------------------- the rest


def check_data(data: DataConfig) -> None:
    if ":" not in data.name:
        one_of("data.name", data.name, schema.DATASETS)
    positive("data.image_size", data.image_size)
    require(data.channels in (1, 3), f"data.channels={data.channels} must be 1 or 3")
    within("data.val_fraction", data.val_fraction, 0, 1, high_open=True)
    within("data.test_fraction", data.test_fraction, 0, 1, high_open=True)
    within("data.crop_pct", data.crop_pct, 0.1, 1)
    require(
        data.crop_pct == 1 or not data.in_memory,
        f"data.crop_pct={data.crop_pct} needs data.in_memory=false: images kept in memory are cropped already; or data.crop_pct=1",
    )
    positive("data.max_train_samples", data.max_train_samples)
    positive("data.num_classes", data.num_classes)
    positive("data.num_workers", data.num_workers, zero=True)
    for key in ("mean", "std"):
        values = getattr(data, key)
        require(
            values is None or len(values) in (1, data.channels),
            f"data.{key} has {len(values or [])} values for data.channels={data.channels}; give one, or null",
        )
    require(data.std is None or min(data.std) > 0, f"data.std={data.std} must be above 0")


def check_augment(cfg: TrainConfig) -> None:
    augment = cfg.augment
    for key in ("hflip", "random_erasing", "mixup_prob"):
        within(f"augment.{key}", getattr(augment, key), 0, 1)
    within("augment.label_smoothing", augment.label_smoothing, 0, 1, high_open=True)
    for key in ("mixup", "cutmix", "crop_padding"):
        positive(f"augment.{key}", getattr(augment, key), zero=True)
    positive("augment.aug_repeats", augment.aug_repeats)
    scale = augment.crop_scale
    require(
        scale is None or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1),
        f"augment.crop_scale={scale} must be two shares of the area, such as [0.08, 1]",
    )
    require(
        augment.crop_padding < cfg.data.image_size,
        f"augment.crop_padding={augment.crop_padding} must be below data.image_size={cfg.data.image_size}",
    )


def check_training(cfg: TrainConfig) -> None:
    trainer, optim = cfg.trainer, cfg.optim
    for key in ("epochs", "max_steps", "batch_size", "grad_accum_steps", "eval_batch_size", "eval_every", "log_every"):
        positive(f"trainer.{key}", getattr(trainer, key))
    positive("trainer.checkpoint_minutes", trainer.checkpoint_minutes)
    one_of("trainer.amp", trainer.amp, schema.AMP)
    one_of("trainer.device", trainer.device, schema.DEVICES)
    if trainer.ema_decay is not None:
        within("trainer.ema_decay", trainer.ema_decay, 0, 1, high_open=True)
    chunks = trainer.grad_accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    require(
        trainer.batch_size % chunks == 0,
        f"trainer.batch_size={trainer.batch_size} is not divisible by processes x trainer.grad_accum_steps = {chunks}",
    )
    for key in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "momentum"):
        positive(f"optim.{key}", getattr(optim, key), zero=key != "lr")
    positive("optim.clip_grad_norm", optim.clip_grad_norm)


def check_logger(cfg: TrainConfig) -> None:
    one_of("logger.name", cfg.logger.name, ("wandb", "none"))
    one_of("logger.mode", cfg.logger.mode, ("offline", "online"))


def check(cfg: TrainConfig) -> TrainConfig:
    """The config with derived values filled in.

    Raises:
        ConfigError: a value or pair of values that cannot work; one line, with the key and the way out.
    """
    require(cfg.seed >= 0, f"seed={cfg.seed} must be 0 or more")
    check_data(cfg.data)
    check_regularizer(cfg.regularizer, cfg.schedule)
    check_model(cfg.model, cfg.data.image_size)
    check_augment(cfg)
    check_training(cfg)
    check_logger(cfg)
    if cfg.init_from is not None:
        require(Path(cfg.init_from).exists(), f"init_from={cfg.init_from} does not exist")
        require(not cfg.model.pretrained, "init_from and model.pretrained=true both give weights; take one")
    return cfg


def check_evaluation(cfg: EvalConfig) -> EvalConfig:
    """Likewise for eval.py: exactly one of `run` and `checkpoint`, and both must exist."""
    require(
        (cfg.run is None) != (cfg.checkpoint is None),
        "eval.py takes run=<run directory> or checkpoint=<file in one>, not both and not neither",
    )
    path = cfg.run or cfg.checkpoint
    require(Path(path).exists(), f"{'run' if cfg.run else 'checkpoint'}={path} does not exist")
    one_of("eval.split", cfg.eval.split, schema.SPLITS)
    one_of("eval.weights", cfg.eval.weights, ("last", "best"))
    one_of("eval.device", cfg.eval.device, schema.DEVICES)
    positive("eval.monte_carlo", cfg.eval.monte_carlo, zero=True)
    positive("eval.batch_size", cfg.eval.batch_size)
    if cfg.data is not None:
        check_data(cfg.data)
    return cfg
