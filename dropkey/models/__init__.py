"""Models written here; importing this package makes them known to `timm.create_model`."""

from . import t2t_vit  # noqa: F401 (registers the t2t_vit models)
