"""DropKey and its relatives for any Vision Transformer.

    import dropkey
    dropkey.apply(model, "dropkey", ratio=0.1, schedule="decreasing")

Names load when they are first used, so that importing the package costs nothing.
"""

import importlib

__version__ = "0.1.0"
_HOME = {
    "train": "dropkey.api",
    "compose": "dropkey.config.compose",
    "load": "dropkey.loading",
    "attention": "dropkey.operator",
    "apply": "dropkey.patching",
    "undo": "dropkey.patching",
    "set_ratio": "dropkey.patching",
    "report": "dropkey.patching",
    "seed_masks": "dropkey.patching",
    "always_on": "dropkey.patching",
}
__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dropkey' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
