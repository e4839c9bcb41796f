"""Parquet files of images, as Hugging Face publishes data sets.

A row of Parquet cannot be read alone, only with its group of hundreds. So the encoded images are copied once, as they
are, into one file in the cache, which is then read by offset.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

from dropkey.config.schema import DataConfig
from dropkey.data.cache import cache_directory, is_own_directory
from dropkey.data.folders import existing_root
from dropkey.data.shards import Index, read_shards
from dropkey.data.splits import RawSplits
from dropkey.errors import ConfigError, DataError

LABELS = ("label", "fine_label", "labels")  # columns by name; else the first one of whole numbers
ROWS = 64  # at a time


def read_parquet(data: DataConfig) -> RawSplits:
    return read_shards(existing_root(data, "train*.parquet and validation*.parquet"), ".parquet", data, index_parquet)


def index_parquet(paths: list[Path], name: str) -> Index:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            "data=parquet reads through pyarrow, which is missing: pip install 'dropkey[parquet]'"
        ) from None

    target, size = cache_directory() / f"{name}.images", sum(os.path.getsize(path) for path in paths)
    if not is_own_directory(target.parent) or shutil.disk_usage(target.parent).free < size:
        raise DataError(
            f"data=parquet copies its images into {target.parent}, which has no room for {size / 2**30:.1f} GiB; "
            "DROPKEY_CACHE=... moves it"
        )
    index, temporary = Index([str(target)]), target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for path in paths:
                try:
                    copy_images(parquet.ParquetFile(path), path, file, index)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(f"cannot read {path}: {' '.join(str(error).split())}; restore it") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return index


def copy_images(table, path: Path, file, index: Index) -> None:
    image, label, index.classes = columns(table.schema_arrow, path)
    row = 0
    for batch in table.iter_batches(ROWS, columns=[image, label]):
        column = batch.column(image)
        contents = column.field("bytes") if hasattr(column, "field") else column
        for content, number in zip(contents, batch.column(label).to_pylist(), strict=True):
            if not content.is_valid or number is None:
                raise DataError(f"{path}: row {row} has no {'label' if content.is_valid else 'image in it'}")
            buffer = content.as_buffer()
            index.names.append(f"{path}: row {row}")
            index.where.append((0, file.tell(), buffer.size))
            index.labels.append(number)
            file.write(buffer)
            row += 1


def columns(schema, path: Path) -> tuple[str, str, list[str]]:
    """The names of the columns of images and labels, and of the classes where they are told."""
    from pyarrow import types

    def holds_images(kind) -> bool:
        return types.is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    images = [field.name for field in schema if holds_images(field.type)]
    labels = [name for name in LABELS if name in schema.names]
    labels += [field.name for field in schema if types.is_integer(field.type)]
    if not images or not labels:
        what = "images (bytes)" if not images else "labels (label, or whole numbers)"
        raise DataError(f"{path} has no column of {what}; it has {', '.join(schema.names)}")
    facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = facts.get("info", {}).get("features", {}).get(labels[0], {}).get("names")
    return images[0], labels[0], list(names or [])
