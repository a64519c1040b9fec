"""Slots by layer: keys and values per head, to and from rows of one matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlprefix.errors import GeometryMismatchError
from controlprefix.prefixes.geometry import Geometry, LayerShape, Site

LayerSlots = tuple[Tensor, Tensor]  # keys, values: (num_kv_heads, num_slots, head_dim) each


def heads_first(rows: Tensor, num_heads: int) -> Tensor:
    """`(num_slots, num_heads * head_dim)` as `(num_heads, num_slots, head_dim)`."""
    return rows.unflatten(1, (num_heads, -1)).transpose(0, 1)


def stack_layers(geometry: Geometry, site: Site, layers: Sequence[LayerSlots]) -> Tensor:
    """Keys and values per layer as one row per slot, `(num_slots, slot_size)`."""
    shapes = geometry.layers(site)
    if len(layers) != len(shapes):
        raise GeometryMismatchError(
            f"prefix has {len(layers)} {site} layers but model {geometry.model_name!r} has "
            f"{len(shapes)}"
        )
    num_slots = layers[0][0].shape[1] if layers[0][0].ndim == 3 else 0
    columns = []
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        expected_shapes = _expected_shapes(shape, num_slots)
        for kind, tensor, expected in zip(("keys", "values"), layer, expected_shapes, strict=True):
            if tuple(tensor.shape) != expected:
                raise GeometryMismatchError(
                    f"{kind} of {site} layer {i} have shape {tuple(tensor.shape)} but model "
                    f"{geometry.model_name!r} needs {expected} (num_kv_heads, num_slots, head_dim)"
                )
            columns.append(tensor.transpose(0, 1).flatten(1))  # (num_slots, num_heads * head_dim)
    return torch.cat(columns, dim=1)


def _expected_shapes(
    shape: LayerShape, num_slots: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (
        (shape.num_kv_heads, num_slots, shape.key_dim),
        (shape.num_kv_heads, num_slots, shape.value_dim),
    )
