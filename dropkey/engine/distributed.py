"""One process or many: rank, device, and the few collectives that training needs."""

import contextlib
import os
import signal
from dataclasses import dataclass
from typing import Iterator

import torch
import torch.distributed as dist

from dropkey.errors import ConfigError, Interrupted


def pick_device(wanted: str, local_rank: int = 0, key: str = "trainer.device") -> torch.device:
    """auto, cuda, mps or cpu -> the device of this process; `key` is what messages call it.

    Raises:
        ConfigError: no such device here.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, available in there.items() if available) if wanted == "auto" else wanted
    if not there[kind]:
        found = [name for name, available in there.items() if available]
        raise ConfigError(f"{key}={kind}: torch finds no such device here, only {', '.join(found)}")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"process {local_rank} of this machine has no GPU; there are {torch.cuda.device_count()}")
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def store_of_this_restart(store: dist.Store) -> dist.Store:
    """The store through which the processes find each other, without the addresses of processes before a restart:
    torchrun keeps the store over restarts (torch 2.14), and 1 of 4 restarts then failed to connect.
    On several machines the restart counts may differ, so there the store is used as it is."""
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def signals_end_the_process() -> Iterator[None]:
    """While processes meet, what asks to stop ends them at once: nothing is to be saved yet, and torch, which waits
    half an hour for a torchrun that was killed, lets no handler of Python's run meanwhile."""
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    changed = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup's SIGHUP
    for number in changed:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


@dataclass
class DistContext:
    """The processes of a torchrun job, or this one alone, and the rank of this process."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def start(wanted_device: str, key: str = "trainer.device") -> "DistContext":
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = pick_device(wanted_device, int(os.environ.get("LOCAL_RANK", 0)), key)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size > 1:
            # tensors on the host go through gloo, on the GPU through nccl
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with signals_end_the_process():
                store, _, _ = next(dist.rendezvous("env://"))
                dist.init_process_group(backend, store=store_of_this_restart(store), rank=rank, world_size=size)
        return DistContext(rank, size, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, on the host; `tensor` stays as it is."""
        tensor = tensor.cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, value: float) -> float:
        """The mean over processes."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64))) / self.world_size

    def barrier(self) -> None:
        """Waits for all processes."""
        self.any(False)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process. A collective: every process must call it."""
        return [bool(value) for value in self.max(*flags)]

    def max(self, *values: float) -> list[float]:
        """The largest of each value over processes. A collective: every process must call it."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value) -> list:
        """`value` of every process, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """`value` of the first process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def __enter__(self) -> "DistContext":
        return self

    def __exit__(self, *_) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process of the job ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class StopSignal:
    """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP (the terminal is gone) ask the run to stop.

    While the trainer `checks` the `number` where it can save, a signal is only noted; a second Ctrl-C raises
    KeyboardInterrupt at once. Before, while data are read and the model is made, one process stops at once, and so do
    those of a job that have not met yet: the others may be gone.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.number, self.checks = 0, False

    def __enter__(self) -> "StopSignal":
        wanted = [one for one in self.SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in wanted}  # nohup ignores SIGHUP
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or not dist.is_initialized()  # before the processes have met
        if not self.checks and alone:
            raise self.interrupted("interrupted before the first step, nothing is lost")
        if number == signal.SIGINT and int(os.environ.get("RANK", 0)) == 0:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once without saving\n")

    def interrupted(self, message: str) -> Interrupted:
        """The exception to leave with; 130 after Ctrl-C, 129 after SIGHUP, else 143 (SIGUSR1 too: schedulers send it
        before SIGTERM)."""
        number = self.number if self.number in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM
        return Interrupted(message, number)
