"""Attention over slots and tokens, in place of transformers' attention functions.

transformers looks its attention function up by name. While a prefix batch is attached to a
model, the names `sdpa` and `eager` lead here: in a layer with slots every query attends to
them beside the tokens, and those of decoupled prefixes in a softmax of their own; any other call,
of any model, goes on to the original function. Slots never enter a KV cache and never shift a
position.
"""

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from controlprefix.errors import UnsupportedModelError
from controlprefix.model.decode_kernel import decode
from controlprefix.model.decoupled_attention import decoupled_attention
from controlprefix.model.masks import joined_keys_and_values, mask_with_slots
from controlprefix.model.prefill_kernel import PREFILL_CHUNK, prefill
from controlprefix.prefixes import DecoupledBlock, Site, SlotBlock

IMPLEMENTATIONS = ("sdpa", "eager")  # transformers' names of the functions we stand in for
# Set on attention modules while a batch is attached: the layer, and a number for compiled graphs.
LAYER_ATTRIBUTE = "controlprefix_layer"
HANDLE_ATTRIBUTE = "controlprefix_handle"


class SteeredLayer(Protocol):
    """An attention layer of a steered model."""

    @property
    def site(self) -> Site:
        """The site of the layer."""

    @property
    def index(self) -> int:
        """Index among the layers of the site."""

    def slots(self, num_rows: int) -> tuple[tuple[SlotBlock, ...], tuple[DecoupledBlock, ...]]:
        """What a call with `num_rows` rows attends to beside its tokens; both may be empty."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A recorded call of attention."""

    module: nn.Module
    query: Tensor  # (batch, num_heads, num_queries, key_dim)
    key: Tensor  # (batch, num_kv_heads, num_keys, key_dim), after rotary embedding
    value: Tensor  # (batch, num_kv_heads, num_keys, value_dim)
    scaling: float | None  # factor of the logits; None is key_dim ** -0.5

    @property
    def layer(self) -> SteeredLayer | None:
        """The layer; None outside the model's text attention."""
        layer: SteeredLayer | None = self.module.__dict__.get(LAYER_ATTRIBUTE)
        return layer


# The arguments of transformers' attention functions that `_attend_in_graph` has.
_GRAPH_ARGUMENTS = (
    "dropout",
    "is_causal",
    "position_bias",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
)
# A CUDA graph would replay the slots that it was captured with. torch before 2.10 has no tag.
_HAS_TAG = hasattr(torch.Tag, "cudagraph_unsafe")
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if _HAS_TAG else {}
_handles = itertools.count()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # by handle
_lock = threading.Lock()
_open_blocks: dict[object, None] = {}  # changed by single operations, which need no lock
_originals: dict[str, Callable[..., Any] | None] = {}
_recordings: dict[int, list[AttentionCall]] = {}  # by thread
_watchers: dict[int, Callable[[SteeredLayer, Tensor], None]] = {}  # by thread


@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """Register our attention function under transformers' own names while inside.

    The names stay, since some models look at them to choose masks and code paths. An interrupt
    (Ctrl-C) at any line leaves transformers' functions in place, or what the next block puts
    right.
    """
    block = object()
    try:
        try:
            _open_blocks[block] = None
            _update_registry()
            yield
        finally:
            _close_block(block)
    finally:
        _close_block(block)  # once more, in case an interrupt ended the first


def _close_block(block: object) -> None:
    _open_blocks.pop(block, None)
    _update_registry()


def _update_registry() -> None:
    """Register our functions if a block is open, and transformers' own if none is."""
    # In one line, which an interrupt cannot part.
    with _lock: _register_or_restore()  # fmt: skip  # noqa: E701


def _register_or_restore() -> None:
    mapping = AttentionInterface._global_mapping
    for name in IMPLEMENTATIONS:
        # `eager` has no entry: each model brings its own.
        present = mapping.get(name)
        is_ours = isinstance(present, partial) and present.func is _attend
        if _open_blocks and not is_ours:
            _originals[name] = present
            mapping[name] = _replacement(name, present)
        elif is_ours and not _open_blocks:
            original = _originals[name]
            if original is None:
                del mapping[name]
            else:
                mapping[name] = original


@contextlib.contextmanager
def recording() -> Iterator[list[AttentionCall]]:
    """Record this thread's attention calls inside an `intercepted` block."""
    thread = threading.get_ident()
    calls = _recordings[thread] = []
    try:
        yield calls
    finally:
        del _recordings[thread]


@contextlib.contextmanager
def watching(callback: Callable[[SteeredLayer, Tensor], None]) -> Iterator[None]:
    """Give this thread's attention weights on slots to a callback, while inside.

    Args:
        callback: Called in each layer that has slots, with the layer and the weights
            `(batch, num_queries, num_heads, num_slots)`; slots that rows share come first.
    """
    thread = threading.get_ident()
    _watchers[thread] = callback
    try:
        yield
    finally:
        del _watchers[thread]


def new_handle(module: nn.Module) -> int:
    """A number by which compiled graphs find a module."""
    handle = next(_handles)
    _modules[handle] = module
    return handle


def require_supported(module: nn.Module) -> None:
    """Check that a module uses an attention implementation that we stand in for.

    Raises:
        UnsupportedModelError: If it does not.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if name not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(module).__name__} has attn_implementation={name!r}; slots need one of: "
            f"{', '.join(IMPLEMENTATIONS)}; load the model with attn_implementation='sdpa'"
        )


@cache
def _replacement(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    """What is registered in place of a function: the same object each time.

    `torch.compile` guards on its identity, so attaching a batch does not compile again.
    """
    return partial(_attend, name, original)


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
    """The attention function that transformers calls; shapes as in `AttentionCall`.

    Returns:
        The output `(batch, num_queries, num_heads, value_dim)` and, in eager mode, the
        attention weights on the tokens.
    """
    if torch.compiler.is_compiling():
        return _attend_compiled(
            implementation, original, module, query, key, value, attention_mask, kwargs
        )
    # `original` is an argument, since another thread may unregister it during this call.
    base = original or _eager_function(type(module))  # type: ignore[arg-type]  # a class
    if _recordings and (calls := _recordings.get(threading.get_ident())) is not None:
        calls.append(AttentionCall(module, query, key, value, kwargs.get("scaling")))
    layer: SteeredLayer | None = module.__dict__.get(LAYER_ATTRIBUTE)
    blocks, decoupled = layer.slots(query.shape[0]) if layer else ((), ())
    if layer is None or not (blocks or decoupled):
        return base(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("cache") is not None:
        raise UnsupportedModelError(
            "transformers' continuous batching packs rows into one sequence, where the slots of "
            "different rows cannot be told apart; use generate"
        )
    if not blocks:
        output, weights = base(module, query, key, value, attention_mask, **kwargs)
    else:
        output, weights = _attend_jointly(
            implementation, base, module, layer, query, key, value, attention_mask, blocks, kwargs
        )
    for block in decoupled:
        output = output + decoupled_attention(query, block, layer.index, kwargs.get("scaling"))
    return output, weights


def _attend_jointly(
    implementation: str,
    base: Callable[..., Any],
    module: nn.Module,
    layer: SteeredLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """One softmax over slots and tokens, by the fastest function that knows the arguments."""
    watcher = _watchers.get(threading.get_ident()) if _watchers else None
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
        scaling = kwargs.get("scaling")
        return decode(query, key, value, attention_mask, blocks, layer.index, scaling), None
    watch = None if watcher is None else partial(watcher, layer)
    return _attend_with_slots_first(
        base, module, query, key, value, attention_mask, blocks, layer.index, kwargs, watch
    )


def _attend_compiled(
    implementation: str,
    original: Callable[..., Any] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """`_attend` while `torch.compile` traces: one operation, so that graphs hold no slots.

    For what the operation cannot do (other arguments, weights, gradients) the graph breaks.
    """
    handle: int | None = getattr(module, HANDLE_ATTRIBUTE, None)
    if handle is None and original is not None:  # a module of another model
        result: tuple[Tensor, Tensor | None] = original(module, query, key, value, mask, **kwargs)
        return result
    # Other arguments have no effect on `sdpa`, to which layers pass all they were called with.
    arguments = {name: kwargs[name] for name in _GRAPH_ARGUMENTS if kwargs.get(name) is not None}
    is_unsafe = query.is_cuda and not _HAS_TAG
    is_unknown = implementation != "sdpa" or kwargs.get("cache") is not None
    if is_unsafe or is_unknown or torch.is_grad_enabled():
        return _attend_outside_graph(
            implementation, original, module, query, key, value, mask, **kwargs
        )
    return _attend_in_graph(query, key, value, mask, handle, **arguments), None


@torch.library.custom_op("controlprefix::attend", mutates_args=(), **_TAGS)
def _attend_in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: int,
    scaling: float | None = None,
    dropout: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of the module with a handle, over the slots attached when the graph runs."""
    kwargs = {
        "scaling": scaling,
        "dropout": dropout,
        "is_causal": is_causal,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "position_bias": position_bias,
        "s_aux": s_aux,
    }
    arguments = {name: item for name, item in kwargs.items() if item is not None}
    original, module = _originals["sdpa"], _modules[handle]
    return _attend("sdpa", original, module, query, key, value, mask, **arguments)[0].contiguous()


@_attend_in_graph.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(len(query), query.shape[2], query.shape[1], value.shape[3])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_outside_graph(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(*args, **kwargs)


def _attend_with_slots_first(
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
    """The model's own attention function, with slots put before the tokens.

    Slots are visible to every query, also beyond a sliding window, and a position bias (T5)
    is zero for them.
    """
    num_queries = query.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and mask is None and num_queries > 1
    if causal and key.shape[2] > num_queries:  # an empty static cache: the rest is not written
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]

    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        num_slots = sum(block.log_strengths.shape[1] for block in blocks)
        with_slots = pad(position_bias[..., : key.shape[2]], (num_slots, 0))
        kwargs = {**kwargs, "position_bias": with_slots}
    is_sdpa = getattr(base, "__name__", "") == "sdpa_attention_forward"
    if is_sdpa and num_queries > PREFILL_CHUNK and watch is None and position_bias is None:
        options = (kwargs.get("scaling"), kwargs.get("dropout") or 0.0)
        return prefill(query, key, value, mask, blocks, layer, causal, *options), None
    keys, values = joined_keys_and_values(blocks, layer, key, value)
    mask = mask_with_slots(mask, blocks, key, num_queries, causal)
    output, weights = base(module, query, keys, values, mask, **kwargs)
    if watch is not None:
        num_slots = keys.shape[2] - key.shape[2]
        if is_sdpa and position_bias is None:
            watch(_weights(query, keys, mask, kwargs.get("scaling"))[..., :num_slots])
        else:
            # Attention is linear in the values, so one-hot values give the weights on the slots.
            one_hot = torch.eye(keys.shape[2], num_slots, dtype=keys.dtype, device=keys.device)
            one_hot = one_hot.expand(*keys.shape[:2], -1, -1)
            watch(base(module, query, keys, one_hot, mask, **kwargs)[0])
    return output, None if weights is None else weights[..., -key.shape[2] :]


def _weights(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The attention weights of scaled dot products, `(batch, num_queries, num_heads, num_keys)`."""
    grouped = query.unflatten(1, (keys.shape[1], -1)).float()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (grouped * scale @ keys[:, :, None].float().transpose(3, 4)).flatten(1, 2)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(dim=3).transpose(1, 2)


@cache
def _eager_function(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention function that the code of this class refers to."""
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
