"""COCO's average precision, by pycocotools."""

import contextlib
import io
from typing import Optional

import numpy as np

from dropkey.errors import ConfigError

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # of COCOeval's twelve, the first six


def average_precision(records: list[dict], detections: np.ndarray) -> dict[str, Optional[float]]:
    """Percent; None where there is nothing of that size.

    Args:
        records: every image that was looked at, as COCO has them, each with its `annotations` besides.
        detections: float64 N 7: image id, left, top, width, height in pixels, score, category id.
    Raises:
        ConfigError: pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ConfigError("average precision needs pycocotools: pip install 'dropkey[detection]'") from None
    records = sorted(records, key=lambda record: record["id"])
    annotations = [one for record in records for one in record["annotations"]]
    truth, found = COCO(), COCO()
    truth.dataset = {
        "images": [{key: record[key] for key in ("id", "width", "height")} for record in records],
        # numbered anew from 1: an id of 0 would mean "unmatched"
        "annotations": [{"iscrowd": 0, **one, "id": number} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": number} for number in sorted({one["category_id"] for one in annotations})],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        truth.createIndex()
        if len(detections):
            # by image, in the order found within it: so that the sums do not depend on who found them
            found = truth.loadRes(detections[np.argsort(detections[:, 0], kind="stable")])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = evaluation.stats[: len(FIGURES)].tolist()
    return {key: 100 * value if value >= 0 else None for key, value in zip(FIGURES, values, strict=True)}
