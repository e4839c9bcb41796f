"""Writes a run's model for other programs: dropkey export run=<run> format=timm|safetensors|torch_export|onnx

timm          a folder with config.json and model.safetensors, for timm.create_model("local-dir:<folder>")
safetensors   the weights alone, under timm's names
torch_export  a program for torch.export.load (.pt2), with a batch of any size
onnx          for ONNX Runtime and others, with a batch of any size; needs pip install 'dropkey[export]'

The regularizer is not exported: it has no effect in evaluation. Exported models take images as `transform` of
dropkey.load makes them and give logits; config.json, or the .json beside the file, has classes and preprocessing. A run
that finds boxes gives logits (images x queries x classes, the last: no object) and boxes (centre, width, height as
shares of the image); one that finds meshes gives vertices, joints (both in metres) and camera of normalised square
images; neither has format=timm. Each export is read again and compared with the model. A run is a path, name or hash,
or the beginning of one. Exit codes as in train.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dropkey.config.check import require
from dropkey.config.run_lookup import find_run
from dropkey.config.script_args import arg, parse, run_script

FORMATS = ("timm", "safetensors", "torch_export", "onnx")


@dataclass
class Args:
    run: str = arg("", "the run")
    format: str = arg("timm", "what to write", choices=FORMATS)
    output: str = arg("", "a folder for timm, otherwise a file; empty: export/ in the run's directory")
    weights: str = arg("last", "last, best, or a checkpoint file")
    root: Optional[str] = arg(None, "where the run's images are now; needed once for runs without model.json")
    overwrite: bool = arg(False, "replace files that exist")


def main(words: list[str]) -> None:
    args = parse(Args, words, __doc__)
    require(bool(args.run), "run= is missing, such as run=runs/<directory>")
    directory = find_run(args.run)

    from dropkey import exporting, loading  # import torch and timm: seconds, so after the checks

    trained = loading.load(directory, args.weights, device="cpu", root=args.root)
    output = Path(args.output or directory / "export" / ("timm" if args.format == "timm" else "model"))
    if args.format != "timm":
        output = output / "model" if output.is_dir() else output
        output = output if output.suffix else output.with_suffix(exporting.SUFFIXES[args.format])
    difference, files = exporting.export(trained, args.format, output, args.overwrite)
    for file in files:
        print(f"wrote  {file}  ({file.stat().st_size:,} bytes)")
    print(f"check  read again, its outputs differ from the model's by {difference:.1e} at most")
    for line in exporting.usage(trained, args.format, output):
        print(f"use    {line}")


def start() -> None:
    run_script(main)
