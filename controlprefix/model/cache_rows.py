"""Rows of KV caches: whether those of a model can be moved between caches, and moving them.

A row of a layer is the keys and values of its tokens, of the last ones alone in a sliding window,
the states of recurrent layers, or several of these.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from controlprefix.model.kv_cache import (
    GrowingLayer,
    new_cache,
    takes_dynamic_cache,
    with_room,
)

# Subclasses may keep more than what is moved here.
_WITH_KEYS = (
    GrowingLayer,
    DynamicIndexedLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
_DUMMY = getattr(cache_utils, "DummyLayer", None)  # since transformers 5.20, of layers that share
_WITHOUT_KEYS = (LinearAttentionLayer, _DUMMY)
# Dimensions of rows and tokens.
_DIMS = {
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),
    "indexer_position_ids": (1, 2),
}


class CacheRow(NamedTuple):
    """A row of a cache, and how many of its last tokens are valid.

    `cross` is the same of what the encoder of an encoder-decoder read.
    """

    cache: DynamicCache
    row: int
    num_tokens: int
    cross: "CacheRow | None" = None


def rows_can_move(model: PreTrainedModel, num_attention_layers: int) -> bool:
    """Whether everything that a model's cache keeps belongs to one row, and can be moved.

    Args:
        model: The model.
        num_attention_layers: Layers that attend to tokens. A cache with more layers of keys has
            some that stay empty, such as those that attend to images.
    """
    if not takes_dynamic_cache(model):
        return False
    if model.config.is_encoder_decoder:
        return True
    layers = new_cache(model).layers
    num_with_keys = sum(type(layer) in _WITH_KEYS for layer in layers)
    num_shared = sum(type(layer) is _DUMMY for layer in layers)  # or layers without attention
    return (
        all(type(layer) in (*_WITH_KEYS, *_WITHOUT_KEYS) for layer in layers)
        and num_with_keys <= num_attention_layers <= num_with_keys + num_shared
    )


def row_without_padding(cache: DynamicCache, row: int, num_tokens: int) -> CacheRow:
    """A row of a cache that is padded on the right, as a row of a cache of its own."""
    own = DynamicCache()
    for layer in _layers(cache):
        copied = GrowingLayer()
        copied.keys = layer.keys[row : row + 1, :, :num_tokens]
        copied.values = layer.values[row : row + 1, :, :num_tokens]
        own.layers.append(copied)
    return CacheRow(own, 0, num_tokens)


def arrange_rows(
    cache: DynamicCache,
    rows: Sequence[CacheRow],
    length: int,
    device: torch.device,
    num_slots: int = 0,
) -> None:
    """Fill a cache with rows of caches, each ending at the same column, with room to grow.

    What is before a row's valid tokens is copied as it is, or zero.

    Args:
        cache: A cache of the model (see `new_cache`); rows may come from it too.
        rows: The row to copy, per row of the result.
        length: Tokens of the longest row.
        device: Where the cache is.
        num_slots: Slots for which there is room in front of the tokens.
    """
    targets: dict[int, list[int]] = {}  # by cache
    for target, source in enumerate(rows):
        targets.setdefault(id(source.cache), []).append(target)
    indices = [
        (
            rows[group[0]].cache,
            torch.tensor([rows[target].row for target in group], device=device),
            torch.tensor(group, device=device),
        )
        for group in targets.values()
    ]
    while len(cache.layers) < len(rows[0].cache.layers):  # of a cache that makes them when needed
        cache.layers.append(GrowingLayer())
    for i, layer in enumerate(_layers(cache)):
        moves = [(_layers(source)[i], sources, group) for source, sources, group in indices]
        if _names_of_states(layer):
            _arrange_states(layer, moves, len(rows))
        if _names_of_tokens(layer):
            _arrange_tokens(layer, moves, len(rows), length, num_slots)


def overwrite_row(cache: DynamicCache, row: int, source: CacheRow) -> None:
    """Overwrite a row with one of at most its length, ending at the same column."""
    for layer, other in zip(_layers(cache), _layers(source.cache), strict=True):
        for name in _names_of_tokens(layer):
            old, new = (_by_row(name, getattr(each, name)) for each in (layer, other))
            num_tokens = min(source.num_tokens, old.shape[1])
            start = old.shape[1] - num_tokens
            old[row, start:] = new[source.row, new.shape[1] - num_tokens :]
            old[row, :start] = 0  # masked, but what another request left may be no number
        for name in _names_of_states(layer):
            for index, state in getattr(layer, name).items():
                if state is not None:
                    state[row] = getattr(other, name)[index][source.row]


_Moves = list[tuple[Any, Tensor, Tensor]]  # a layer, rows of it, and their new rows


def _arrange_tokens(layer: Any, moves: _Moves, num_rows: int, length: int, num_slots: int) -> None:
    num_columns = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        num_columns = min(length, layer.sliding_window - 1)
        layer.cumulative_length = length
    if isinstance(layer, GrowingLayer):
        layer.num_slots = num_slots
    tensors: dict[str, Tensor] = {}
    for name in _names_of_tokens(moves[0][0]):
        example: Tensor = getattr(moves[0][0], name)
        if isinstance(layer, GrowingLayer):
            room = with_room((num_rows, example.shape[1]), num_columns, example, num_slots)
            tensors[name] = room[:, :, num_slots : num_slots + num_columns]
        else:
            shape = list(example.shape)
            for dim, size in zip(_DIMS[name], (num_rows, num_columns), strict=True):
                shape[dim] = size
            tensors[name] = example.new_zeros(shape)
        new = _by_row(name, tensors[name])
        for source, rows, targets in moves:
            old = _by_row(name, getattr(source, name))
            num_copied = min(old.shape[1], num_columns)
            new[targets, num_columns - num_copied :] = old[rows, old.shape[1] - num_copied :]
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    if "indexer_keys" in tensors:
        layer.lazy_initialization_indexer(tensors["indexer_keys"])
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)


def _arrange_states(layer: Any, moves: _Moves, num_rows: int) -> None:
    example = moves[0][0]
    layer.dtype, layer.device = example.dtype, example.device
    layer.conv_kernel_size = dict(example.conv_kernel_size)
    layer.has_previous_state = dict(example.has_previous_state)
    for name in _names_of_states(example):
        states: dict[int, Tensor | None] = {}
        for index, state in getattr(example, name).items():
            states[index] = None if state is None else state.new_zeros(num_rows, *state.shape[1:])
            if (new := states[index]) is not None:
                for source, rows, targets in moves:
                    new[targets] = getattr(source, name)[index][rows]
        setattr(layer, name, states)
        flags = {index: state is not None for index, state in states.items()}
        setattr(layer, f"is_{name}_initialized", flags)


def _names_of_tokens(layer: Any) -> list[str]:
    """The attributes of a layer that contain something per token."""
    if type(layer) not in _WITH_KEYS:
        return []
    indexed = [n for n in _DIMS if n.startswith("indexer") and getattr(layer, n, None) is not None]
    return ["keys", "values", *indexed]


def _names_of_states(layer: Any) -> list[str]:
    """The attributes of a layer that contain something per row."""
    is_recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
    return ["conv_states", "recurrent_states"] if is_recurrent else []


def _by_row(name: str, tensor: Tensor) -> Tensor:
    """A view of such an attribute, `(num_rows, num_columns, ...)`."""
    return tensor.movedim(_DIMS[name], (0, 1))


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)
