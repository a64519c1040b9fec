"""Data files: files of examples and texts."""

from controlprefix.interop.data_files import (
    read_examples,
    read_labelled,
    read_texts,
    read_users,
)

__all__ = ["read_examples", "read_labelled", "read_texts", "read_users"]
