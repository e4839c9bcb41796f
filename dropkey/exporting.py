"""A run's model as files that other programs read. Before they get their names, they are read again and compared with
the model."""

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dropkey import tasks
from dropkey.config.check import require
from dropkey.errors import ConfigError, RunError, StorageError
from dropkey.loading import TrainedModel, initial_model
from dropkey.records import current_umask

Written = Callable[[Tensor], Tensor | tuple[Tensor, ...]]  # the exported model, read again: images (B, C, H, W) ->
# logits (B, classes), or what `Task.exported` says
SUFFIXES = {"timm": "", "safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = 1e-4  # of the largest logit
ONE_FILE = 2**30  # bytes of weights; above, ONNX keeps them in a second file, because one can have 2 GiB


def export(trained: TrainedModel, format: str, output: Path, overwrite: bool = False) -> tuple[float, list[Path]]:
    """Writes the model, which must be on the CPU: a folder `output` for timm, otherwise a file, and a .json beside it
    with classes and preprocessing, as config.json of timm has them.

    Returns:
        The largest difference of the logits of the files from those of the model, and the files.
    Raises:
        ConfigError: one of the files exists, a package is missing, torch cannot export this model.
        RunError: the files give other logits; they are not kept.
        StorageError: they cannot be written.
    """
    shows, others = trained.task.shows, "choose safetensors, torch_export or onnx"
    no_timm = f"format=timm is for classifiers; {others} for a run that finds {shows}"
    require(format != "timm" or shows == "classes", no_timm)
    for package in NEEDED.get(format, ()):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ConfigError(f"format={format} needs {package}: pip install 'dropkey[export]'") from None
    info = json.dumps(trained.info, indent=2) + "\n"
    folder, name, described = output.parent, output.name, output.with_suffix(".json").name
    if format == "timm":
        folder, name, described = output, "model.safetensors", "config.json"
    there = folder / described
    same = there.exists() and there.read_text(encoding="utf-8") == info
    for taken in (folder / name, *([] if same else [there])):
        require(overwrite or not taken.exists(), f"{taken} exists; choose another output=, or overwrite=true")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
            file = Path(temporary) / name
            (file.parent / described).write_text(info, encoding="utf-8")
            difference = compare(trained, WRITERS[format](trained, file))
            files = sorted(file.parent.iterdir())
            for each in files:
                os.replace(each, folder / each.name)
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error}") from None
    return difference, [folder / each.name for each in files]


def usage(trained: TrainedModel, format: str, output: Path) -> list[str]:
    """Lines of Python that read the files."""
    name = trained.info["architecture"]
    given = ", ".join(f"{key}={value!r}" for key, value in trained.info["model_args"].items())
    lines = {
        "timm": [f'timm.create_model("local-dir:{output}", pretrained=True)'],
        "safetensors": [f'timm.create_model("{name}", checkpoint_path="{output}", {given})'],
        "torch_export": [f'torch.export.load("{output}").module()(images)'],
        "onnx": [f'onnxruntime.InferenceSession("{output}").run(None, {{"images": images}})'],
    }[format]
    of_timm = any(cls.__module__.startswith("timm.") for cls in type(trained.model).__mro__)  # VOLO with MixToken too
    if "timm.create_model" in lines[0] and not of_timm:
        lines.insert(0, f"import dropkey.models  # timm alone does not know {name}, which is written here")
    return lines


def compare(trained: TrainedModel, written: Written) -> float:
    """The largest difference of outputs, for batches of 1 and 3 images."""
    model, names = trained.task.exported(trained.model)
    largest = 0.0
    for count in (1, 3):
        images = examples(trained, count)
        with torch.inference_mode():
            outputs = (tupled(model(images)), tupled(written(images)))
        for name, wanted, found in zip(names, *outputs, strict=True):
            difference = (wanted - found).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):  # NaN too
                raise RunError(
                    f"the exported model is another one: its {name} differ by {difference:.2g}; it is not kept"
                )
            largest = max(largest, difference)
    return largest


def tupled(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def examples(trained: TrainedModel, count: int) -> Tensor:
    """Noise of the model's input shape."""
    shape, generator = trained.info["pretrained_cfg"]["input_size"], torch.Generator().manual_seed(count)
    return torch.randn(count, *shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------ formats


def to_timm(trained: TrainedModel, file: Path) -> Written:
    save_weights(trained, file)
    return timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()


def to_safetensors(trained: TrainedModel, file: Path) -> Written:
    save_weights(trained, file)
    model = initial_model(tasks.build(trained.config), trained.info).eval()
    model.load_state_dict(load_file(file))
    return trained.task.exported(model)[0]


def save_weights(trained: TrainedModel, file: Path) -> None:
    own = {"memory_format": torch.contiguous_format}  # a copy of each: shared memory is refused
    weights = {name: value.clone(**own) for name, value in trained.model.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})  # without it transformers refuses a file
    os.chmod(file, 0o666 & ~current_umask())


def to_torch_export(trained: TrainedModel, file: Path) -> Written:
    torch.export.save(program(trained), file)
    return torch.export.load(file).module()


def to_onnx(trained: TrainedModel, file: Path) -> Written:
    import onnxruntime

    outputs = trained.task.exported(trained.model)[1]
    captured, names = program(trained), {"input_names": ["images"], "output_names": outputs}
    with refused(trained, "ONNX cannot hold"):
        exported = torch.onnx.export(captured, dynamo=True, verbose=False, **names)
    for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        value.shape[0] = "batch"
    size = sum(value.nbytes for value in trained.model.state_dict().values())
    exported.save(file, external_data=size > ONE_FILE)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(outputs, {"images": images.numpy()})))


def program(trained: TrainedModel) -> torch.export.ExportedProgram:
    """The model with a batch of any size."""
    batch = {0: torch.export.Dim("batch")}
    with refused(trained, "torch.export cannot capture"):
        model, _ = trained.task.exported(trained.model)
        return torch.export.export(model, (examples(trained, 2),), dynamic_shapes=(batch,), strict=True)


@contextlib.contextmanager
def refused(trained: TrainedModel, what: str) -> Iterator[None]:
    """Makes whatever torch raises where it cannot do it one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{what} {trained.info['architecture']}: {reason}") from error


WRITERS = {"timm": to_timm, "safetensors": to_safetensors, "torch_export": to_torch_export, "onnx": to_onnx}
