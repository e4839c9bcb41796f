"""Images with pairs of objects and the verbs between them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dropkey.detection.interaction_precision import Triplet, triplets
from dropkey.detection.scenes import Scenes


@dataclass
class Interactions(Scenes):
    """Categories are 0 to K - 1, subjects are of category 0, and verbs 0 to V - 1."""

    verbs: Sequence[str]  # their names
    possible: np.ndarray  # bool V K: verbs that an object can have
    instances: dict[Triplet, int]  # in the whole training set, before anything is held out of it
    sided: bool = False  # whether mirrored images would have other verbs
    notes: list[str] = field(default_factory=list)  # what was left out of the files, and why

    @property
    def classes(self) -> list[str]:
        """The pairs of verb and object that are possible, by name."""
        objects = [category["name"] for category in self.categories]
        return [f"{self.verbs[verb]} {objects[place]}" for verb, place in np.argwhere(self.possible).tolist()]


def counted(records: list[dict]) -> dict[Triplet, int]:
    return Counter(triplet for record in records for triplet in triplets(record))
