"""Attention over slots and tokens, inside a frozen transformers model.

transformers asks a registry for its attention function by name. While a prefix
batch is attached, that name is ours: for a layer with slots we let every query
attend to them beside the tokens; for every other layer we call the function that
the model had. Slots never enter the model's KV cache and never shift a position.
"""

import contextlib
import contextvars
import hashlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from controlprefix.assembly import PrefixBatch, SlotBlock
from controlprefix.errors import RequestError, UnsupportedModelError
from controlprefix.geometry import Geometry, LayerShape, Site

_PLACE = "controlprefix_place"  # the attribute a module has only while something is attached
_IMPLEMENTATIONS = {"sdpa": "controlprefix_sdpa", "eager": "controlprefix_eager"}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention: where, and the shapes and tensors it was given."""

    module: nn.Module
    query: Tensor  # (batch, num_heads, num_queries, key_dim)
    key: Tensor  # (batch, num_kv_heads, num_keys, key_dim), after rotary embedding
    value: Tensor  # (batch, num_kv_heads, num_keys, value_dim)


_recorder: contextvars.ContextVar[list[AttentionCall] | None] = contextvars.ContextVar(
    "controlprefix_recorder", default=None
)


# --- the mathematics ---------------------------------------------------------------------------


def _attend(
    implementation: str,
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
    base = _base_function(implementation, module)
    calls = _recorder.get()
    if calls is not None:
        calls.append(AttentionCall(module, query, key, value))
    place: _Place | None = module.__dict__.get(_PLACE)
    batch = place.steering.current() if place else None
    if place is None or batch is None or not (blocks := batch.blocks.get(place.site)):
        return base(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] % batch.num_rows:
        raise RequestError(
            f"the model was called with {query.shape[0]} rows inside a block assembled for "
            f"{batch.num_rows} requests; give each request its row"
        )
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


def _base_function(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that the model would have called."""
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    for cls in type(module).__mro__:  # each model file has an eager function of its own
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function")


for _implementation, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(
        _IMPLEMENTATIONS[_implementation], partial(_attend, _implementation)
    )
    # A name unknown here would skip the mask, and padding would be attended to.
    AttentionMaskInterface.register(_IMPLEMENTATIONS[_implementation], _mask)


# --- attaching to a model ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    steering: "Steering"
    site: Site
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class _Attachment:
    batch: PrefixBatch
    thread: int
    everywhere: bool


class Steering:
    """What attaches prefix batches to one model. Get it with `Steering.of(model)`.

    Attributes:
        geometry: What the attention of the model looks like, read off a forward
            pass of three tokens.
    """

    _of_model: ClassVar[WeakKeyDictionary[nn.Module, "Steering"]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._attachments: tuple[_Attachment, ...] = ()
        self._undo: contextlib.ExitStack | None = None
        self._implementation = _implementation_of(model)
        self._places: dict[str, tuple[Site, int]] = {}
        self.geometry = self._read_geometry(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Steering":
        """The one steering of this model.

        Raises:
            UnsupportedModelError: If slots cannot be attended to in this model.
        """
        steering = cls._of_model.get(model)
        if steering is None:
            steering = cls._of_model[model] = cls(model)
        return steering

    @contextlib.contextmanager
    def attached(self, batch: PrefixBatch, *, everywhere: bool = False) -> Iterator[None]:
        """While inside, the model attends to the slots of `batch`.

        Blocks may nest and threads may each hold their own: a thread sees the
        innermost block it opened itself. With `everywhere`, threads that opened
        none (a streamer's, autograd's) see this one; the others see the plain model.
        """
        attachment = _Attachment(batch, threading.get_ident(), everywhere)
        with self._lock:
            if self._undo is None:
                self._undo = self._install()
            self._attachments = (*self._attachments, attachment)
        try:
            yield
        finally:
            with self._lock:
                self._attachments = tuple(a for a in self._attachments if a is not attachment)
                if not self._attachments:
                    self._undo.close()
                    self._undo = None

    def current(self) -> PrefixBatch | None:
        """What the calling thread's forward pass attends to beside its tokens."""
        thread = threading.get_ident()
        open_now = self._attachments
        for attachment in reversed(open_now):
            if attachment.thread == thread:
                return attachment.batch
        candidates = [attachment for attachment in open_now if attachment.everywhere]
        if len({attachment.thread for attachment in candidates}) > 1:
            raise RequestError(
                "several threads have this model assembled and this thread has not, so it is not "
                "known whose prefixes to use; open `assembled` in the thread that calls the model"
            )
        return candidates[-1].batch if candidates else None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[AttentionCall]]:
        """While inside, this thread's calls of attention are collected, without slots."""
        calls: list[AttentionCall] = []
        token = _recorder.set(calls)
        try:
            with self.attached(PrefixBatch(num_rows=1, blocks={})):
                yield calls
        finally:
            _recorder.reset(token)

    def place_of(self, call: AttentionCall) -> tuple[Site, int] | None:
        """The site and layer of a recorded call."""
        place: _Place | None = call.module.__dict__.get(_PLACE)
        return (place.site, place.layer) if place else None

    def _install(self) -> contextlib.ExitStack:
        """Put our attention function and each layer's place into the model; closing undoes it."""
        model = self._model()
        assert model is not None
        undo = contextlib.ExitStack()
        owners: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
        for config in {id(owner.config): owner.config for owner in owners}.values():
            name = getattr(config, "_attn_implementation", None)
            if name in _IMPLEMENTATIONS:
                # The public setter would also overwrite the sub-configs.
                config._attn_implementation_internal = _IMPLEMENTATIONS[name]
                undo.callback(setattr, config, "_attn_implementation_internal", name)
        for path, (site, layer) in self._places.items():
            module = model.get_submodule(path)
            setattr(module, _PLACE, _Place(self, site, layer))
            undo.callback(delattr, module, _PLACE)
        return undo

    def _read_geometry(self, model: PreTrainedModel) -> Geometry:
        """Run three tokens (two in a decoder behind an encoder) and see who calls attention."""
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(1, 2, dtype=torch.long, device=device)
        with torch.no_grad(), self.recorded() as calls:
            model(**inputs, use_cache=False)
        encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        paths = {module: path for path, module in model.named_modules()}
        shapes: dict[Site, list[LayerShape]] = {"decoder": [], "encoder": [], "cross": []}
        for call in calls:
            site: Site = "decoder"
            if call.module in in_encoder:
                site = "encoder"
            elif encoder is not None and call.key.shape[2] == 3:
                site = "cross"
            path = paths.get(call.module)
            if path is None or path in self._places:
                raise UnsupportedModelError(
                    f"{type(model).__name__} calls the attention {path!r} more than once a pass, "
                    "so its layers cannot be told apart"
                )
            self._places[path] = (site, len(shapes[site]))
            _, num_kv_heads, _, key_dim = call.key.shape
            shapes[site].append(LayerShape(num_kv_heads, key_dim, call.value.shape[3]))
        if not shapes["decoder"]:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not call attention through transformers' "
                "AttentionInterface (state-space models and some older classes do not), so there "
                "is nowhere to attend to slots; use a model class that does, such as Llama, Qwen3, "
                "Mistral, Gemma 3, GPT-2, GPT-NeoX, OPT, BART or T5"
            )
        return Geometry(
            decoder=tuple(shapes["decoder"]),
            encoder=tuple(shapes["encoder"]),
            cross=tuple(shapes["cross"]),
            fingerprint=weights_fingerprint(model),
            model_name=_public_name(model),
        )


def _public_name(model: PreTrainedModel) -> str:
    """The hub id, or the last part of a folder: a prefix should not tell whose disk it was."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def _implementation_of(model: PreTrainedModel) -> str:
    name = getattr(model.config, "_attn_implementation", None)
    if name not in _IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(model).__name__} was loaded with attn_implementation={name!r}; slots can be "
            f"attended to with: {', '.join(_IMPLEMENTATIONS)}; load it with "
            "attn_implementation='sdpa'"
        )
    return str(name)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and numbers of all parameters.

    Numbers are taken in bfloat16, so a model loaded in float32 and the same
    model loaded in bfloat16 are the same model.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        numbers = parameter.detach()
        if numbers.is_floating_point():
            numbers = numbers.to(torch.bfloat16)
        sha.update(f"{name} {tuple(numbers.shape)}".encode())
        sha.update(numbers.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
