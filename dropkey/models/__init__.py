"""Models written here; importing this package registers them with timm."""

from . import t2t_vit  # noqa: F401 (registers the t2t_vit models)
