"""A KV cache that grows in place, and moving rows between caches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_MIN_SPARE_TOKENS = 64  # spare room is this, or a quarter of the tokens
_MIN_ROWS_ON_CPU = 3  # for fewer, transformers' copies cost less than our bookkeeping


class CacheRow(NamedTuple):
    """A row of a cache, and how many of its last tokens are valid."""

    cache: DynamicCache
    row: int
    num_tokens: int


def growing_cache(model: PreTrainedModel, num_rows: int) -> DynamicCache | None:
    """transformers' dynamic cache, without its copy of all keys and values at every token.

    Returns:
        None if `generate` would not take a dynamic cache for this model, or if it would not
        be faster for so few rows.
    """
    is_small = num_rows < _MIN_ROWS_ON_CPU and model.device.type == "cpu"
    if is_small or model.config.is_encoder_decoder or not _takes_dynamic_cache(model):
        return None
    return new_cache(model)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that grows in place."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    # Sliding and recurrent layers are left as they are: those do not grow.
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _GrowingLayer
    return cache


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


def arrange_rows(cache: DynamicCache, rows: Sequence[CacheRow], length: int) -> None:
    """Fill a cache with rows of caches, each ending at the same column, with room to grow.

    Args:
        cache: The cache to fill; rows may come from it too.
        rows: The row to copy, per row of the result.
        length: Tokens of the longest row.
    """
    for i, first in enumerate(_layers(rows[0].cache)):
        tensors = []
        for name in ("keys", "values"):
            example: Tensor = getattr(first, name)
            size = length + max(_MIN_SPARE_TOKENS, length // 4)
            room = example.new_zeros(len(rows), example.shape[1], size, example.shape[3])
            for target, source in enumerate(rows):
                tensor: Tensor = getattr(_layers(source.cache)[i], name)
                begin = length - source.num_tokens
                room[target, :, begin:length] = tensor[source.row, :, -source.num_tokens :]
            tensors.append(room)
        while len(cache.layers) <= i:
            cache.layers.append(_GrowingLayer())
        layer = _layers(cache)[i]
        if not layer.is_initialized:
            layer.lazy_initialization(*tensors)
        layer.keys, layer.values = (room[:, :, :length] for room in tensors)


def overwrite_row(cache: DynamicCache, row: int, source: CacheRow) -> None:
    """Overwrite a row with one of at most its length, ending at the same column."""
    for layer, other in zip(_layers(cache), _layers(source.cache), strict=True):
        for tensor, new in ((layer.keys, other.keys), (layer.values, other.values)):
            tensor[row, :, -source.num_tokens :] = new[source.row, :, -source.num_tokens :]


def _takes_dynamic_cache(model: PreTrainedModel) -> bool:
    takes: Any = model._supports_default_dynamic_cache
    return bool(takes())


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


class _GrowingLayer(DynamicLayer):
    """Keys and values are the start of a larger tensor, into which the next ones are written.

    Whatever else sets them (beams, cropping) is respected.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _append(self.keys, key_states)
        self.values = _append(self.values, value_states)
        return self.keys, self.values


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    """Old and new tokens, as the start of a tensor with room: (batch, heads, tokens, head_dim)."""
    if old is None or not old.numel():
        old, num_old, room = None, 0, None
    else:
        num_old, room = old.shape[2], old._base
    num_all = num_old + new.shape[2]
    if (
        room is None
        or room.shape[2] < num_all
        or room.shape[:2] != new.shape[:2]
        or old is None
        or room.data_ptr() != old.data_ptr()
    ):
        size = num_all + max(_MIN_SPARE_TOKENS, num_all // 4)
        room = new.new_empty(*new.shape[:2], size, new.shape[3])
        if old is not None:
            room[:, :, :num_old] = old
    room[:, :, num_old:num_all] = new
    return room[:, :, :num_all]
