"""Models by name: those of timm, and those written here, which importing this package registers with timm."""

from dropkey.models import ceit, detr, metro, qpic, t2t_vit  # noqa: F401  (registers their models)
from dropkey.models.create import constructor_arguments, create_model

__all__ = ["constructor_arguments", "create_model"]
