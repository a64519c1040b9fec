"""Attaching prefix batches to one frozen model, and reading its geometry."""

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from controlprefix.errors import RequestError, UnsupportedModelError
from controlprefix.model.attention import (
    IMPLEMENTATIONS,
    PLACE,
    AttentionCall,
    Place,
    intercepted,
    recordings,
    watchers,
)
from controlprefix.prefixes.assembly import Part, PrefixBatch, SlotBlock, assemble
from controlprefix.prefixes.geometry import SITES, Geometry, LayerShape, Site


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an attention module stands, and what it attends to there."""

    steering: "Steering"
    site: Site
    layer: int

    def blocks(self, num_rows: int) -> tuple[SlotBlock, ...]:
        batch = self.steering.current()
        blocks = batch.blocks.get(self.site, ()) if batch else ()
        if batch and blocks and num_rows % batch.num_rows:
            raise RequestError(
                f"the model was called with {num_rows} rows inside a block assembled for "
                f"{batch.num_rows} requests; give each request its row"
            )
        return blocks


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

    def assemble(self, rows: Sequence[Sequence[Part]]) -> PrefixBatch:
        """The parts of each row, put together for this model: see `assembly.assemble`."""
        model = self._model()
        assert model is not None
        return assemble(rows, self.geometry, device=model.device, dtype=model.dtype)

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
        thread = threading.get_ident()
        calls = recordings[thread] = []
        try:
            with self.attached(PrefixBatch(num_rows=1, blocks={})):
                yield calls
        finally:
            del recordings[thread]

    @contextlib.contextmanager
    def watched(self, watcher: Callable[[Place, Tensor], None]) -> Iterator[None]:
        """While inside, this thread's calls tell the weights that queries put on slots.

        Args:
            watcher: Given, in each layer that has some, its place and `(batch, queries,
                heads, slots)`; slots that rows share come first.
        """
        watchers[threading.get_ident()] = watcher
        try:
            yield
        finally:
            del watchers[threading.get_ident()]

    def place_of(self, call: AttentionCall) -> "_Place | None":
        """Where a recorded call was made; None if outside the model's text attention."""
        place: _Place | None = call.module.__dict__.get(PLACE)
        return place

    def _install(self) -> contextlib.ExitStack:
        """Stand in for attention, and give each layer its place; closing undoes it."""
        model = self._model()
        assert model is not None
        placed = {path: model.get_submodule(path) for path in self._places}
        for module in (model, *placed.values()):  # it may have been changed since
            _require_supported(module)
        undo = contextlib.ExitStack()
        undo.enter_context(intercepted())
        for path, (site, layer) in self._places.items():
            setattr(placed[path], PLACE, _Place(self, site, layer))
            undo.callback(delattr, placed[path], PLACE)
        if (head := model.get_output_embeddings()) is not None:
            undo.callback(head.register_forward_pre_hook(_contiguous).remove)
        return undo

    def _read_geometry(self, model: PreTrainedModel) -> Geometry:
        """Run three tokens (two in a decoder behind an encoder) and see who calls attention."""
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(1, 2, dtype=torch.long, device=device)
        with torch.no_grad(), self.recorded() as calls:
            try:
                model(**inputs, use_cache=False)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be run on tokens alone: {error}"
                ) from error
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
        needed: tuple[Site, ...] = SITES if encoder is not None else ("decoder",)
        if missing := [site for site in needed if not shapes[site]]:
            raise UnsupportedModelError(
                f"the {missing[0]} of {type(model).__name__} does not call attention through "
                "transformers' AttentionInterface (state-space models and some older classes do "
                "not), so there is nowhere to attend to slots; use a model class that does, such "
                "as Llama, Qwen3, Mistral, Gemma 3, GPT-2, GPT-NeoX, OPT, BART or T5"
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


def _contiguous(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Given a slice, torch's bfloat16 product on CPU copies the whole vocabulary for each row."""
    return (args[0].contiguous(), *args[1:])


def _require_supported(module: nn.Module) -> None:
    name = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if name not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(module).__name__} has attn_implementation={name!r}; slots can be attended to "
            f"with: {', '.join(IMPLEMENTATIONS)}; load the model with attn_implementation='sdpa'"
        )


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
