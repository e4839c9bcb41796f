"""Images in tar shards and Parquet files are read as those in folders, in any order, and damage is named."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from data_samples import HEAVY, assert_equal, batches, folder_config, image_folder
from dropkey.config.schema import DataConfig
from dropkey.data import eval_loader
from dropkey.datasets import load
from dropkey.errors import ConfigError, DataError

SPLITS = {"train": "train", "test": "test"}
LAYOUTS = ("webdataset", "json", "folders", "nested", "parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPKEY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, target: Path, layout: str, shards: int = 2) -> None:
    """The images of {class}/{image} in a few tars."""
    target.parent.mkdir(parents=True, exist_ok=True)
    classes = sorted(path.name for path in folder.iterdir())
    files = [path for name in classes for path in sorted((folder / name).iterdir())]
    for number in range(shards):
        with tarfile.open(f"{target}-{number:04d}.tar", "w") as tar:
            if layout == "nested":
                for name in classes[number::shards]:
                    inner = io.BytesIO()
                    with tarfile.open(fileobj=inner, mode="w") as one:
                        for path in sorted((folder / name).iterdir()):
                            add(one, path.name, path.read_bytes())
                    add(tar, f"{name}.tar", inner.getvalue())
                continue
            for path in files[number * len(files) // shards : (number + 1) * len(files) // shards]:
                label, key = path.parent.name, f"{path.parent.name}_{path.stem}"
                if layout == "folders":
                    add(tar, f"top/{label}/{path.name}", path.read_bytes())
                    continue
                add(tar, f"{key}.png", path.read_bytes())
                index = classes.index(label)
                extra = ("cls", str(index)) if layout == "webdataset" else ("json", json.dumps({"label": label}))
                add(tar, f"{key}.{extra[0]}", extra[1].encode())


def write_parquet(folder: Path, target: Path, shards: int = 2, label=None, names=("a", "b", "c")) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    target.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*/*"))
    labels = [sorted({path.parent.name for path in files}).index(path.parent.name) for path in files]
    facts = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    for number in range(shards):
        own = slice(number * len(files) // shards, (number + 1) * len(files) // shards)
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in files[own]]
        table = pyarrow.table({"image": images, "label": [label] * len(images) if label else labels[own]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
        parquet.write_table(table, f"{target}-{number:05d}-of-{shards:05d}.parquet", row_group_size=5)


@pytest.fixture
def folders(tmp_path) -> Path:
    return image_folder(tmp_path / "images", size=(16, 14))


def packed(folders: Path, root: Path, layout: str, **changes) -> DataConfig:
    for split, name in SPLITS.items():
        if layout == "parquet":
            write_parquet(folders / split, root / name)
        else:
            write_tars(folders / split, root / f"set-{name}", layout)
    name = "parquet" if layout == "parquet" else "shards"
    return folder_config(root, name=name, **{"in_memory": False, **changes})


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_hold_the_images_and_classes_of_the_folders(folders, tmp_path, layout, in_memory):
    data = packed(folders, tmp_path / "packed", layout, in_memory=in_memory)
    found, expected = load(data), load(folder_config(folders, in_memory=in_memory))
    assert found.classes == (["0", "1", "2"] if layout == "webdataset" else ["a", "b", "c"])
    for split in ("train", "test"):
        one, other = ([*eval_loader(of, split, data, batch_size=100)] for of in (found, expected))
        order = [sorted(range(24), key=lambda row, b=b: b.images[row].numpy().tobytes()) for (b,) in (one, other)]
        assert torch.equal(one[0].images[order[0]], other[0].images[order[1]])
        assert torch.equal(one[0].targets[order[0]], other[0].targets[order[1]])
    assert found.fingerprint() == load(data).fingerprint()


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_workers_and_resume_do_not_change_what_is_read(folders, tmp_path, layout):
    data = packed(folders, tmp_path / "packed", layout)
    whole = batches(data, HEAVY)
    data.num_workers = 2
    assert_equal(batches(data, HEAVY), whole)
    assert_equal(batches(data, HEAVY, start=1), whole[1:])


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_the_index_is_made_once(folders, tmp_path, layout, monkeypatch):
    data = packed(folders, tmp_path / "packed", layout)
    first = batches(data, HEAVY)
    monkeypatch.setattr(tarfile, "open", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_equal(batches(data, HEAVY), first)


def test_a_changed_shard_is_indexed_again(folders, tmp_path):
    data = packed(folders, tmp_path / "packed", "webdataset")
    before = load(data).fingerprint()
    (folders / "train" / "a" / "000.png").unlink()
    packed(folders, tmp_path / "packed", "webdataset")
    assert len(load(data).train) == 23 and load(data).fingerprint() != before


def test_deleted_copies_of_parquet_images_are_made_again(folders, tmp_path, cache):
    data = packed(folders, tmp_path / "packed", "parquet")
    first = batches(data, HEAVY)
    for file in cache.glob("*.images"):
        file.unlink()
    assert_equal(batches(data, HEAVY), first)


def test_shards_without_a_split_in_their_names_are_split_by_class(folders, tmp_path):
    write_tars(folders / "train", tmp_path / "packed" / "part", "folders")
    dataset = load(folder_config(tmp_path / "packed", name="shards", val_fraction=0.2))
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [15, 4, 5]


def test_splits_may_be_folders_of_shards_and_imagenet_takes_them(folders, tmp_path):
    for split, name in (("train", "train"), ("test", "val")):
        write_tars(folders / split, tmp_path / "packed" / name / "part", "folders")
    for name in ("shards", "imagenet"):
        dataset = load(folder_config(tmp_path / "packed", name=name))
        assert len(dataset.train) == len(dataset.test) == 24 and dataset.val is None


def test_test_images_without_labels_are_passed_over(folders, tmp_path):
    for name, label in (("train", None), ("validation", None), ("test", -1)):
        write_parquet(folders / "train", tmp_path / "packed" / name, label=label)
    dataset = load(folder_config(tmp_path / "packed", name="parquet", in_memory=False))
    assert dataset.val is None and dataset.test.images.path(0).endswith(".images: " + text_of(tmp_path, "validation"))


def text_of(tmp_path, name):
    return f"{tmp_path}/packed/{name}-00000-of-00002.parquet: row 0"


# ---------------------------------------------------------------------------------------------------- damage


def fails(data: DataConfig, *words: str, error=DataError) -> None:
    with pytest.raises(error) as caught:
        batches(data, HEAVY)
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message


@pytest.mark.parametrize("cut", [0.5, 1024, 100])
def test_a_shard_that_ends_early_is_named(folders, tmp_path, cut):
    data = packed(folders, tmp_path / "packed", "webdataset")
    path = tmp_path / "packed" / "set-train-0001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)] if cut < 1 else content[: end - (cut == 100) * 600])
    fails(data, f"cannot read shard {path}", "restore it")


def test_a_missing_shard_is_named(folders, tmp_path):
    data = packed(folders, tmp_path / "packed", "parquet")
    (tmp_path / "packed" / "train-00001-of-00002.parquet").unlink()
    fails(data, "lacks 1 of 2 shards train-*-of-00002.parquet", "number 1")
    write_tars(folders / "train", tmp_path / "tars" / "train", "folders", shards=3)
    (tmp_path / "tars" / "train-0001.tar").unlink()
    fails(folder_config(tmp_path / "tars", name="shards"), "lacks 1 of 3 shards train-*.tar", "number 1")


def test_a_damaged_image_is_named_with_its_shard(folders, tmp_path):
    path = folders / "train" / "b" / "003.png"
    path.write_bytes(path.read_bytes()[:80])
    for layout, name in (("webdataset", "b_003.png"), ("parquet", "row 11")):
        fails(packed(folders, tmp_path / layout, layout), "cannot read image", name)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"x.png": b"-"}, ["x.png has no label"]),
        ({"x.png": b"-", "x.cls": b"0", "y.png": b"-"}, ["y.png has no label"]),
        ({"x.png": b"-", "x.cls": b"0", "y.cls": b"0"}, ["y.cls has no image"]),
        ({"x.png": b"-", "x.cls": b" "}, ["x.cls holds no label"]),
        ({"x.png": b"-", "x.json": b"[3]"}, ["x.json holds no label"]),
        ({"x.png": b"-", "x.jpg": b"-"}, ["x.jpg and x.png have one key"]),
        ({"readme.txt": b"-"}, ["no images in", "data.root"]),
    ],
)
def test_members_that_do_not_fit_are_named(tmp_path, members, words):
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "train-0.tar", "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    fails(folder_config(tmp_path / "packed", name="shards"), "train-0.tar", *words)


def test_shards_of_no_or_another_split_are_refused(folders, tmp_path):
    root = tmp_path / "packed"
    data = packed(folders, root, "folders")
    (root / "more.tar").write_bytes(b"")
    fails(data, "more.tar", "of which split")
    (root / "more.tar").unlink()
    (root / "val-0000.tar").symlink_to(root / "set-train-0000.tar")
    fails(data, "are the same file")
    fails(folder_config(tmp_path / "nothing", name="shards"), "no folder")
    (tmp_path / "empty").mkdir()
    fails(folder_config(tmp_path / "empty", name="parquet"), "no training shards (*train*.parquet)")


def test_a_class_that_training_lacks_is_refused(folders, tmp_path):
    (folders / "test" / "c").rename(folders / "test" / "d")
    fails(packed(folders, tmp_path / "packed", "folders"), "the test shards have class d")


def test_parquet_without_images_or_labels_is_refused(folders, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = tmp_path / "packed"
    root.mkdir()
    data = folder_config(root, name="parquet")
    for table, words in (
        ({"text": ["a"], "label": [0]}, ["no column of images", "text, label"]),
        ({"image": [{"bytes": b"-"}], "text": ["a"]}, ["no column of labels"]),
        (
            {"image": pyarrow.array([None], pyarrow.struct({"bytes": pyarrow.binary()})), "label": [0]},
            ["row 0 has no image"],
        ),
    ):
        parquet.write_table(pyarrow.table(table), root / "train.parquet")
        fails(data, "train.parquet", *words)
    (root / "train.parquet").write_bytes(b"PAR1 and no more")
    fails(data, "cannot read", "train.parquet", "restore it")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(data, "pip install 'dropkey[parquet]'", error=ConfigError)
