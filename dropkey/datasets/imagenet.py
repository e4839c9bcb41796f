"""ImageNet-1k (ILSVRC 2012) as folders of JPEG files, tar shards or Parquet files; its validation images are the test
split."""

from dropkey.config.schema import DataConfig
from dropkey.data.folders import existing_root, read_splits
from dropkey.data.parquet import read_parquet
from dropkey.data.shards import read_tar_shards
from dropkey.data.splits import RawSplits
from dropkey.errors import DataError

LAYOUT = "train/<wnid>/<image>.JPEG and val/<wnid>/<image>.JPEG (ILSVRC 2012, from image-net.org)"


def read(data: DataConfig) -> RawSplits:
    """Raises DataError: no such folders or shards."""
    root = existing_root(data, LAYOUT)
    for suffix, read_files in (("tar", read_tar_shards), ("parquet", read_parquet)):
        if any(root.glob(f"*.{suffix}")) or any(root.glob(f"*/*.{suffix}")):
            return read_files(data)._replace(test=None)
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise DataError(f"no folder {root.absolute() / name}; imagenet is expected as {LAYOUT}")
    return read_splits({"train": root / "train", "val": root / "val", "test": None}, LAYOUT, data)
