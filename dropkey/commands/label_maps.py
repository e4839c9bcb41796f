"""Makes label maps for VOLO's token labels: dropkey label-maps teacher=<model> data=... output=<folder>

    dropkey label-maps teacher=dm_nfnet_f6 data=imagenet data.root=/data/imagenet output=/data/label-maps
    dropkey label-maps teacher=runs/<directory> data=folder data.root=photos output=maps

The teacher is a run, or any CNN, ViT, Swin or VOLO of timm with its published weights. Each image gets one file,
<class>/<image>.pt: the five largest logits at each place of the teacher's last features, in the format of the published
maps (arXiv:2104.10858). Then: dropkey train experiment=imagenet_volo_d1 data.token_labels=/data/label-maps

All other words are overrides of train that choose the data. The same command again makes what is missing. Exit codes as
in train.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dropkey.config.check import check_data, check_values, in_range, require
from dropkey.config.compose import compose
from dropkey.config.geometry import known_models
from dropkey.config.run_lookup import find_run
from dropkey.config.schema import DEVICES
from dropkey.config.script_args import arg, parse, run_script, split
from dropkey.errors import ConfigError

EVERY = 30  # seconds between lines


@dataclass
class Args:
    teacher: str = arg("", "a model of timm, or a run")
    output: str = arg("", "the folder of maps")
    weights: str = arg("", "file of the teacher's weights; empty: the published ones, or the last of a run")
    size: Optional[int] = arg(None, "pixels of the images that the teacher sees; null: its own")
    batch_size: int = arg(64, "images at a time")
    device: str = arg("auto", "where to compute", choices=DEVICES)


def main(words: list[str]) -> None:
    own, overrides = split(Args, words)
    args = parse(Args, own, __doc__)
    for key in ("teacher", "output"):
        require(bool(getattr(args, key)), f"{key}= is missing")
    in_range("batch_size", args.batch_size, "above 0")
    published = args.teacher.partition(".")[0] in known_models()
    try:
        directory = None if published else find_run(args.teacher, key="teacher")
    except ConfigError as error:
        raise ConfigError(f"teacher={args.teacher} is no model of timm; {error}") from None
    require(published or args.size is None, "size is for a teacher of timm; a run has its own")
    cfg = compose(overrides)
    check_values(cfg)
    check_data(cfg.data)

    from dropkey import loading  # imports torch and timm: seconds, so after the checks
    from dropkey.engine.distributed import pick_device
    from dropkey.tasks import label_maps

    device, folder = pick_device(args.device, key="device"), Path(args.output).expanduser()
    dataset = label_maps.images_to_label(cfg.data)
    if published:
        teacher = label_maps.published_teacher(args.teacher, args.size, args.weights)
    else:
        run = loading.load(directory, args.weights or "last", device=args.device)
        teacher = label_maps.Teacher(run.model, directory.name, run.config.data, run.classes)
    label_maps.require_fit(teacher, dataset)
    label_maps.claim(folder, teacher)
    shown, done = 0.0, 0
    for done, total in label_maps.make(teacher, dataset, folder, cfg.data.num_workers, args.batch_size, device):
        if time.monotonic() - shown > EVERY:
            print(f"{done:,} of {total:,} maps", flush=True)
            shown = time.monotonic()
    print(f"wrote  {folder}  ({done:,} maps)")


def start() -> None:
    run_script(main)
