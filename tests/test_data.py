"""Data sets: splits, folders, conversion, cache, and every way in which the images can be wrong."""

import ast
import dataclasses
import pickle
import shutil
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import dropkey.data
from data_samples import HEAVY, digits_config, folder_config, image_folder, write_images
from dropkey.config.schema import DataConfig
from dropkey.data import cache, train_loader
from dropkey.datasets import load
from dropkey.errors import DataError
from dropkey.seeds import derive_seed

SHARED = Path(__file__).parents[2] / "shared" / "data"


pytestmark = pytest.mark.usefixtures("own_cache")


def fails(words, data, error=DataError):
    """`load` raises one line that holds all the words."""
    with pytest.raises(error) as caught:
        load(data)
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def names(split):
    return [split.images.path(row) for row in split.rows.tolist()]


# ------------------------------------------------------------------------------------------------- seeds


def test_derived_seeds_are_stable_and_tell_types_and_borders_apart():
    assert derive_seed(0, "order", 3) == 7876694560401088873  # another value would change every run
    parts = [(1, 2), (12,), ("1", 2), ("1", "2"), ("12",), (2, 1), (1, 2, 0), (-1, 2), ()]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_data_imports_only_the_schema_errors_and_seeds_of_the_package():
    allowed = ("dropkey.data", "dropkey.config.schema", "dropkey.errors", "dropkey.seeds")
    for path in Path(dropkey.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong = [name for name in modules if name.startswith("dropkey") and not name.startswith(allowed)]
            assert not wrong, f"{path.name} imports {wrong}"


# ------------------------------------------------------------------------------------------------ splits


def test_splits_are_disjoint_cover_everything_and_are_stratified():
    dataset = load(digits_config())
    splits = [dataset.train, dataset.val, dataset.test]
    rows = torch.cat([split.rows for split in splits])
    assert rows.sort().values.tolist() == list(range(1797))
    of_class = torch.bincount(torch.cat([split.targets for split in splits]))
    test, val = torch.bincount(dataset.test.targets), torch.bincount(dataset.val.targets)
    assert (test - of_class * 0.2).abs().max() <= 0.5
    assert (val - (of_class - test) * 0.1).abs().max() <= 0.5


def test_splits_are_the_same_in_every_run():
    torch.manual_seed(1)
    first = load(digits_config(max_train_samples=100))
    torch.manual_seed(2)
    second = load(digits_config(max_train_samples=100))
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).rows, getattr(second, name).rows)


def test_train_limit_takes_equally_many_of_each_class_and_grows_by_adding():
    small, large = load(digits_config(max_train_samples=203)), load(digits_config(max_train_samples=400))
    assert sorted(torch.bincount(small.train.targets).tolist()) == [20] * 7 + [21] * 3
    assert set(small.train.rows.tolist()) <= set(large.train.rows.tolist())
    assert torch.equal(small.test.rows, large.test.rows)


def test_train_limit_fills_up_from_larger_classes(tmp_path):
    dataset = load(folder_config(image_folder(tmp_path / "images", counts=(2, 10, 6)), max_train_samples=13))
    assert torch.bincount(dataset.train.targets).tolist() == [2, 6, 5]


@pytest.mark.parametrize(
    ("splits", "sizes", "folders"),
    [
        (("train", "val", "test"), (24, 24, 24), ("train", "val", "test")),
        (("train", "validation", "test"), (24, 24, 24), ("train", "validation", "test")),
        (("train", "test"), (17, 7, 24), ("train", "train", "test")),
        (("train", "valid"), (17, 7, 24), ("train", "train", "valid")),
        (("train",), (14, 5, 5), ("train", "train", "train")),
        (("",), (14, 5, 5), ("images", "images", "images")),
    ],
)
def test_folder_layouts(tmp_path, splits, sizes, folders):
    root = image_folder(tmp_path / "images", splits)
    dataset = load(folder_config(root, val_fraction=0.25, test_fraction=0.2, in_memory=False))
    assert dataset.classes == ["a", "b", "c"]
    found = [dataset.train, dataset.val, dataset.test]
    assert tuple(len(split) for split in found) == sizes
    assert tuple(split.images.root.name for split in found) == folders
    everything = [name for split in found for name in names(split)]
    assert len(set(everything)) == len(everything)
    for split in found:
        assert ["abc".index(Path(name).parent.name) for name in names(split)] == split.targets.tolist()


def test_folders_take_nested_and_linked_images_and_pass_over_hidden_and_other_files(tmp_path):
    root = image_folder(tmp_path / "images", counts=(2, 2, 2))
    write_images(root / "train" / "a" / "deeper", 3)
    (root / "train" / "b" / "link.PNG").symlink_to(root / "train" / "a" / "000.png")
    (root / "train" / "b" / "._000.png").write_text("left by an archiver")
    (root / "train" / "b" / "notes.txt").write_text("")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    dataset = load(folder_config(root))
    assert torch.bincount(dataset.train.targets).tolist() == [5, 3, 2]


def test_imagenet_tests_on_val_and_holds_nothing_out_by_itself(tmp_path):
    root = image_folder(tmp_path / "images", ("train", "val", "test"))
    dataset = load(folder_config(root, name="imagenet", in_memory=False))
    assert dataset.val is None
    assert dataset.test.images.root.name == "val"
    fails([tmp_path / "none", "train/<wnid>", "ILSVRC"], folder_config(tmp_path / "none", name="imagenet"))
    partial = image_folder(tmp_path / "partial", ("train",))
    fails([partial / "val", "train/<wnid>"], folder_config(partial, name="imagenet"))


# ------------------------------------------------------------------------------------------------ errors


def test_missing_root_and_root_without_classes_say_what_is_expected(tmp_path):
    fails([tmp_path / "none", "data.root", "<class>/<image>"], folder_config(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    fails([tmp_path / "empty", "no class folders", "<class>/<image>"], folder_config(tmp_path / "empty"))
    only_test = image_folder(tmp_path / "only", ("test",))
    fails([only_test, "test/", "no train/"], folder_config(only_test))


def test_class_folders_that_differ_between_splits_are_named(tmp_path):
    root = image_folder(tmp_path / "images")
    (root / "test" / "d").mkdir()
    fails([root / "test", "d", "unlike"], folder_config(root))
    (root / "train" / "d").mkdir()
    fails([root / "train" / "d", "empty"], folder_config(root))
    write_images(root / "train" / "d", 2)
    (root / "test" / "d").rmdir()
    fails([root / "test", "lacks", "d"], folder_config(root))


@pytest.mark.fault(24)
def test_class_count_unlike_the_config_names_both_numbers_and_the_fix(tmp_path):
    fails(
        ["data.num_classes=4", "3 classes", "data.num_classes=3"],
        folder_config(image_folder(tmp_path / "x"), num_classes=4),
    )
    fails(["data.num_classes=7", "10 classes", "data.num_classes=10"], digits_config(num_classes=7))


@pytest.mark.fault(24)
def test_empty_held_out_splits_and_too_large_limits_are_refused(tmp_path):
    root = image_folder(tmp_path / "images", ("train",), counts=(2, 2, 2))
    fails(["val split is empty", "val_fraction=0.1"], folder_config(root, val_fraction=0.1, test_fraction=0.5))
    fails(["test split is empty", "test_fraction=0.0"], folder_config(root, test_fraction=0.0))
    fails(["max_train_samples=99999", "1293 images"], digits_config(max_train_samples=99999))


def test_too_many_pixels_for_memory_are_refused(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images")
    monkeypatch.setattr(cache, "LIMIT", 5000)
    fails(["24 images", "data.in_memory=false"], folder_config(root))
    assert len(load(folder_config(root, in_memory=False)).train) == 24


@pytest.mark.fault(25)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_decoding_names_an_unreadable_image(tmp_path, workers, damage):
    root = image_folder(tmp_path / "images")
    path = root / "train" / "b" / "003.png"
    content = {"truncated": path.read_bytes()[:200], "text": b"<html>404</html>", "empty": b""}[damage]
    path.write_bytes(content)
    fails([path, "cannot read image"], folder_config(root, num_workers=workers))


# ------------------------------------------------------------------------------------- digits and CIFAR


def test_digits_are_grey_levels_stretched_to_bytes_and_converted():
    grey = load(digits_config())
    pixels = grey.train.images.images
    assert (pixels.shape, pixels.dtype) == ((1797, 1, 8, 8), torch.uint8)
    assert (pixels.min().item(), pixels.max().item()) == (0, 255)
    assert grey.classes == list("0123456789")
    colour = load(digits_config(channels=3)).train.images.images
    assert torch.equal(colour, pixels.expand(-1, 3, -1, -1))
    large = load(digits_config(image_size=16)).train.images.images
    assert large.shape == (1797, 1, 16, 16)
    assert load(digits_config(image_size=16, in_memory=False)).train.images.images.shape[-1] == 8


def fake_cifar(root, kind):
    """CIFAR's files with 20 training images per file and 20 test images."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "fine_labels" if kind is torchvision.datasets.CIFAR100 else "labels"
    classes = 100 if kind is torchvision.datasets.CIFAR100 else 10
    random = np.random.default_rng(0)
    for name, _ in kind.train_list + kind.test_list:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = [label * classes // 20 for label in range(20)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: labels}))
    class_names = [f"class {number:02d}" for number in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: class_names}))


@pytest.mark.parametrize("kind", [torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100])
def test_cifar_is_read_from_the_files_that_are_there(tmp_path, monkeypatch, kind):
    fake_cifar(tmp_path, kind)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *given: True)
    dataset = load(DataConfig(name=kind.__name__.lower(), root=str(tmp_path), image_size=32, val_fraction=0.0))
    original = kind(tmp_path, train=False)
    assert dataset.num_classes == len(original.classes)
    assert len(dataset.train) == 20 * len(kind.train_list)
    assert np.array_equal(dataset.test.images.images.numpy().transpose(0, 2, 3, 1), original.data)
    assert dataset.test.targets.tolist() == original.targets


def test_missing_cifar_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    words = [tmp_path / "cifar-10-batches-py", "https://www.cs.toronto.edu", "data.root"]
    config = {"name": "cifar10", "root": str(tmp_path), "image_size": 32}
    fails([*words, "data.download=false"], DataConfig(**config, download=False))

    def no_network(*given, **named):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    fails([*words, "Name or service not known"], DataConfig(**config, download=True))


# ------------------------------------------------------------------------------------------- photographs


def test_imagenet_photographs_pass_through_the_whole_pipeline(tmp_path):
    archive = SHARED / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if "/train/n01" in member.name]
        tar.extractall(tmp_path, wanted, filter="data")
    root = tmp_path / "imagenet-sample"
    shutil.copytree(root / "train", root / "val")
    data = DataConfig(name="imagenet", root=str(root), image_size=64, val_fraction=0.0, in_memory=False, crop_pct=0.9)
    dataset = load(data)
    loader = train_loader(dataset, data, HEAVY, batch_size=8, seed=0)
    batch = next(loader.epoch(0))
    loader.close()
    assert batch.images.shape == (8, 3, 64, 64)
    assert batch.images.isfinite().all()


@pytest.mark.parametrize("part", ["rows", "targets"])
def test_the_fingerprint_changes_with_the_images_chosen_and_with_their_labels(part):
    dataset = load(digits_config())
    before = dataset.fingerprint()
    changed = getattr(dataset.pool, part).clone()
    changed[0] = (changed[0] + 1) % 10
    pool = dataclasses.replace(dataset.pool, **{part: changed})
    assert dataclasses.replace(dataset, pool=pool).fingerprint() != before


def drawn(seed: int, **keys) -> tuple:
    dataset = load(digits_config(max_train_samples=200, **keys), seed)
    return dataset.train.rows.tolist(), dataset.val.rows.tolist(), dataset.test.rows.tolist()


def test_every_seed_has_the_same_images_unless_asked_otherwise():
    assert drawn(seed=1) == drawn(seed=2)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "validation"])
def test_with_split_seed_run_every_seed_draws_its_own_images(part):
    assert drawn(seed=1, split_seed="run")[part] != drawn(seed=2, split_seed="run")[part]


def test_a_split_seed_draws_what_a_run_of_that_seed_draws():
    assert drawn(seed=1, split_seed=5) == drawn(seed=5, split_seed="run") != drawn(seed=1)


def test_no_split_seed_touches_the_test_images_or_the_fingerprint():
    data = digits_config(max_train_samples=200, split_seed="run")
    one, other = load(data, 1), load(data, 2)
    assert one.test.rows.tolist() == other.test.rows.tolist()
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("seed", [0, 3])
def test_training_and_validation_share_no_image(seed):
    train, val, test = drawn(seed, split_seed="run")
    assert not set(train) & set(val) and not set(train) & set(test) and not set(val) & set(test)
