"""What is learned: each task is one file here and one config in configs/task/.

task = tasks.build(cfg)  # cfg.task.name is a key of TASKS, or `module:Class` of your own
"""

import importlib
import inspect
from typing import TYPE_CHECKING

from dropkey.config.check import nearest
from dropkey.config.schema import TrainConfig
from dropkey.errors import ConfigError

if TYPE_CHECKING:
    from dropkey.tasks.base import Task

TASKS = {
    "classification": "dropkey.tasks.classification:Classification",
    "detection": "dropkey.tasks.detection:Detection",
    "interaction": "dropkey.tasks.interaction:Interaction",
    "mesh": "dropkey.tasks.mesh:MeshRecovery",
}


def build(cfg: TrainConfig) -> "Task":
    """The task that `cfg.task` names.

    Raises:
        ConfigError: no such task, or arguments that it does not take.
    """
    place = TASKS.get(cfg.task.name, cfg.task.name)
    module, _, name = place.partition(":")
    if not name:
        raise ConfigError(f"task.name={cfg.task.name} does not exist{nearest(cfg.task.name, TASKS)} (or module:Class)")
    try:
        kind = getattr(importlib.import_module(module), name)
        known = inspect.signature(kind).parameters
        free = any(one.kind is one.VAR_KEYWORD for one in known.values())
        for key in () if free else sorted(cfg.task.args.keys() - known.keys()):
            hint = nearest(key, [*known][1:]) if len(known) > 1 else ", which has none"
            raise ConfigError(f"task.args.{key} is no argument of task={cfg.task.name}{hint}")
        return kind(cfg, **cfg.task.args)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"task.name={cfg.task.name}: {error}") from None
