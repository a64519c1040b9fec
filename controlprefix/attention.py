"""Attention over slots and tokens, in the place of transformers' attention functions.

transformers looks its attention function up by name. While `steering` has a prefix
batch attached to a model, `sdpa` and `eager` lead here: in a layer with slots every
query attends to them beside the tokens; any other call, of any model, is passed on to
the function it was for. Slots never enter a KV cache and never shift a position.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from controlprefix.assembly import SlotBlock
from controlprefix.errors import UnsupportedModelError

IMPLEMENTATIONS = ("sdpa", "eager")  # transformers' names for what we stand in for
PLACE = "controlprefix_place"  # the attribute of an attention module while something is attached


class Place(Protocol):
    """Where in a model an attention module stands."""

    @property
    def layer(self) -> int:
        """Index among the layers of its site."""

    def blocks(self, num_rows: int) -> tuple[SlotBlock, ...]:
        """The slots that a call with so many rows attends to here; maybe none."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention: where, and the shapes and tensors it was given."""

    module: nn.Module
    query: Tensor  # (batch, num_heads, num_queries, key_dim)
    key: Tensor  # (batch, num_kv_heads, num_keys, key_dim), after rotary embedding
    value: Tensor  # (batch, num_kv_heads, num_keys, value_dim)


# Thread -> the calls made in it, for threads where somebody collects them.
recordings: dict[int, list[AttentionCall]] = {}


@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """While inside, transformers finds our attention function under its own names.

    The names stay: some models look at them to choose masks and paths.
    """
    global _num_open
    with _lock:
        if not _num_open:
            for name in IMPLEMENTATIONS:
                # `eager` has no entry: each model brings its own
                original = _originals[name] = AttentionInterface._global_mapping.get(name)
                AttentionInterface.register(name, partial(_attend, name, original))
        _num_open += 1
    try:
        yield
    finally:
        with _lock:
            _num_open -= 1
            if not _num_open:
                for name, original in _originals.items():
                    if original is None:
                        del AttentionInterface._global_mapping[name]
                    else:
                        AttentionInterface.register(name, original)


_lock = threading.Lock()
_num_open = 0
_originals: dict[str, Callable[..., Any] | None] = {}


def _attend(
    implementation: str,
    original: Callable[..., Any] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls; shapes as in `AttentionCall`.

    Returns the output `(batch, num_queries, num_heads, value_dim)` and, in eager
    mode, the weights on the tokens.
    """
    # The original comes with the call: another thread may close the last block meanwhile.
    base = original or _eager_function(type(module))  # type: ignore[arg-type]  # a class, not one
    if recordings and (calls := recordings.get(threading.get_ident())) is not None:
        calls.append(AttentionCall(module, query, key, value))
    place: Place | None = module.__dict__.get(PLACE)
    blocks = place.blocks(query.shape[0]) if place else ()
    if place is None or not blocks:
        return base(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("cache") is not None:
        raise UnsupportedModelError(
            "transformers' continuous batching packs rows into one sequence, where slots cannot "
            "yet be told apart; use generate"
        )
    decoding = (
        implementation == "sdpa"
        and query.shape[2] == 1
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
        and (attention_mask is None or attention_mask.shape[1] == 1)
    )
    if decoding:
        scaling = kwargs.get("scaling")
        return _decode(query, key, value, attention_mask, blocks, place.layer, scaling), None
    return _attend_in_front(
        base, module, query, key, value, attention_mask, blocks, place.layer, kwargs
    )


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    layer: int,
    scaling: float | None,
) -> Tensor:
    """One new token a row: one softmax over slots and tokens, without joining their keys."""
    batch, num_heads, _, key_dim = query.shape
    num_kv_heads = key.shape[1]
    query = query * (key_dim**-0.5 if scaling is None else scaling)
    query = query.reshape(batch, num_kv_heads, -1, key_dim)  # (batch, kv heads, group, key_dim)
    scores = [query @ key.transpose(2, 3)]  # (batch, kv heads, group, num_keys)
    if mask is not None:
        bias = mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
        scores[0] = scores[0] + bias
    for block in blocks:
        slots = _fold(query, block) @ block.keys[layer].transpose(2, 3)
        slots = slots + block.log_strengths[:, None, None]
        scores.append(_unfold(slots, batch))  # (batch, kv heads, group, num_slots)
    weights = torch.cat(scores, dim=3).softmax(dim=3, dtype=torch.float32).to(value.dtype)
    pieces = weights.split([score.shape[3] for score in scores], dim=3)
    output = pieces[0] @ value  # (batch, kv heads, group, value_dim)
    for block, piece in zip(blocks, pieces[1:], strict=True):
        output = output + _unfold(_fold(piece, block) @ block.values[layer], batch)
    return output.reshape(batch, 1, num_heads, -1)


def _fold(per_row: Tensor, block: SlotBlock) -> Tensor:
    """(batch, kv heads, group, n) -> one batch entry for each row of slots.

    A call may have more rows than requests (beams, returned sequences): those of
    one request stand together and attend to the same slots.
    """
    rows = block.log_strengths.shape[0]
    batch, heads, group, size = per_row.shape
    folded = per_row.view(rows, batch // rows, heads, group, size).transpose(1, 2)
    return folded.reshape(rows, heads, -1, size)


def _unfold(folded: Tensor, batch: int) -> Tensor:
    """Undo `_fold`."""
    rows, heads, _, size = folded.shape
    return folded.view(rows, heads, batch // rows, -1, size).transpose(1, 2).flatten(0, 1)


def _attend_in_front(
    base: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    layer: int,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Many queries a row: the model's own attention function, with slots in front of the tokens.

    They are visible to every query, also past a sliding window, and a position
    bias (T5) is zero for them.
    """
    batch, _, num_queries, _ = query.shape
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and mask is None and num_queries > 1
    if causal and key.shape[2] > num_queries:  # an empty static cache: the rest is not yet written
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    num_keys = key.shape[2]

    keys = [_expand(block.keys[layer], batch) for block in blocks]
    values = [_expand(block.values[layer], batch) for block in blocks]
    bias = torch.cat([_expand(block.log_strengths, batch) for block in blocks], dim=1)
    num_slots = bias.shape[1]

    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = (mask.tril() if causal else mask)[None, None]
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    mask = mask[..., :num_keys].to(query.dtype)
    bias = bias[:, None, None].to(query.dtype).expand(batch, mask.shape[1], num_queries, num_slots)
    mask = torch.cat([bias, mask.expand(batch, -1, num_queries, -1)], dim=3)

    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        kwargs = {**kwargs, "position_bias": pad(position_bias[..., :num_keys], (num_slots, 0))}
    output, weights = base(
        module,
        query,
        torch.cat([*keys, key], dim=2),
        torch.cat([*values, value], dim=2),
        mask,
        **kwargs,
    )
    return output, None if weights is None else weights[..., num_slots:]


def _expand(per_row: Tensor, batch: int) -> Tensor:
    """One entry for each row of the call, those of one request beside each other."""
    rows = per_row.shape[0]
    if rows == batch:
        return per_row
    return per_row[:, None].expand(-1, batch // rows, *per_row.shape[1:]).flatten(0, 1)


@cache
def _eager_function(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention function that this class falls back to: one its own code names."""
    for cls in module_class.__mro__:
        forward = inspect.unwrap(vars(cls).get("forward", object))
        for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            if name.endswith("eager_attention_forward"):
                function: Callable[..., Any] = forward.__globals__[name]
                return function
    raise UnsupportedModelError(
        f"{module_class.__name__} does not name its eager attention function; load the model with "
        "attn_implementation='sdpa'"
    )
