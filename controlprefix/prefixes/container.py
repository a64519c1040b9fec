"""Tensors and what they mean as one safetensors file that is checked against its own hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from controlprefix.errors import PrefixFormatError

# Of the numbers in a file.
PayloadDtype = Literal["float32", "bfloat16", "float16", "int8"]
FLOATS = ("float32", "bfloat16", "float16")

FORMAT = 1
_MAX_HEADER_BYTES = 1 << 20


def write(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """One safetensors file: the tensors, what is said about them, and a hash of both."""
    header = {"format": FORMAT, **about}
    kept = {name: rows.detach().cpu().contiguous() for name, rows in tensors.items()}
    header["sha256"] = _digest(header, kept)
    return save_safetensors(kept, metadata={"controlprefix": json.dumps(header)})


def read(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given.

    Args:
        data: A whole safetensors file.
        name: What to call it in errors.

    Raises:
        PrefixFormatError: If bytes are missing, damaged, of a later format, or not ours.
    """
    header = read_header(data, name)
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise PrefixFormatError(f"{name} is damaged: {error}") from error
    claimed = header.pop("sha256", None)
    if claimed != _digest(header, tensors):
        raise PrefixFormatError(
            f"{name} is damaged: its content does not match its own hash; restore it from a "
            "backup, or roll back to an earlier version"
        )
    return header, tensors


def read_header(data: bytes, name: str) -> dict[str, Any]:
    """What is said about the tensors, read before anything is allocated for them.

    Raises:
        PrefixFormatError: As `read`.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise PrefixFormatError(f"{name} is not a whole safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["controlprefix"])
        format_number = int(header["format"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise PrefixFormatError(f"{name} is not a prefix written by controlprefix") from error
    if format_number > FORMAT:
        raise PrefixFormatError(
            f"{name} was written in format {format_number}; this version reads up to {FORMAT}, so "
            "upgrade controlprefix"
        )
    assert isinstance(header, dict)
    return header


def quantized(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows `(rows, numbers)` as int8, and a scale for each group of numbers in a row, bfloat16.

    Args:
        rows: Floats.
        sizes: Of the groups.
    """
    pieces = rows.float().split(list(sizes), dim=1)
    largest = torch.stack([piece.abs().amax(dim=1) for piece in pieces], dim=1)
    scales = (largest / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    steps = rows.float() / _spread(scales, sizes)
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantized(rows: Tensor, scales: Tensor | None, sizes: Sequence[int], name: str) -> Tensor:
    """The floats of `quantized`, in float32.

    Raises:
        PrefixFormatError: If the scales do not fit.
    """
    if (
        scales is None
        or rows.dtype != torch.int8
        or scales.shape != (len(rows), len(sizes))
        or rows.shape[1] != sum(sizes)
    ):
        raise PrefixFormatError(f"{name} has scales that do not fit its numbers")
    return rows.float() * _spread(scales, sizes)


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    return scales.float().repeat_interleave(torch.tensor(list(sizes)), dim=1)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over everything that means something: what is said, dtypes, shapes and numbers."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        rows = tensors[name].contiguous()
        sha.update(f"{name} {rows.dtype} {tuple(rows.shape)}".encode())
        if rows.numel():
            sha.update(rows.view(torch.uint8).numpy().data)
    return sha.hexdigest()
