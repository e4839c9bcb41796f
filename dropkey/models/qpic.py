"""QPIC (Tamura et al., 2021, arXiv:2103.05399): DETR whose queries each find a pair, a subject and an object, with all
verbs between them.

Names of weights are those of hitachi-rd-cv/qpic; `checkpoint_filter_fn` converts those of DETR. Shape letters: as in
`dropkey.models.detr`, and V verbs.
"""

from typing import Optional

import torch
from torch import Tensor, nn

from dropkey.models import detr
from dropkey.models.detr import MLP, SMALL, Trunk, register

# COCO's ids of its 80 categories, which are the 80 objects of HICO-DET in this order.
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


class QPIC(Trunk):
    """
    Args:
        verb_bias: with which the verbs' outputs begin; None: about 0. Below 0 few pairs are taken to have a verb.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        num_verbs: int = 117,
        verb_bias: Optional[float] = None,
        embed_dim: int = 256,
        **trunk,
    ):
        super().__init__(embed_dim=embed_dim, **trunk)
        self.pretrained_cfg = {"classifier": ("obj_class_embed", "verb_class_embed")}
        self.obj_class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.verb_class_embed = nn.Linear(embed_dim, num_verbs)
        self.sub_bbox_embed, self.obj_bbox_embed = MLP(embed_dim, 4), MLP(embed_dim, 4)
        if verb_bias is not None:
            nn.init.constant_(self.verb_class_embed.bias, verb_bias)

    def forward(self, images: Tensor, padding: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of objects L B Q K+1 (the last: no object) and of verbs L B Q V, boxes of subjects and of objects
        L B Q 4 (centre, width, height as shares of the real image); in evaluation of the last layer alone, L = 1."""
        levels = self.levels(images, padding)
        x = torch.stack(levels if self.training else levels[-1:])
        boxes = (embed(x).sigmoid() for embed in (self.sub_bbox_embed, self.obj_bbox_embed))
        return self.obj_class_embed(x), self.verb_class_embed(x), *boxes


def checkpoint_filter_fn(weights: dict[str, Tensor], model: QPIC) -> dict[str, Tensor]:
    """From a state dict of QPIC as it is, or of DETR as officially: both kinds of boxes begin as DETR's, and objects
    as its classes, those of COCO under their place among the 80; the verbs are new."""
    found = detr.checkpoint_filter_fn(weights, model)
    if "class_embed.weight" not in found:
        return found
    for name in [name for name in found if name.startswith("bbox_embed.")]:
        value = found.pop(name)
        found |= {f"{kind}_{name}": value for kind in ("sub", "obj")}
    objects = len(model.obj_class_embed.weight)
    for kind in ("weight", "bias"):
        rows = found.pop(f"class_embed.{kind}")
        if len(rows) == COCO_IDS[-1] + 2 and objects == len(COCO_IDS) + 1:
            rows = rows[[*COCO_IDS, -1]]
        found[f"obj_class_embed.{kind}"] = rows
    return found


qpic_r50 = register("qpic_r50", QPIC)
qpic_r101 = register("qpic_r101", QPIC, backbone="resnet101")
qpic_small = register("qpic_small", QPIC, **SMALL, num_queries=8, num_verbs=5, verb_bias=-2.0)
