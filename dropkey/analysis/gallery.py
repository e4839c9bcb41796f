"""The gallery of a run: one HTML page with its config, result, curves, entropy, attention maps and worst mistakes."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Optional

import jinja2
import torch
from PIL import Image
from torch import Tensor

from dropkey.analysis import answers, boxes, figures, mesh_figures, meshes
from dropkey.analysis.answers import Answer
from dropkey.analysis.box_figures import as_pixels, drawn, enlarged
from dropkey.analysis.entropy import record_entropy
from dropkey.analysis.map_figures import overlay
from dropkey.analysis.maps import attention_maps, head_maps
from dropkey.analysis.trained import Trained, config_of, open_run
from dropkey.config import identity
from dropkey.config.identity import regularizer_label
from dropkey.config.schema import AugmentConfig, TrainConfig
from dropkey.errors import RunError
from dropkey.metrics import Metric
from dropkey.page import data_uri, page
from dropkey.plotting import draw_loss, draw_metric, save, style, subplots
from dropkey.records import clock, replace_file

SHOWN = 12  # images with their maps, and as many mistakes
ASKED, ASKED_FOR_BOXES = 2000, 500  # test images, evenly over the split, among which mistakes are looked for
SIDE = 176  # pixels of an image on the page
HEADS = (12, 12)  # layers and heads shown at most
TEMPLATE = Path(__file__).with_name("gallery.html.j2")


@dataclass
class Card:
    """A test image and its map, as addresses inside the page, and what is written below."""

    right: bool
    said: str
    more: str
    below: str
    shows: str  # the image in words
    image: str
    map: str
    beside: str = "where the model attends"  # the map in words


def write_gallery(run: str | Path, path: Path, root: Optional[str] = None) -> None:
    """Writes the page to `path`. What a run does not have (a result before its end, a map of the image where attention
    is in windows) is left out, with a sentence that says why.

    Args:
        root: where the run's images lie now.
    Raises:
        ConfigError, DataError, StorageError: see dropkey.errors.
    """
    trained, cfg = open_run(run, root), config_of(run)
    draw = {"classes": of_classes, "boxes": of_boxes, "meshes": of_meshes}[trained.task.shows]
    title = f"{regularizer_label(cfg)}: {identity.model_label(cfg)} on {identity.data_label(cfg)}, seed {cfg.seed}"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        result=result(trained, cfg),
        facts=facts(trained, cfg),
        curves=curves(trained),
        entropy=tried(lambda: entropy(trained, root)),
        **draw(trained),
        config=trained.run.config.read_text(encoding="utf-8"),
    )
    text = page(title, body)
    replace_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def tried(draw: Callable) -> tuple:
    """What `draw` returns, and why it is nothing."""
    try:
        return draw(), ""
    except RunError as error:
        return None, str(error)


def result(trained: Trained, cfg: TrainConfig) -> list[tuple[str, str]]:
    """Label and value of each metric on the test split; of a run that is not finished, how far it is."""
    summary = trained.run.summary()
    if summary:
        metrics = [Metric(**metric) for metric in summary["metrics"] if summary[metric["key"]] is not None]
        return [(one.label, one.format(summary[one.key]).removeprefix(one.label).strip()) for one in metrics]
    state = trained.run.status().get("state", "not finished")
    return [(f"{state}: no result yet", f"epoch {trained.position['epoch']} of {cfg.trainer.epochs}")]


def facts(trained: Trained, cfg: TrainConfig) -> list[tuple[str, str]]:
    summary, optim, usual = trained.run.summary(), cfg.optim, asdict(AugmentConfig())
    augment = [f"{key} {value}" for key, value in asdict(cfg.augment).items() if value != usual[key]]
    found = [
        ("regularizer", regularizer_label(cfg)),
        ("model", f"{cfg.model.name}, {sum(one.numel() for one in trained.model.parameters()):,} parameters"),
        ("training", f"{identity.training_facts(cfg)}, batches of {cfg.trainer.batch_size}"),
        ("optimizer", f"{optim.name}, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}"),
        ("augmentation", ", ".join(augment) or "none"),
    ]
    if cfg.init_from:
        found.append(("start", cfg.init_from))
    if summary:
        metric = Metric(**summary["metrics"][0])
        best = metric.format(summary[f"best_{metric.key}"])
        found += [
            ("best epoch", f"{summary['best_epoch']}: {best} on the {split_of(trained)} split"),
            ("test samples", f"{summary['samples']:,}"),
            ("time", f"{clock(summary['seconds'])}, {summary['samples_per_second']:,.0f} samples per second"),
            ("hardware", summary["hardware"]),
            ("commit", str(summary["commit"])[:10]),
        ]
    return [*found, ("run", trained.run.path.resolve().name)]


def split_of(trained: Trained) -> str:
    """The split that was watched during training."""
    watched = trained.run.summary().get("best_split", "val")
    return {"val": "validation"}.get(watched, watched)


def of_classes(trained: Trained) -> dict:
    """What a classifier adds to the page; of other tasks nothing."""
    found = answers.answers(trained, trained.spread(ASKED))
    shown, wrong = evenly(found), sum(not one.right for one in found)
    return {
        "asked": len(found),
        "looks": "Attention rollout over layers, from nothing (black) to each map's own maximum (light), on images "
        "evenly over the test split.",
        "maps": tried(lambda: cards(trained, shown)),
        "heads": tried(lambda: heads(trained, shown[:1])),
        "wrong": f"{wrong:,} of {len(found):,} test images are wrong. The wrong answers it is surest of:",
        "mistakes": tried(lambda: cards(trained, answers.worst(found, SHOWN))),
        "confusions": answers.confusions(found, 8),
    }


def of_boxes(trained: Trained) -> dict:
    """What a run that finds boxes adds to the page."""
    found = boxes.found(trained, trained.spread(ASKED_FOR_BOXES))
    false, missed, there = (sum(len(getattr(one, part)) for one in found) for part in ("false", "missed", "truths"))
    worst = sorted((one for one in found if one.false or one.missed), key=boxes.mistaken)[:SHOWN]
    looks = (
        "Left, what it finds with a score of 0.5 or more (cyan: right; red: false; white dashes: the truth). Right, "
        "what the query of the surest box attends to in the last layer, from nothing (black) to the maximum (light)."
    )
    return {
        "asked": len(found),
        "looks": f"{looks} Images evenly over the test split.",
        "maps": tried(lambda: box_cards(trained, evenly(found))),
        "heads": (None, ""),
        "wrong": f"In {len(found):,} test images with {there:,} objects, {missed:,} are missed and {false:,} boxes "
        "are false. First the images with the surest false box, then those with most missed:",
        "mistakes": tried(lambda: box_cards(trained, worst)),
        "confusions": answers.confusions([said for one in found for said in boxes.mistaken_for(one)], 8),
    }


def of_meshes(trained: Trained) -> dict:
    """What a run that finds meshes adds to the page."""
    found = meshes.found(trained, trained.spread(ASKED))
    ordered = sorted(found, key=lambda one: -one.error)
    return {
        "asked": len(found),
        "heading": "What it finds",
        "looks": f"Images evenly over the test split; {mesh_figures.LEGEND}.",
        "maps": tried(lambda: mesh_cards(trained, evenly(found))),
        "heads": (None, ""),
        "wrong": f"Of {len(found):,} test images half have {ordered[len(found) // 2]} or less. The worst:",
        "mistakes": tried(lambda: mesh_cards(trained, ordered[:SHOWN])),
        "confusions": [],
    }


def evenly(found: list) -> list:
    return found[:: max(1, len(found) // SHOWN)][:SHOWN]


# ------------------------------------------------------------------------------------------------------- pictures


def curves(trained: Trained) -> list[str]:
    """Loss and metric over epochs."""
    records, split = trained.run.records(), split_of(trained)
    return [
        chart(lambda axis: draw_loss(axis, records, split)),
        chart(lambda axis: draw_metric(axis, records, split, trained.task.metrics[0])),
    ]


def entropy(trained: Trained, root: Optional[str]) -> str:
    record, _ = record_entropy(trained.run.path, root)
    return chart(lambda axis: figures.draw_entropy(axis, [[record]], [""]))


def chart(draw: Callable) -> str:
    """What `draw` draws on an axis, as an address inside the page."""
    with style():
        figure, ((axis,),) = subplots(1, 1, (4.8, 3.2))
        draw(axis)
    return data_uri(save(figure).encode(), "svg+xml")


def cards(trained: Trained, chosen: list[Answer]) -> list[Card]:
    if not chosen:
        return []
    images, pictures = trained.images(ids_of(chosen))
    maps = attention_maps(trained.model, images)
    return [
        Card(
            answer.right,
            f"{'✓' if answer.right else '✗'} {answer.predicted}",
            "" if answer.right else f", is {answer.true}",
            f"{100 * answer.confidence:.0f} % sure, test {answer.position}",
            f"test image {answer.position}: {answer.true}",
            as_jpeg(enlarged(picture)),
            as_jpeg(overlay(picture, values[0])),
        )
        for answer, picture, values in zip(chosen, pictures, maps.values, strict=True)
    ]


def box_cards(trained: Trained, chosen: list[boxes.Found]) -> list[Card]:
    if not chosen:
        return []
    ids = torch.tensor([one.position for one in chosen])
    pictures = trained.pictures(ids)
    surest = [one.answers[0] for one in boxes.found(trained, ids, 0.0)]
    maps = boxes.query_maps(trained, [(one.position, mark.query) for one, mark in zip(chosen, surest, strict=True)])
    found = []
    for one, mark, picture, values in zip(chosen, surest, pictures, maps.values, strict=True):
        right = not (one.false or one.missed)
        image = drawn(picture, one.marks, scale=2.3)
        looked = drawn(picture, [mark], overlay(picture, values[0]), scale=2.3)
        said = (right, str(one), "", f"test {one.position}", f"test image {one.position}: {one}")
        found.append(Card(*said, as_jpeg(as_pixels(image)), as_jpeg(as_pixels(looked))))
    return found


def mesh_cards(trained: Trained, chosen: list[meshes.Found]) -> list[Card]:
    cards, pictures = [], trained.pictures(torch.tensor([one.position for one in chosen]))
    for one, picture in zip(chosen, pictures, strict=True):
        pixels = as_pixels(mesh_figures.drawn(picture, one.mesh, one.truth))
        image, side = pixels.tensor_split([pixels.shape[1] - pixels.shape[0]], dim=1)
        said = (True, str(one), "", f"test {one.position}", f"test image {one.position}: {one}")
        cards.append(Card(*said, as_jpeg(image), as_jpeg(side), "the same from the side, with the truth"))
    return cards


def heads(trained: Trained, chosen: list[Answer]) -> list[tuple[str, list[str]]]:
    """For one image a row of maps for each layer: its number and a map per head. Of a large model some layers, evenly
    over depth, and its first heads."""
    if not chosen:
        return []
    images, pictures = trained.images(ids_of(chosen))
    layers = list(head_maps(trained.model, images).items())
    if len(layers) > HEADS[0]:
        layers = [layers[i * (len(layers) - 1) // (HEADS[0] - 1)] for i in range(HEADS[0])]
    return [
        (str(number + 1), [as_jpeg(overlay(pictures[0], one), 96) for one in values[0, : HEADS[1]]])
        for number, values in layers
    ]


def ids_of(chosen: list[Answer]) -> Tensor:
    return torch.tensor([answer.position for answer in chosen])


def as_jpeg(colors: Tensor, side: int = SIDE) -> str:
    """H W 3 in [0, 1] as an address inside the page; `side`: pixels of its width."""
    pixels, content = (colors.clamp(0, 1) * 255).round().byte().numpy(), io.BytesIO()
    height = round(side * pixels.shape[0] / pixels.shape[1])
    Image.fromarray(pixels).resize((side, height), Image.Resampling.LANCZOS).save(content, "JPEG", quality=88)
    return data_uri(content.getvalue(), "jpeg")
