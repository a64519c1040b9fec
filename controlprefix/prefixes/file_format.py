"""The file format: tensors and a JSON header in one safetensors file with a content hash."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from controlprefix.errors import ControlPrefixError, PrefixFormatError, short_reason

StorageDtype = Literal["float32", "bfloat16", "float16", "int8"]
FLOAT_DTYPES = ("float32", "bfloat16", "float16")

Key = TypeVar("Key", bound=str)

FORMAT = 1
_MAX_HEADER_BYTES = 1 << 20


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any error of damaged or hostile bytes into a `PrefixFormatError` while inside.

    Args:
        name: What is read, in errors.
    """
    try:
        yield
    except ControlPrefixError:
        raise
    except Exception as error:  # whatever bytes can do to the libraries that read them
        raise PrefixFormatError(f"{name} is damaged: {short_reason(error)}") from error


def write(header: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> bytes:
    """Serialize tensors and a header, with a hash over both.

    Args:
        header: Anything JSON can hold.
        tensors: Any shapes and dtypes.
        name: What the tensors are called in errors.

    Raises:
        PrefixFormatError: If a value is NaN or infinite, or the header is too long.
    """
    header = {"format": FORMAT, **header}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    _require_finite(tensors, name)
    header["sha256"] = digest(header, tensors)
    data = save_safetensors(tensors, metadata={"controlprefix": json.dumps(header)})
    if int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:
        raise PrefixFormatError(
            f"{name} has more beside its tensors than a file can hold, such as its relevance to "
            "thousands of prompts; give fewer"
        )
    return data


def read(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote, and verify its hash.

    Args:
        data: A whole safetensors file.
        name: What the file is called in errors.

    Raises:
        PrefixFormatError: If bytes are missing or damaged, the format is newer than this
            version, the file is not ours, or a value is NaN or infinite.
    """
    header = read_header(data, name)
    with reading(name):
        tensors = load_safetensors(data)  # compares the declared sizes with the file's first
        stored_digest = header.pop("sha256", None)
        actual_digest = digest(header, tensors)
    if stored_digest != actual_digest:
        raise PrefixFormatError(
            f"{name} is damaged: its content does not match its own hash; restore it from a "
            "backup, or roll back to an earlier version"
        )
    _require_finite(tensors, name)
    return header, tensors


def read_header(data: bytes, name: str) -> dict[str, Any]:
    """Read the header alone, before anything is allocated for tensors.

    Raises:
        PrefixFormatError: As `read`.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise PrefixFormatError(f"{name} must be bytes, got {type(data).__name__}")
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


def require_storage_dtype(dtype: str | None) -> None:
    """Check that values can be stored in a dtype; None stands for the default one.

    Raises:
        PrefixFormatError: If they cannot.
    """
    names = get_args(StorageDtype)
    if dtype is not None and dtype not in names:
        raise PrefixFormatError(f"dtype is {dtype!r}; it must be one of: {', '.join(names)}")


def quantize(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization with one scale per row and group of columns.

    Args:
        values: `(num_rows, num_columns)`, any float dtype.
        sizes: Columns per group, in order.

    Returns:
        int8 values of the same shape, and scales `(num_rows, num_groups)` in bfloat16.
    """
    groups = values.float().split(list(sizes), dim=1)
    max_abs = torch.stack([group.abs().amax(dim=1) for group in groups], dim=1)
    scales = (max_abs / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    steps = values.float() / _repeat_per_column(scales, sizes)
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor | None, sizes: Sequence[int], name: str) -> Tensor:
    """Undo `quantize`.

    Args:
        values: int8, `(num_rows, num_columns)`.
        scales: `(num_rows, num_groups)`.
        sizes: Columns per group, in order.
        name: What the tensor is called in errors.

    Returns:
        float32, `(num_rows, num_columns)`.

    Raises:
        PrefixFormatError: If shapes or dtypes do not fit each other.
    """
    if (
        scales is None
        or values.ndim != 2
        or values.dtype != torch.int8
        or scales.shape != (len(values), len(sizes))
        or values.shape[1] != sum(sizes)
    ):
        raise PrefixFormatError(f"{name} has scales that do not fit its values")
    return values.float() * _repeat_per_column(scales, sizes)


def _repeat_per_column(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    return scales.float().repeat_interleave(torch.tensor(list(sizes)), dim=1)


def _require_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        # Not every float dtype has `isfinite`.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise PrefixFormatError(f"{name} has NaN or infinite values in {key!r}")


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and the names, dtypes, shapes and values of all tensors."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def dequantize_sites(
    tensors: Mapping[str, Tensor],
    head_sizes: Mapping[Key, Sequence[int]],
    dtype: object,
    name: str,
) -> dict[Key, Tensor]:
    """Undo `quantize` for the slots of some sites.

    Args:
        tensors: Per site its int8 rows, and its scales as `<site>.scales`.
        head_sizes: Per site, as in `quantize`.
        dtype: Name of the dtype that the slots had.
        name: What the file is called in errors.

    Raises:
        PrefixFormatError: If it is no float dtype, or scales are missing or damaged.
    """
    if dtype not in FLOAT_DTYPES:
        raise PrefixFormatError(f"{name} was quantized from {dtype!r}, which is no float dtype")
    return {
        site: dequantize(
            tensors[site], tensors.get(f"{site}.scales"), sizes, f"{name} at {site}"
        ).to(getattr(torch, str(dtype)))
        for site, sizes in head_sizes.items()
    }
