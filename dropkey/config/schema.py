"""Every key of a run, with its type, its one default and its range.

YAML files under configs/ hold only what differs. Standard library alone: a mistake in the config is reported before
torch is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union

REGULARIZER_NAMES = (
    *("none", "dropout", "dropkey", "dropkey_block", "dropkey_cross", "dropkey_column"),
    *("dropkey_block_column", "dropkey_cross_column", "dropattention"),
)
SCHEDULES = ("constant", "decreasing", "increasing")
OVER = ("depth", "training")
LAYERS = ("self", "class", "cross", "outlook", "token", "layer")
SCOPES = ("model", "stack")
IMPLS = ("auto", "reference", "cpu", "triton", "sdpa")
FOLDERS = ("folder", "shards", "parquet")
BY_ROOT = (*FOLDERS, "coco_format", "mesh_folder")  # data sets that are whatever is under data.root
OWN_VALIDATION = ("imagenet", *BY_ROOT)  # data sets that may bring a validation split
DATASETS = ("digits", "cifar10", "cifar100", "imagenet", *FOLDERS)
PAIRS = ("digit_pairs", "hico_det")  # data sets of images with boxes and interactions, for task=interaction
SCENES = ("digit_scenes", "coco", "coco_format", *PAIRS)  # data sets of images with boxes, for task=detection
MESHES = ("stick_figures", "mesh_folder")  # data sets of images with meshes, for task=mesh
AMP = ("none", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
SPLITS = ("test", "val", "train")


@dataclass
class TaskConfig:
    name: str = "classification"  # one of dropkey.tasks.TASKS, or module:Class
    args: Dict[str, Any] = field(default_factory=dict)  # further arguments of the class


@dataclass
class ModelConfig:
    name: str = "vit_tiny_patch16_224"  # any architecture of timm or dropkey.models
    patch_size: Optional[int] = None  # pixels; null: the model's own, on images below 96 px a smaller one that fits
    embed_dim: Optional[int] = None  # token width; null: the model's own (also for the next three)
    depth: Optional[int] = None  # blocks
    num_heads: Optional[int] = None  # attention heads per block
    mlp_ratio: Optional[float] = None  # hidden width of the MLP / token width
    drop_path: float = 0.0  # stochastic depth of the last block; rises linearly from 0
    pretrained: bool = False  # timm's published weights (needs a network, or timm's cache)
    args: Dict[str, Any] = field(default_factory=dict)  # further arguments of the timm constructor


@dataclass
class RegularizerConfig:
    name: str = "dropkey"  # one of REGULARIZER_NAMES
    ratio: float = 0.1  # drop probability in [0, 1); the peak when a schedule varies it
    window: Optional[Union[int, float, str]] = None  # an odd number of cells, or a share of the grid; cross: also full
    layers: List[str] = field(default_factory=lambda: ["self", "class"])  # attention layers it acts on, of LAYERS
    modules: List[str] = field(default_factory=list)  # parts of the model it acts on, such as encoder; empty: all
    scope: str = "model"  # a schedule over depth runs over the whole model, or over each stack separately
    impl: str = "auto"  # how regularized attention is computed, one of IMPLS


@dataclass
class ScheduleConfig:
    name: str = "decreasing"  # how the ratio changes, one of SCHEDULES
    end: float = 0.0  # the ratio at the low end of a decreasing or increasing schedule
    over: str = "depth"  # depth: from layer to layer; training: from step to step, the same ratio in all layers


@dataclass
class DataConfig:
    name: str = "digits"  # one of the group data, or module:function
    root: str = "data"  # directory that holds the images, or receives a download
    download: bool = True  # fetch CIFAR when it is not under root
    image_size: int = 8  # pixels, height and width as the model sees them
    channels: int = 3  # 1 grey, 3 colour; files are converted
    num_classes: Optional[int] = None  # how many classes there must be; null: as many as are found
    mean: Optional[List[float]] = None  # per channel, of images in [0, 1]; null: 0.5
    std: Optional[List[float]] = None  # per channel; null: 0.5
    val_fraction: float = 0.1  # share of the training images held out when the set has no validation split
    test_fraction: float = 0.2  # share held out for testing when the set has neither test nor validation split
    max_train_samples: Optional[int] = None  # train on this many images only, equally many per class
    split_seed: Any = 0  # seed of that choice and of the held-out validation images; "run": the run's own seed
    in_memory: bool = True  # keep decoded images as one uint8 tensor on the device; false: decode them for each batch
    token_labels: Optional[str] = None  # folder of a teacher's label maps, for VOLO with MixToken; null: off
    crop_pct: float = 1.0  # evaluation: centre crop / resized side
    num_workers: Optional[int] = None  # processes that decode; null: as many as this process has cores, at most 16


@dataclass
class AugmentConfig:
    hflip: float = 0.0  # probability of mirroring horizontally
    crop_padding: int = 0  # pixels of border before a random crop of image_size
    border: str = "reflect"  # what that border shows: reflect (the image mirrored) or black
    crop_scale: Optional[List[float]] = None  # random resized crop: least and largest share of the area
    interpolation: str = "bicubic"  # of that crop and of RandAugment; random: bilinear or bicubic, drawn for each image
    rand_augment: Optional[str] = None  # timm's policy string, such as rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0  # probability of random erasing
    erase_mixed: bool = False  # erase after mixup and cutmix, which then do not thin the noise; false: before
    aug_repeats: int = 1  # repeated augmentation: copies of each image in an epoch, which then has fewer images
    mixup: float = 0.0  # alpha of mixup's Beta distribution; 0: off
    cutmix: float = 0.0  # alpha of cutmix's Beta distribution; 0: off
    mixup_prob: float = 1.0  # probability that a batch is mixed at all
    label_smoothing: float = 0.0  # share of each target that is spread over all classes


@dataclass
class OptimConfig:
    name: str = "adamw"  # any timm optimizer
    lr: float = 2e-3  # peak learning rate, for the global batch as given (never rescaled)
    weight_decay: float = 0.05  # not applied to biases, norms and what the model exempts; see the next key
    filter_bias_and_bn: bool = True  # false: weight decay on all parameters
    momentum: float = 0.9  # of SGD and RMSprop
    warmup_epochs: float = 1.0  # linear warm-up, per step, from warmup_lr
    warmup_lr: float = 1e-6  # where the warm-up begins
    sched: str = "cosine"  # after the warm-up: cosine to min_lr, or step: times decay_rate every decay_epochs
    decay_epochs: Optional[float] = None  # sched=step: epochs between decays, from the start of training
    decay_rate: float = 0.1  # sched=step: factor of each decay
    cooldown_epochs: float = 0.0  # the last epochs, at min_lr; part of trainer.epochs
    min_lr: float = 1e-6  # where the cosine ends
    clip_grad_norm: Optional[float] = None  # largest gradient norm; null: no clipping
    lr_scale: Dict[str, Any] = field(default_factory=dict)  # factor on lr for parts of the model: {head: 10}
    layer_decay: Optional[float] = None  # factor on lr from each layer to the one before it; null: off
    args: Dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer, such as betas


@dataclass
class TrainerConfig:
    epochs: int = 40  # passes over the training images
    max_steps: Optional[int] = None  # stop after this many optimizer steps
    batch_size: int = 64  # global: over all processes and microbatches
    grad_accum_steps: int = 1  # microbatches of a process per optimizer step
    eval_batch_size: int = 256  # global
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    amp: str = "none"  # autocast: none, bf16 or fp16
    ema_decay: Optional[float] = None  # moving average of the weights, evaluated in their place; null: off
    ema_warmup: bool = True  # smaller decay in the first steps; false: ema_decay from the first step
    compile: bool = False  # torch.compile
    channels_last: bool = False  # memory format, for models that begin with convolutions
    find_unused_parameters: bool = False  # DDP: for models that do not use all parameters in each step
    overfit: bool = False  # debugging: train on the first batch only
    profile: bool = False  # debugging: trace steps 5 to 10 with torch.profiler
    device: str = "auto"  # one of DEVICES; auto: the first available of cuda, mps, cpu
    checkpoint_minutes: float = 10.0  # minutes between checkpoints within an epoch; there is one after every epoch
    log_every: int = 50  # optimizer steps between step records


@dataclass
class LoggerConfig:
    name: str = "wandb"  # wandb or none; the records on disk are written either way
    mode: Optional[str] = None  # offline, or online: sync while training; null: as WANDB_MODE says, else offline
    project: str = "dropkey"  # W&B project
    entity: Optional[str] = None  # W&B team or user; null: the account's default
    tags: List[str] = field(default_factory=list)  # tags of the W&B run


@dataclass
class TrainConfig:
    seed: int = 0  # initialisation, data order, augmentation, masks
    output: str = "runs"  # directory that holds run directories
    overwrite: bool = False  # start over, even where the run has a checkpoint or is finished
    init_from: Optional[str] = None  # weights to start from: a run (path, name or hash) or a checkpoint file
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class EvaluationConfig:
    split: str = "test"  # one of SPLITS
    weights: str = "last"  # last or best checkpoint of the run
    monte_carlo: int = 0  # average this many passes with the regularizer on; 0: one pass without
    batch_size: Optional[int] = None  # null: as in training
    device: str = "auto"  # one of DEVICES; auto: the first available of cuda, mps, cpu


@dataclass
class EvalConfig:
    run: Optional[str] = None  # a run: its path, name, hash, or the beginning of one
    checkpoint: Optional[str] = None  # or one checkpoint file of a run
    root: Optional[str] = None  # where the run's own data is now; null: where it was in training
    data: Optional[DataConfig] = None  # another data set of the same classes; null: the run's own
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)


RANGES = {  # none of them holds NaN
    "above 0": lambda number: number > 0,
    "0 or more": lambda number: number >= 0,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
    "in [0.1, 1]": lambda number: 0.1 <= number <= 1,
    "in [-1000, 1000]": lambda number: -1000 <= number <= 1000,
}
COUNT, SIZE, FACTOR = 10**9, 10**5, 1000  # the most that keys can have which have no natural end
VALUES = (  # keys, and the range or the choices that their values must be in; null is left to the type
    (
        "data.max_train_samples data.num_classes trainer.epochs trainer.max_steps trainer.batch_size "
        "trainer.grad_accum_steps trainer.eval_batch_size trainer.eval_every trainer.log_every "
        "trainer.checkpoint_minutes optim.clip_grad_norm optim.decay_epochs eval.batch_size",
        "above 0",
        COUNT,
    ),
    ("model.patch_size model.embed_dim data.image_size", "above 0", SIZE),
    ("model.depth model.num_heads model.mlp_ratio data.std augment.aug_repeats optim.lr", "above 0", FACTOR),
    ("seed", "0 or more", 2**63 - 1),
    ("optim.warmup_epochs optim.cooldown_epochs eval.monte_carlo", "0 or more", COUNT),
    ("augment.crop_padding", "0 or more", SIZE),
    (
        "data.num_workers augment.mixup augment.cutmix optim.weight_decay optim.warmup_lr optim.min_lr",
        "0 or more",
        FACTOR,
    ),
    ("data.mean", "in [-1000, 1000]"),
    (
        "model.drop_path regularizer.ratio schedule.end data.val_fraction data.test_fraction augment.label_smoothing "
        "trainer.ema_decay optim.momentum",
        "in [0, 1)",
    ),
    ("augment.hflip augment.random_erasing augment.mixup_prob", "in [0, 1]"),
    ("augment.crop_scale optim.decay_rate", "in (0, 1]"),
    ("data.crop_pct optim.layer_decay", "in [0.1, 1]"),
    ("data.channels", (1, 3)),
    ("regularizer.name", REGULARIZER_NAMES),
    ("regularizer.layers", LAYERS),
    ("regularizer.scope", SCOPES),
    ("regularizer.impl", IMPLS),
    ("schedule.name", SCHEDULES),
    ("schedule.over", OVER),
    ("optim.sched", ("cosine", "step")),
    ("augment.border", ("reflect", "black")),
    ("augment.interpolation", ("bicubic", "random")),
    ("trainer.amp", AMP),
    ("trainer.device eval.device", DEVICES),
    ("logger.name", ("wandb", "none")),
    ("logger.mode", ("offline", "online")),
    ("eval.split", SPLITS),
    ("eval.weights", ("last", "best")),
)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif value != {}:
            flat[prefix + key] = value
    return flat
