"""One thread per test process: tests run in parallel, and sums come out the same on any number of cores."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on the CPU

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its key knows nothing of a changed fake of an operator

from data_samples import image_folder
from dropkey import regularizers
from dropkey.patching import layer
from dropkey.reproduction import runner, slots

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_cache_at_home(tmp_path_factory):
    """Decoded images are cached in the tests' own directory."""
    os.environ["DROPKEY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DROPKEY_CACHE"]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for one test."""
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """48 images of 15 x 20 pixels in 3 classes, not to be changed."""
    return image_folder(tmp_path_factory.mktemp("folder") / "images", size=(20, 15))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Jobs of tables start stand_in.py instead of train.py and eval.py; returns the directory of the scripts."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    tests = Path(__file__).parent
    for name in ("train.py", "eval.py"):
        call = f"import sys; sys.path[:0] = {[str(tests.parent), str(tests)]}\nimport stand_in\n"
        (scripts / name).write_text(f"{call}stand_in.main({name!r}, sys.argv[1:])\n")
    monkeypatch.setattr(slots, "SCRIPTS", scripts)
    monkeypatch.setattr(runner, "POLL", 0.02)
    monkeypatch.setattr(runner, "RECHECK", 0.1)
    return scripts


@pytest.fixture
def drawn(monkeypatch):
    """(kind, mask, arguments) of everything that patched layers have dropped since the test began."""
    draws, mask, attend = [], regularizers.mask, layer.attend

    def record(kind, shape, threshold, seed, **where):
        draws.append((kind, mask(kind, shape, threshold, seed, **where), where))
        return draws[-1][1]

    def record_attention(q, k, v, kind, threshold, seed, *, impl, scale, bias, **where):
        record(kind, (*q.shape[:-1], k.shape[-2]), threshold, seed, **where)
        count = len(draws)
        out = attend(q, k, v, kind, threshold, seed, impl=impl, scale=scale, bias=bias, **where)
        del draws[count:]  # the same mask, where this implementation does not draw it itself
        return out

    monkeypatch.setattr(regularizers, "mask", record)
    monkeypatch.setattr(layer, "attend", record_attention)
    return draws
