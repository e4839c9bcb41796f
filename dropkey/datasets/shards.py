"""Tar shards: WebDataset's (<key>.jpg, <key>.cls) or tars of class folders, {train,val,test} in their names."""

from dropkey.data.shards import read_tar_shards as read

__all__ = ["read"]
