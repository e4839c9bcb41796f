"""Put a regularizer into the attention layers of any model, and take it out again."""

from dropkey.patching.patch import RegularizedLayer, Report, always_on, apply, seed_masks, set_ratio, undo

__all__ = ["RegularizedLayer", "Report", "always_on", "apply", "seed_masks", "set_ratio", "undo"]
