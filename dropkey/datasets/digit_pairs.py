"""Digits on larger canvases and how zeros stand to them: to try the detection of interactions.

A canvas has 1 or 2 zeros, which are the subjects, and 1 or 2 other digits, the objects; the rest is as in
`digit_scenes`. A zero and a digit whose centres are no more than two thirds of a canvas apart are a pair: the zero lies
left of, right of, above or below the digit, and may besides be larger. In training each digit is rarer than the one
before, so that the last ones make rare interactions; in validation and test all are as frequent.
"""

import random

import numpy as np

from dropkey.config.schema import DataConfig
from dropkey.datasets import digit_scenes
from dropkey.detection.interactions import Interactions, counted

VERBS = ("left of", "right of", "above", "below", "larger than")
FALL = 0.5  # how often a digit occurs in training, of the one before


def read(data: DataConfig, seed: int) -> Interactions:
    train, val, test = digit_scenes.splits(data, seed, "digit pairs", chosen)
    for split in (train, val, test):
        for record in split.records if split else ():
            record["pairs"] = pairs(record["annotations"], data.image_size * 2 / 3)
    possible = np.ones((len(VERBS), 10), dtype=bool)
    return Interactions(train, val, test, digit_scenes.CATEGORIES, VERBS, possible, counted(train.records), sided=True)


def chosen(name: str, scans_of: list[list[int]], draw: random.Random) -> list[list[int]]:
    subjects, objects = draw.randint(1, 2), draw.randint(1, 2)
    weights = [FALL**digit if name == "train" else 1 for digit in range(9)]
    return [scans_of[0]] * subjects + draw.choices(scans_of[1:], weights, k=objects)


def pairs(annotations: list[dict], far: float) -> list[list[int]]:
    """Positions of subject and object, and the verb."""
    found = []
    for subject, one in enumerate(annotations):
        for object_, other in enumerate(annotations):
            if one["category_id"] == 0 and other["category_id"] != 0:
                (x, y, size, _), (left, top, side, _) = one["bbox"], other["bbox"]
                across, down = left + side / 2 - x - size / 2, top + side / 2 - y - size / 2
                if across**2 + down**2 <= far**2:
                    verb = (0 if across > 0 else 1) if abs(across) >= abs(down) else 2 if down > 0 else 3
                    found += [[subject, object_, verb], *([[subject, object_, 4]] if size > side else [])]
    return found
