"""One thread per test process: tests run in parallel, and sums come out the same on any number of cores."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then run on the CPU

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its key knows nothing of a changed fake of an operator

from data_samples import image_folder
from dropkey import regularizers
from dropkey.patching import layer
from dropkey.reproduction import runner, slots

pytest_plugins = ["fault_table"]
torch.set_num_threads(1)
for ignored in (signal.SIGHUP, signal.SIGINT):  # by nohup, or a shell that started the tests in the background
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def no_cache_at_home(tmp_path_factory):
    """Decoded images are cached in the tests' own directory."""
    os.environ["DROPKEY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DROPKEY_CACHE"]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


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
def tiny_volo(monkeypatch):
    """volo_d1 with a layer of each kind."""
    from timm.models import _registry, volo

    def tiny(pretrained=False, **arguments):
        sizes = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
        return volo._create_volo("volo_d1_224", pretrained, **sizes, stem_hidden_dim=8, **arguments)

    monkeypatch.setitem(_registry._model_entrypoints, "volo_d1_224", tiny)


@pytest.fixture
def drawn(monkeypatch):
    """Lists `regularizers`, `masks`, `layouts`: what patched layers have drawn since the test began."""
    seen = SimpleNamespace(regularizers=[], masks=[], layouts=[])
    draw, attend = regularizers.seeded_mask, layer.seeded_attention

    def record(regularizer, shape, threshold, seed, **layout):
        seen.regularizers.append(regularizer)
        seen.masks.append(draw(regularizer, shape, threshold, seed, **layout))
        seen.layouts.append(layout)
        return seen.masks[-1]

    def record_attention(q, k, v, regularizer, threshold, seed, **options):
        """Not every implementation draws the mask by itself."""
        layout = {key: value for key, value in options.items() if key in ("grid", "num_prefix", "window")}
        record(regularizer, (*q.shape[:-1], k.shape[-2]), threshold, seed, **layout)
        with monkeypatch.context() as unrecorded:
            unrecorded.setattr(regularizers, "seeded_mask", draw)
            return attend(q, k, v, regularizer, threshold, seed, **options)

    monkeypatch.setattr(regularizers, "seeded_mask", record)
    monkeypatch.setattr(layer, "seeded_attention", record_attention)
    return seen
