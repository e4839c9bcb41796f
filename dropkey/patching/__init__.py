"""Put a regularizer into the attention layers of any model, and take it out again."""

from dropkey.patching.patch import always_on, apply, seed_masks, set_ratio, undo
from dropkey.patching.reports import RegularizedLayer, Report, report

__all__ = ["RegularizedLayer", "Report", "always_on", "apply", "report", "seed_masks", "set_ratio", "undo"]
