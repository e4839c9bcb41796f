"""Parquet files of images and labels as Hugging Face publishes them, {train,validation,test} in their names."""

from dropkey.data.parquet import read_parquet as read

__all__ = ["read"]
