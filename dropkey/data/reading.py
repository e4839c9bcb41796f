"""Readers: a stream of requests in, uint8 image batches on the device out.

`OnDevice` indexes a tensor; `Decoding` opens and transforms pictures in worker processes. A batch depends on its
request alone, so the number of workers does not change the result.
"""

import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dropkey.data.images import Files, Pixels, to_device, to_tensor
from dropkey.errors import ConfigError, DataError

Key = tuple[int | str, ...]  # parts of a seed
Batch = torch.Tensor | list  # images, or these and more
MOST_WORKERS = 64  # on a machine with fewer cores; thousands hang it
MOST_CHOSEN = 16  # without being asked for


class Request(NamedTuple):
    """One batch. Image i of it is augmented by the numbers that follow from (*key, position + i)."""

    rows: torch.Tensor  # int64 (B,): which images of the store
    key: Key = ()
    position: int = 0


class OnDevice:
    """Reads from decoded images that live on the device as one tensor."""

    def __init__(self, store: Pixels, device: torch.device):
        self._images = store.on(device)

    def read(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 B C H W on the device, one per request."""
        for request in requests:
            yield self._images.index_select(0, to_device(request.rows, self._images.device))

    def close(self) -> None:
        pass


class Decoding:
    """Reads through `workers` processes, which stay until `close` (0: in this process; None: `fitting_workers`).

    `transform(picture, key)` returns the picture at its final size, or a tuple of it and tensors; batches are
    then lists. With a `collate` of your own, pictures may be anything that `store.picture` returns: it makes a batch of
    those of a request, of which tensors go to the device.
    """

    def __init__(
        self,
        store: Files | Pixels,
        transform: Callable[[Image.Image, Key], Image.Image],
        workers: int | None,
        device: torch.device,
        collate: Callable[[list], Batch] | None = None,
    ):
        workers = fitting_workers() if workers is None else workers
        if workers > (most := max(MOST_WORKERS, os.cpu_count() or 1)):
            raise ConfigError(f"data.num_workers={workers}: at most {most} processes decode here; take 2 to 8")
        self._pictures, self._workers, self._device = _Pictures(store, transform, collate or _stack), workers, device
        self._plan = _Plan()
        self._loader = self._batches = None

    def read(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """uint8 B C H W on the device, one per request. A new call abandons an unfinished one."""
        self._plan.requests = (request._replace(rows=request.rows.tolist()) for request in requests)
        plan = self._plan.requests
        with self._worker_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
            if self._loader is None:
                self._loader = self._start()
            batches = self._batches = iter(self._loader)
        while True:
            with self._worker_errors():
                images = next(batches, None)
            if images is None:
                return
            one = isinstance(images, torch.Tensor)
            if isinstance(images, str):
                self.close()
                raise DataError(images)
            parts = [
                part.to(self._device, non_blocking=True) if isinstance(part, torch.Tensor) else part
                for part in ([images] if one else images)
            ]
            yield parts[0] if one else parts
            if self._plan.requests is not plan:
                raise RuntimeError("this reading was abandoned: another one was started on the same reader")

    @contextmanager
    def _worker_errors(self) -> Iterator[None]:
        """What torch raises where workers cannot start or work, as one line; most often files or memory ran out."""
        try:
            yield
        except (OSError, EOFError, RuntimeError) as error:
            if self._workers == 0 or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
            with suppress(Exception):  # the workers are gone, or this process cannot open what it needs
                self.close()
            remedy = "perhaps for lack of memory; the same command goes on, lower data.num_workers"
            if "open files" in reason[0]:
                remedy = "raise the limit (ulimit -n 4096), or lower data.num_workers"
            raise DataError(f"the processes that decode images failed: {reason[0].split('. ')[0]}; {remedy}") from error

    def _start(self) -> DataLoader:
        require_open_files(self._workers)
        return DataLoader(
            self._pictures,
            sampler=self._plan,
            batch_size=None,  # a request is a batch already
            collate_fn=_as_it_is,  # torch's own would make tensors, which are open files, of NumPy arrays
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=partial(_ignore_signals, os.getpid()),
            generator=torch.Generator(),  # without one, every epoch would draw from the process's own
        )

    def close(self) -> None:
        """Ends the workers; reading again starts new ones."""
        batches, self._loader, self._batches, self._plan.requests = self._batches, None, None, ()
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def fitting_workers() -> int:
    """This process's share of the cores that it may use, and of the files that it may open; 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), MOST_CHOSEN, (_files_left() - 8) // 5))


def require_open_files(workers: int) -> None:
    """ConfigError: this process may not open as many files as its workers take: three each, and two for images."""
    left = _files_left()
    if workers > 0 and left < 5 * workers + 8:
        raise ConfigError(
            f"data.num_workers={workers} takes {5 * workers + 8} files at once, and {left} more can be opened; "
            "raise the limit (ulimit -n 4096), or lower data.num_workers"
        )


def _files_left() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - len(os.listdir("/dev/fd")) if limit != resource.RLIM_INFINITY else 2**31


class _Plan:
    """The sampler: its requests are replaced for every reading, while the workers persist."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Pictures(TorchDataset):
    def __init__(self, store: Files | Pixels, transform: Callable, collate: Callable[[list], Batch]):
        self.store, self.transform, self.collate = store, transform, collate

    def __getitem__(self, request: Request) -> Batch | str:
        """A batch, or the error message: torch would wrap a worker's exception in a traceback."""
        try:
            keys = ((*request.key, request.position + index) for index in range(len(request.rows)))
            return self.collate(
                [self.transform(self.store.picture(row), key) for row, key in zip(request.rows, keys, strict=True)]
            )
        except DataError as error:
            return str(error)


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch


def _stack(made: list) -> Batch:
    rows = [one if isinstance(one, tuple) else (one,) for one in made]
    rows = [[to_tensor(one) if isinstance(one, Image.Image) else one for one in row] for row in rows]
    batch = [torch.stack(column) for column in zip(*rows, strict=True)]
    return batch if len(batch) > 1 else batch[0]


def _ignore_signals(main: int, worker: int) -> None:
    """Ctrl-C, a scheduler's SIGUSR1 and SIGTERM reach the whole process group, but only the main process should act on
    them.

    SIGTERM from the main process still ends the worker: torch and multiprocessing rely on it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # other systems (macOS) do not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for, args=[main], daemon=True).start()


def _wait_for(main: int) -> None:
    """The main process is not always the parent, which may be a fork server."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
