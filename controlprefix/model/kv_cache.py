"""A KV cache that grows in place, and rows that move between caches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens; room is made for so many, or a quarter of what is there


_ROWS = 3  # for fewer, transformers' copies cost less than our bookkeeping


class Source(NamedTuple):
    """A row of a cache, and how many of its last tokens count."""

    cache: DynamicCache
    row: int
    num_tokens: int


def growing_cache(model: PreTrainedModel, num_rows: int) -> DynamicCache | None:
    """transformers' dynamic cache, without its copy of all keys and values at every token.

    None where `generate` would not take a dynamic cache for this model, or it would not pay.
    """
    takes_it: Any = model._supports_default_dynamic_cache
    if num_rows < _ROWS or model.config.is_encoder_decoder or not takes_it():
        return None
    return new_cache(model)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty one."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    # Sliding and recurrent layers stay: those do not grow.
    cache.layers = [_GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _GrowingLayer
    return cache


def can_be_laid_out(model: PreTrainedModel) -> bool:
    """Whether all that is cached of a row is keys and values of its tokens, all of them."""
    takes_it: Any = model._supports_default_dynamic_cache
    if model.config.is_encoder_decoder or not takes_it():
        return False
    layers = new_cache(model).layers
    return all(type(layer) is _GrowingLayer for layer in layers)


def lay_out(cache: DynamicCache, sources: Sequence[Source], length: int) -> None:
    """Put rows of caches beside each other, each ending at the same place, with room to grow.

    Args:
        cache: Gets the rows.
        sources: For each row where it comes from: a cache (this one too), the row there, and
            how many of its last tokens count.
        length: Tokens of the longest.
    """
    for i, first in enumerate(_layers(sources[0].cache)):
        tensors = []
        for name in ("keys", "values"):
            example: Tensor = getattr(first, name)
            size = length + max(_ROOM, length // 4)
            room = example.new_zeros(len(sources), example.shape[1], size, example.shape[3])
            for row, source in enumerate(sources):
                kept: Tensor = getattr(_layers(source.cache)[i], name)
                begin = length - source.num_tokens
                room[row, :, begin:length] = kept[source.row, :, -source.num_tokens :]
            tensors.append(room)
        while len(cache.layers) <= i:
            cache.layers.append(_GrowingLayer())
        layer = _layers(cache)[i]
        if not layer.is_initialized:
            layer.lazy_initialization(*tensors)
        layer.keys, layer.values = (room[:, :, :length] for room in tensors)


def overwrite(cache: DynamicCache, row: int, source: Source) -> None:
    """Put a row in place of another one, ending at the same place; it must be no longer."""
    for layer, other in zip(_layers(cache), _layers(source.cache), strict=True):
        for kept, new in ((layer.keys, other.keys), (layer.values, other.values)):
            kept[row, :, -source.num_tokens :] = new[source.row, :, -source.num_tokens :]


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


class _GrowingLayer(DynamicLayer):
    """Keys and values are the beginning of a larger tensor, where the next ones are written.

    Whatever sets them otherwise (beams, cropping) is followed.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _appended(self.keys, key_states)
        self.values = _appended(self.values, value_states)
        return self.keys, self.values


def _appended(kept: Tensor | None, new: Tensor) -> Tensor:
    """Both, as the beginning of a tensor with room: (batch, heads, tokens, head_dim)."""
    if kept is None or not kept.numel():
        kept, num_kept, room = None, 0, None
    else:
        num_kept, room = kept.shape[2], kept._base
    num_all = num_kept + new.shape[2]
    if (
        room is None
        or room.shape[2] < num_all
        or room.shape[:2] != new.shape[:2]
        or kept is None
        or room.data_ptr() != kept.data_ptr()
    ):
        size = num_all + max(_ROOM, num_all // 4)
        room = new.new_empty(*new.shape[:2], size, new.shape[3])
        if kept is not None:
            room[:, :, :num_kept] = kept
    room[:, :, num_kept:num_all] = new
    return room[:, :, :num_all]
