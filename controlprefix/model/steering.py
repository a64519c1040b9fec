"""Steering: attaches prefix batches to one frozen model, and detaches them."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from controlprefix.errors import RequestError
from controlprefix.model.attention import (
    HANDLE_ATTRIBUTE,
    LAYER_ATTRIBUTE,
    AttentionCall,
    SteeredLayer,
    intercepted,
    new_handle,
    recording,
    require_supported,
    watching,
)
from controlprefix.model.probing import LayerIndex, probe
from controlprefix.prefixes import Geometry, Part, PrefixBatch, Site, SlotBlock, assemble


@dataclass(frozen=True, slots=True)
class _Layer:
    """An attention module's position in the model, and its slots in the attached batch."""

    steering: "Steering"
    site: Site
    index: int

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
    """Attaches prefix batches to one model.

    A model has one `Steering`, since attaching marks its modules.

    Attributes:
        geometry: Attention shapes and weights fingerprint, read off a forward pass.
    """

    _by_model: ClassVar[WeakKeyDictionary[nn.Module, "Steering"]] = WeakKeyDictionary()

    def __init__(
        self, model: PreTrainedModel, geometry: Geometry, layers: Mapping[str, LayerIndex]
    ) -> None:
        self.geometry = geometry
        self._model = weakref.ref(model)
        self._layers = layers
        self._lock = threading.Lock()
        self._attachments: tuple[_Attachment, ...] = ()
        self._undo: contextlib.ExitStack | None = None
        self._handles: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, probe_again: bool = False) -> "Steering":
        """The steering of this model, probed at the first call.

        Args:
            model: The model.
            probe_again: Read the model again, since its weights may have changed in place.

        Raises:
            UnsupportedModelError: If the model's attention cannot take slots.
        """
        steering = cls._by_model.get(model)
        if steering is None:
            steering = cls._by_model[model] = cls(model, *probe(model))
        elif probe_again:
            steering.geometry, steering._layers = probe(model)
        return steering

    def assemble(self, rows: Sequence[Sequence[Part]]) -> PrefixBatch:
        """Put the parts of each row together, in the device and dtype of the model."""
        model = self._live_model()
        return assemble(rows, self.geometry, device=model.device, dtype=model.dtype)

    @contextlib.contextmanager
    def attached(self, batch: PrefixBatch, *, everywhere: bool = False) -> Iterator[None]:
        """Let the model attend to the slots of `batch` while inside.

        Blocks may nest, and threads may each have their own: a thread sees the innermost
        block that it opened itself.

        Args:
            batch: Slots per row.
            everywhere: Threads that opened no block (a streamer's, autograd's) see this one
                too; otherwise they see the plain model.
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
        """The prefix batch that the calling thread's forward passes attend to.

        Raises:
            RequestError: If several threads attached one for all threads.
        """
        thread = threading.get_ident()
        attachments = self._attachments
        for attachment in reversed(attachments):
            if attachment.thread == thread:
                return attachment.batch
        candidates = [attachment for attachment in attachments if attachment.everywhere]
        if len({attachment.thread for attachment in candidates}) > 1:
            raise RequestError(
                "several threads have this model assembled and this thread has not, so it is not "
                "known whose prefixes to use; open `assembled` in the thread that calls the model"
            )
        return candidates[-1].batch if candidates else None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[AttentionCall]]:
        """Record this thread's attention calls while inside, without any slots attached."""
        with self.attached(PrefixBatch(num_rows=1, blocks={})), recording() as calls:
            yield calls

    @contextlib.contextmanager
    def watched(self, callback: Callable[[SteeredLayer, Tensor], None]) -> Iterator[None]:
        """Observe the attention weights on slots in this thread while inside.

        Args:
            callback: Called in each layer that has slots, with the layer and the weights
                `(batch, num_queries, num_heads, num_slots)`; slots that rows share come first.
        """
        with watching(callback):
            yield

    def layer_of(self, call: AttentionCall) -> SteeredLayer | None:
        """The layer of a recorded call; None outside the model's text attention."""
        layer: SteeredLayer | None = call.module.__dict__.get(LAYER_ATTRIBUTE)
        return layer

    def _live_model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None
        return model

    def _install(self) -> contextlib.ExitStack:
        """Intercept attention and mark each attention module; closing the stack undoes it."""
        model = self._live_model()
        modules = {path: model.get_submodule(path) for path in self._layers}
        for module in (model, *modules.values()):  # the model may have changed since the probe
            require_supported(module)
        undo = contextlib.ExitStack()
        undo.enter_context(intercepted())
        for path, (site, index) in self._layers.items():
            module = modules[path]
            if module not in self._handles:
                self._handles[module] = new_handle(module)
            setattr(module, LAYER_ATTRIBUTE, _Layer(self, site, index))
            setattr(module, HANDLE_ATTRIBUTE, self._handles[module])
            undo.callback(delattr, module, LAYER_ATTRIBUTE)
            undo.callback(delattr, module, HANDLE_ATTRIBUTE)
        if (head := model.get_output_embeddings()) is not None:
            undo.callback(head.register_forward_pre_hook(_make_contiguous).remove)
        return undo


def _make_contiguous(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """On a slice, torch's bfloat16 matmul on CPU copies the output layer's weights per row."""
    return (args[0].contiguous(), *args[1:])
