"""Checkpoints of `torch.save`, read without trusting what they declare."""

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlprefix.prefixes.file_format import reading


def load_torch_file(path: str | Path) -> Any:
    """Read a file of `torch.save`: tensors and plain values, nothing that runs.

    Args:
        path: The file.

    Raises:
        PrefixFormatError: If it cannot be read, has compressed entries (which torch does not
            write), or a tensor larger than its stored data, which would grow when it is copied.
    """
    with reading(str(path)):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it has compressed entries, which torch does not write")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # Lightning's arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # its message advises to run what the file says
            raise ValueError(
                "it is no file of torch.save, or has more than tensors and plain values"
            ) from error
        for tensor in _tensors(content):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(
                    "it has a tensor larger than its stored data (an expanded view); save a copy"
                )
    return content


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
