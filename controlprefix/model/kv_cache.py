"""A KV cache that grows in place, with room for slots in front of the tokens."""

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_MIN_SPARE_TOKENS = 64  # spare room is this, or a quarter of the tokens
# Set on the tensors that contain keys or values: columns in front, and whose slots are there.
_FRONT_ATTRIBUTE = "controlprefix_front"
_OWNER_ATTRIBUTE = "controlprefix_owner"
_MIN_ROWS_ON_CPU = 3  # for fewer, transformers' copies cost less than our bookkeeping


@functools.cache
def _has_new_name(forward: Callable[..., Any]) -> bool:
    return "cache" in inspect.signature(forward).parameters


def cache_argument(model: PreTrainedModel) -> str:
    """What a model calls its cache: `cache`, or `past_key_values` before transformers 5.24."""
    return "cache" if _has_new_name(type(model).forward) else "past_key_values"


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
    if is_small or model.config.is_encoder_decoder or not takes_dynamic_cache(model):
        return None
    return new_cache(model, num_slots)


def new_cache(model: PreTrainedModel, num_slots: int = 0) -> DynamicCache:
    """An empty cache that grows in place, with room for slots in front of the tokens."""
    if model.config.is_encoder_decoder:  # its decoder may have more layers than its config says
        cache = DynamicCache()
    else:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    # Sliding and recurrent layers are left as they are: those do not grow.
    cache.layers = [
        GrowingLayer(num_slots) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        make: Any = partial(GrowingLayer, num_slots)
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


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether `generate` uses a dynamic cache for a model."""
    takes: Any = model._supports_default_dynamic_cache
    return bool(takes())


class GrowingLayer(DynamicLayer):
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
        room = with_room(new.shape[:2], num_all, new, num_slots)
        if old is not None:
            room[:, :, num_slots : num_slots + num_old] = old
    room[:, :, num_slots + num_old : num_slots + num_all] = new
    return room[:, :, num_slots : num_slots + num_all]


def with_room(shape: Sequence[int], length: int, like: Tensor, num_slots: int) -> Tensor:
    """Zeros for slots, `length` tokens and spare columns: `(*shape, num_columns, head_dim)`."""
    size = num_slots + length + max(_MIN_SPARE_TOKENS, length // 4)
    room = like.new_zeros(*shape, size, like.shape[3])
    setattr(room, _FRONT_ATTRIBUTE, num_slots)
    return room
