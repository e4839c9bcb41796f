"""Decoding processes: signals pass them by, and none is left behind."""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_samples import LIGHT, assert_equal, batches, folder_config
from dropkey.data import train_loader
from dropkey.data.reading import fitting_workers
from dropkey.datasets import load

ROOT = Path(__file__).parents[1]


@pytest.mark.fault(15)
def test_workers_outlive_signals_and_end_on_close(folder):
    data = folder_config(folder, in_memory=False, num_workers=2)
    loader = train_loader(load(data), data, LIGHT, batch_size=2, seed=5)
    others = set(multiprocessing.active_children())
    epoch = loader.epoch(1)
    found = [next(epoch), next(epoch)]  # one from each worker: both have begun
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for name in ("INT", "TERM"):  # from another process: our own SIGTERM would end them
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert_equal(found + list(epoch), batches(data, LIGHT, batch_size=2))
    begin = time.perf_counter()
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert time.perf_counter() - begin < 4


PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths}
from data_samples import LIGHT, folder_config
from dropkey.data import train_loader
from dropkey.datasets import load
data = folder_config({root!r}, in_memory=False, num_workers=2)
loader = train_loader(load(data), data, LIGHT, batch_size=2, seed=0)
for batch in loader.epoch(0):
    {event}
"""


@pytest.mark.parametrize("event", ["raise ValueError('as planned')", "os.killpg(0, signal.SIGINT)"])
def test_a_dying_process_takes_its_workers_along_and_they_say_nothing(folder, event):
    paths = [str(ROOT), str(ROOT / "tests")]
    program = PROGRAM.format(paths=paths, root=str(folder), event=event)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert ended.returncode not in (0, None)
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ("as planned" in ended.stderr) != ("KeyboardInterrupt" in ended.stderr)


@pytest.mark.parametrize(("cores", "processes", "chosen"), [(2, 1, 2), (96, 8, 12), (128, 1, 16), (4, 8, 1)])
def test_workers_are_a_processes_share_of_the_cores(monkeypatch, cores, processes, chosen):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert fitting_workers() == chosen


def test_workers_chosen_by_the_machine_read_the_same(folder):
    data = folder_config(folder, in_memory=False)
    assert_equal(batches(replace(data, num_workers=None), LIGHT), batches(data, LIGHT))


def test_few_open_files_leave_fewer_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, most))
    try:
        assert fitting_workers() == 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
