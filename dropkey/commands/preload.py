"""What the parent of a table's jobs imports, once: see `dropkey.reproduction.forked`."""

import contextlib
import os

import matplotlib.pyplot  # noqa: F401  curves.png
import sklearn.datasets  # noqa: F401  the embedded digits
import torch._dynamo  # noqa: F401  every optimizer of torch imports it
import wandb  # noqa: F401

import dropkey.commands.eval
import dropkey.commands.train
import dropkey.evaluation
import dropkey.session  # noqa: F401

with contextlib.suppress(OSError):
    os.setsid()  # a signal to the launcher's group is for the launcher, which passes it on
