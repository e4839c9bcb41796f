"""One thread per test process: tests run in parallel, and sums come out the same on any number of cores."""

import torch

torch.set_num_threads(1)
