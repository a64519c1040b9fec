"""Attention over slots and tokens, in the place of transformers' attention functions.

transformers looks its attention function up by name. While `steering` has a prefix
batch attached to a model, `sdpa` and `eager` lead here: in a layer with slots every
query attends to them beside the tokens; any other call, of any model, is passed on to
the function it was for. Slots never enter a KV cache and never shift a position.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from controlprefix.errors import UnsupportedModelError
from controlprefix.prefixes.assembly import SlotBlock
from controlprefix.prefixes.geometry import Site

IMPLEMENTATIONS = ("sdpa", "eager")  # transformers' names for what we stand in for
PLACE = "controlprefix_place"  # the attribute of an attention module while something is attached


class Place(Protocol):
    """Where in a model an attention module stands."""

    @property
    def site(self) -> Site:
        """What it attends to."""

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

# Thread -> who is told where a call is, and its weights: (batch, queries, heads, slots).
watchers: dict[int, Callable[[Place, Tensor], None]] = {}


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
    watcher = watchers.get(threading.get_ident()) if watchers else None
    if (
        query.shape[2] == 1
        and watcher is None
        and implementation == "sdpa"
        and (attention_mask is None or attention_mask.shape[1] == 1)
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
    ):
        output = _decode(
            query, key, value, attention_mask, blocks, place.layer, kwargs.get("scaling")
        )
        return output, None
    watch = None if watcher is None else partial(watcher, place)
    return _attend_in_front(
        base, module, query, key, value, attention_mask, blocks, place.layer, kwargs, watch
    )


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
    watch: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function, with slots in front of the tokens.

    They are visible to every query, also past a sliding window, and a position
    bias (T5) is zero for them.
    """
    num_queries = query.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and mask is None and num_queries > 1
    if causal and key.shape[2] > num_queries:  # an empty static cache: the rest is not yet written
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]

    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        num_slots = sum(block.log_strengths.shape[1] for block in blocks)
        in_front = pad(position_bias[..., : key.shape[2]], (num_slots, 0))
        kwargs = {**kwargs, "position_bias": in_front}
    keys, values = _joined(blocks, layer, key, value)
    mask = _mask_in_front(mask, blocks, key, num_queries, causal)
    output, weights = base(module, query, keys, values, mask, **kwargs)
    if watch is not None:
        # Attention is linear in the values: those that say which slot they are give the weights.
        num_slots = keys.shape[2] - key.shape[2]
        which = torch.eye(keys.shape[2], num_slots, dtype=keys.dtype, device=keys.device)
        watch(base(module, query, keys, which.expand(*keys.shape[:2], -1, -1), mask, **kwargs)[0])
    return output, None if weights is None else weights[..., -key.shape[2] :]


def _mask_in_front(
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    key: Tensor,
    num_queries: int,
    causal: bool,
) -> Tensor | None:
    """Log strengths in front of a mask: (batch, 1 or heads, queries, slots + keys)."""
    if mask is None and not causal and all(block.even for block in blocks):
        return None
    batch, _, num_keys, _ = key.shape
    dtype = key.dtype

    def made() -> Tensor:
        if mask is None:
            tokens = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device)
            tokens = _additive(tokens.tril() if causal else tokens, dtype)[None, None]
        else:
            tokens = _additive(mask, dtype)[..., :num_keys]
        bias = torch.cat([_expand(block.log_strengths, batch) for block in blocks], dim=1)
        bias = bias[:, None, None].to(dtype).expand(-1, tokens.shape[1], num_queries, -1)
        return torch.cat([bias, tokens.expand(batch, -1, num_queries, -1)], dim=3)

    shared = blocks[0].log_strengths if mask is None else mask
    return _once(shared, "in front", blocks, (batch, num_queries, num_keys, dtype, causal), made)


# From so many numbers in the keys of a one-token call on, copying them costs more than the
# operations that keep slots and tokens apart: measured on a CPU, an estimate elsewhere.
_APART_FROM = {"cpu": 3 << 17}
_APART_FROM_ELSEWHERE = 1 << 26


class _Segment(NamedTuple):
    """Some of what the queries of a call attend to.

    Its rows are those of the call, or fewer: one that all share; or one for the
    beams of a request, which stand together.
    """

    keys: Tensor  # (rows, num_kv_heads, n, key_dim)
    values: Tensor  # (rows, num_kv_heads, n, value_dim)
    bias: Tensor | None  # (rows, n), added to the logits


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    layer: int,
    scaling: float | None,
) -> Tensor:
    """One new token a row. Returns (batch, 1, num_heads, value_dim)."""
    batch, num_heads, _, key_dim = query.shape
    _, num_kv_heads, num_keys, _ = key.shape
    num_slots = sum(block.keys[layer].shape[2] for block in blocks)
    size = batch * num_kv_heads * (num_slots + num_keys) * key_dim
    if size >= _APART_FROM.get(key.device.type, _APART_FROM_ELSEWHERE):
        bias = None if mask is None else _additive_rows(mask, blocks, batch, key)
        segments = [_Segment(key, value, bias)]
        for block in blocks:
            bias = None if block.even else block.log_strengths.to(key.dtype)
            segments.append(_Segment(block.keys[layer], block.values[layer], bias))
        return _one_softmax(query, segments, scaling)
    keys, values = _joined(blocks, layer, key, value)
    output = scaled_dot_product_attention(
        query.reshape(batch, num_kv_heads, -1, key_dim),
        keys,
        values,
        _mask_in_front(mask, blocks, key, 1, False),
        scale=scaling,
    )  # (batch, kv heads, group, value_dim)
    return output.reshape(batch, 1, num_heads, -1)


def _one_softmax(query: Tensor, segments: Sequence[_Segment], scaling: float | None) -> Tensor:
    """Attention of one query a row over several segments, whose keys are never joined."""
    batch, num_heads, _, key_dim = query.shape
    num_kv_heads = segments[0].keys.shape[1]
    query = query.reshape(batch * num_kv_heads, -1, key_dim)  # (batch * kv heads, group, key_dim)
    scale = key_dim**-0.5 if scaling is None else scaling
    scores = []
    for keys, _, bias in segments:
        # Keys first: a growing cache's are no dense tensor, and on CPU the other way round would
        # copy them.
        keys, folded = keys.flatten(0, 1), _fold(query, batch, len(keys)).transpose(1, 2)
        if bias is None:
            found = torch.baddbmm(query.new_empty(1), keys, folded, beta=0, alpha=scale)
        else:
            heads = bias[:, None].expand(-1, num_kv_heads, -1).flatten(0, 1)[:, :, None]
            found = torch.baddbmm(heads, keys, folded, alpha=scale)
        found = found.transpose(1, 2)
        scores.append(_unfold(found, batch, len(found) // num_kv_heads))  # (.., group, n)
    weights = torch.cat(scores, 2) if len(scores) > 1 else scores[0]
    pieces = weights.softmax(2).split([score.shape[2] for score in scores], 2)
    outputs = []
    for piece, (_, values, _) in zip(pieces, segments, strict=True):
        rows = len(values)
        found = torch.bmm(_fold(piece, batch, rows), values.flatten(0, 1))
        outputs.append(_unfold(found, batch, rows))  # (batch * kv heads, group, value_dim)
    return sum(outputs[1:], outputs[0]).view(batch, 1, num_heads, -1)


def _fold(per_row: Tensor, batch: int, rows: int) -> Tensor:
    """(batch * kv heads, group, n) -> (rows * kv heads, batch / rows * group, n)"""
    if rows == batch:
        return per_row
    heads, group, size = per_row.shape
    folded = per_row.view(rows, batch // rows, heads // batch, group, size).transpose(1, 2)
    return folded.reshape(rows * (heads // batch), -1, size)


def _unfold(folded: Tensor, batch: int, rows: int) -> Tensor:
    """Undo `_fold`."""
    if rows == batch:
        return folded
    heads, _, size = folded.shape
    split = folded.view(rows, heads // rows, batch // rows, -1, size).transpose(1, 2)
    return split.flatten(0, 2)


def _joined(
    blocks: tuple[SlotBlock, ...], layer: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Slots in front of tokens: (batch, num_kv_heads, slots + keys, head_dim)."""
    batch = len(key)
    keys = [_expand(block.keys[layer], batch) for block in blocks]
    values = [_expand(block.values[layer], batch) for block in blocks]
    return torch.cat((*keys, key), 2), torch.cat((*values, value), 2)


def _expand(per_row: Tensor, batch: int) -> Tensor:
    """One entry for each row of the call, those of one request beside each other."""
    rows = per_row.shape[0]
    if rows in (1, batch):
        return per_row.expand(batch, *per_row.shape[1:])
    return per_row[:, None].expand(-1, batch // rows, *per_row.shape[1:]).flatten(0, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to attention logits."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _additive_rows(mask: Tensor, blocks: tuple[SlotBlock, ...], batch: int, key: Tensor) -> Tensor:
    """A mask (1 or batch, 1, 1, keys or more) of one-token calls as (batch, keys), additive."""
    num_keys = key.shape[2]
    return _once(
        mask,
        "rows",
        blocks,
        (batch, num_keys, key.dtype),
        lambda: _additive(mask, key.dtype)[:, 0, 0, :num_keys].expand(batch, -1).contiguous(),
    )


def _once(
    shared: Tensor,
    name: str,
    blocks: tuple[SlotBlock, ...],
    shape: tuple[Any, ...],
    make: Callable[[], Tensor],
) -> Tensor:
    """What the first layer made of a tensor that all layers are given; it lives with that tensor.

    Made again where the tensor was written to, or other slots or shapes are asked for.
    """
    if shared.is_inference():  # has no version to tell that it was written to
        return make()
    state = (shared._version, shape)
    notes = shared.__dict__.setdefault("controlprefix_notes", {})
    known = notes.get(name)
    if known is None or known[0] is not blocks or known[1] != state:
        known = notes[name] = (blocks, state, make())
    return known[2]


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
