"""A KV cache that grows in place, with room for slots in front, and moving rows between caches."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_MIN_SPARE_TOKENS = 64  # spare room is this, or a quarter of the tokens
# Set on the tensors that contain keys or values: columns in front, and whose slots are there.
_FRONT_ATTRIBUTE = "controlprefix_front"
_OWNER_ATTRIBUTE = "controlprefix_owner"
_MIN_ROWS_ON_CPU = 3  # for fewer, transformers' copies cost less than our bookkeeping


class CacheRow(NamedTuple):
    """A row of a cache, and how many of its last tokens are valid."""

    cache: DynamicCache
    row: int
    num_tokens: int


def growing_cache(model: PreTrainedModel, num_rows: int, num_slots: int = 0) -> DynamicCache | None:
    """transformers' dynamic cache, without its copy of all keys and values at every token.

    Args:
        model: The model.
        num_rows: Rows of the batch.
        num_slots: Slots for which there is room in front of the tokens.

    Returns:
        None if `generate` would not take a dynamic cache for this model, or if it would not
        be faster for so few rows.
    """
    is_small = num_rows < _MIN_ROWS_ON_CPU and model.device.type == "cpu"
    if is_small or model.config.is_encoder_decoder or not _takes_dynamic_cache(model):
        return None
    return new_cache(model, num_slots)


def new_cache(model: PreTrainedModel, num_slots: int = 0) -> DynamicCache:
    """An empty cache that grows in place, with room for slots in front of the tokens."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    # Sliding and recurrent layers are left as they are: those do not grow.
    cache.layers = [
        _GrowingLayer(num_slots) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        make: Any = partial(_GrowingLayer, num_slots)
        cache.layer_class_to_replicate = make
    return cache


def behind_slots(
    tokens: Tensor, slots: Sequence[Tensor], owner: object, layer: int
) -> Tensor | None:
    """Slots and cached tokens as one tensor, if the cache has room in front of the tokens.

    The slots are written there once, not at every token.

    Args:
        tokens: Keys or values from a cache, `(batch, num_kv_heads, num_tokens, head_dim)`.
        slots: Their slots, `(batch, num_kv_heads, n, head_dim)` each.
        owner, layer: Whose slots they are; those of another object or layer (some models have
            layers that share a cache) are written again.

    Returns:
        `(batch, num_kv_heads, num_slots + num_tokens, head_dim)`, or None.
    """
    room = tokens._base
    num_front = None if room is None else room.__dict__.get(_FRONT_ATTRIBUTE)
    num_slots = sum(slot.shape[2] for slot in slots)
    if (
        room is None
        or num_front is None
        or num_front < num_slots
        or torch.is_grad_enabled()
        or tokens.shape[:2] != room.shape[:2]
        or tokens.storage_offset() != num_front * room.stride(2)
    ):
        return None
    start = num_front - num_slots
    owner_there, layer_there = room.__dict__.get(_OWNER_ATTRIBUTE, (None, None))
    if owner_there is not owner or layer_there != layer:
        end = start
        for slot in slots:
            room[:, :, end : end + slot.shape[2]] = slot
            end += slot.shape[2]
        setattr(room, _OWNER_ATTRIBUTE, (owner, layer))
    return room[:, :, start : num_front + tokens.shape[2]]


def rows_can_move(model: PreTrainedModel, num_attention_layers: int) -> bool:
    """Whether the cache of a row is the keys and values of all its tokens and nothing else.

    Args:
        model: The model.
        num_attention_layers: Layers that attend to tokens. A cache with more of them has layers
            that stay empty, such as those that attend to images.
    """
    if model.config.is_encoder_decoder or not _takes_dynamic_cache(model):
        return False
    layers = new_cache(model).layers
    return len(layers) == num_attention_layers and all(
        type(layer) is _GrowingLayer for layer in layers
    )


def arrange_rows(
    cache: DynamicCache, rows: Sequence[CacheRow], length: int, num_slots: int = 0
) -> None:
    """Fill a cache with rows of caches, each ending at the same column, with room to grow.

    What is before a row's valid tokens is copied as it is, or zero.

    Args:
        cache: The cache to fill; rows may come from it too.
        rows: The row to copy, per row of the result.
        length: Tokens of the longest row.
        num_slots: Slots for which there is room in front of the tokens.
    """
    targets: dict[int, list[int]] = {}  # by cache
    for target, source in enumerate(rows):
        targets.setdefault(id(source.cache), []).append(target)
    device = _layers(rows[0].cache)[0].keys.device
    moves = [
        (
            rows[group[0]].cache,
            torch.tensor([rows[target].row for target in group], device=device),
            torch.tensor(group, device=device),
        )
        for group in targets.values()
    ]
    for i, first in enumerate(_layers(rows[0].cache)):
        tensors = []
        for name in ("keys", "values"):
            example: Tensor = getattr(first, name)
            room = _room((len(rows), example.shape[1]), length, example, num_slots)
            tokens = room[:, :, num_slots : num_slots + length]
            for source_cache, source_rows, target_rows in moves:
                tensor: Tensor = getattr(_layers(source_cache)[i], name)[:, :, -length:]
                room[target_rows, :, num_slots + length - tensor.shape[2] : num_slots + length] = (
                    tensor[source_rows]
                )
            tensors.append(tokens)
        while len(cache.layers) <= i:
            cache.layers.append(_GrowingLayer(num_slots))
        layer = _layers(cache)[i]
        if not layer.is_initialized:
            layer.lazy_initialization(*tensors)
        layer.num_slots = num_slots
        layer.keys, layer.values = tensors


def overwrite_row(cache: DynamicCache, row: int, source: CacheRow) -> None:
    """Overwrite a row with one of at most its length, ending at the same column."""
    for layer, other in zip(_layers(cache), _layers(source.cache), strict=True):
        for tensor, new in ((layer.keys, other.keys), (layer.values, other.values)):
            tensor[row, :, -source.num_tokens :] = new[source.row, :, -source.num_tokens :]
            # Masked, but what another request left may be no number.
            tensor[row, :, : -source.num_tokens] = 0


def _takes_dynamic_cache(model: PreTrainedModel) -> bool:
    takes: Any = model._supports_default_dynamic_cache
    return bool(takes())


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


class _GrowingLayer(DynamicLayer):
    """Keys and values are a part of a larger tensor, into which the next ones are written.

    Whatever else sets them (beams, cropping) is respected.

    Args:
        num_slots: Columns in front of the tokens.
    """

    def __init__(self, num_slots: int = 0) -> None:
        super().__init__()
        self.num_slots = num_slots

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _append(self.keys, key_states, self.num_slots)
        self.values = _append(self.values, value_states, self.num_slots)
        return self.keys, self.values


def _append(old: Tensor | None, new: Tensor, num_slots: int) -> Tensor:
    """Old and new tokens, as a part of a tensor with room: (batch, heads, tokens, head_dim)."""
    if old is None or not old.numel():
        old, num_old, room = None, 0, None
    else:
        num_old, room = old.shape[2], old._base
    num_all = num_old + new.shape[2]
    if (
        room is None
        or room.dim() != 4
        or room.shape[2] < num_slots + num_all
        or room.shape[:2] != new.shape[:2]
        or old is None
        or room.data_ptr() + num_slots * room.stride(2) * room.element_size() != old.data_ptr()
    ):
        room = _room(new.shape[:2], num_all, new, num_slots)
        if old is not None:
            room[:, :, num_slots : num_slots + num_old] = old
    room[:, :, num_slots + num_old : num_slots + num_all] = new
    return room[:, :, num_slots : num_slots + num_all]


def _room(shape: Sequence[int], length: int, like: Tensor, num_slots: int) -> Tensor:
    """A tensor for slots, so many tokens, and more: `(*shape, columns, head_dim)`."""
    size = num_slots + length + max(_MIN_SPARE_TOKENS, length // 4)
    room = like.new_zeros(*shape, size, like.shape[3])
    setattr(room, _FRONT_ATTRIBUTE, num_slots)
    return room
