"""One thread per test process: tests run in parallel, and sums come out the same on any number of cores."""

import os

import pytest
import torch

from data_samples import image_folder

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
