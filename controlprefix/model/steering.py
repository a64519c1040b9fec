"""Steering: attaches prefix batches to one frozen model, and detaches them."""

import asyncio
import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from controlprefix.errors import RequestError
from controlprefix.model.attention import (
    HANDLE_ATTRIBUTE,
    LAYER_ATTRIBUTE,
    AttentionCall,
    intercepted,
    new_handle,
    recording,
    require_supported,
)
from controlprefix.model.probing import LayerIndex, probe
from controlprefix.prefixes import (
    DecoupledBlock,
    Geometry,
    Part,
    PrefixBatch,
    Site,
    SlotBlock,
    assemble,
)

# Coroutines are told apart by their tasks' contexts.
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, slots=True)
class _Layer:
    """An attention module's position in the model, and its slots in the attached batch."""

    steering: "Steering"
    site: Site
    index: int

    def slots(self, num_rows: int) -> tuple[tuple[SlotBlock, ...], tuple[DecoupledBlock, ...]]:
        attachment = self.steering.current_attachment()
        if attachment is None:
            return (), ()
        batch = attachment.batch
        blocks, decoupled = batch.blocks.get(self.site, ()), batch.decoupled.get(self.site, ())
        if (blocks or decoupled) and num_rows % batch.num_rows:
            raise RequestError(
                f"the model was called with {num_rows} rows inside a block assembled for "
                f"{batch.num_rows} requests; give each request its row"
            )
        may_be_apart = attachment.everywhere and 1 < batch.num_rows < num_rows
        if may_be_apart and self.steering.puts_copies_behind:
            raise RequestError(
                f"the model was called with {num_rows} rows for {batch.num_rows} requests, and "
                "this class puts the unconditional rows of images behind all others: assemble "
                "[*requests, *unconditional], where those are requests too (without parts, the "
                "plain model); with beams, one request at a time"
            )
        return blocks, decoupled


@dataclass(frozen=True, slots=True, eq=False)
class _Attachment:
    """An open block.

    Attributes:
        batch: Its slots.
        thread: The thread that opened it.
        everywhere: See `Steering.attached`.
        is_in_task: It was opened in an asyncio task.
        frame: The generator that opened it, if one did.
    """

    batch: PrefixBatch
    thread: int
    everywhere: bool
    is_in_task: bool
    frame: FrameType | None


class SteeredModel(Protocol):
    """What functions below `FrozenModel` need of it."""

    model: PreTrainedModel
    steering: "Steering"

    @property
    def geometry(self) -> Geometry:
        """The attention shapes and weights fingerprint that prefixes must match."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder that reads the prompt."""

    @property
    def reads_before_zero(self) -> bool:
        """Whether the model reads tokens at negative positions as it does at others."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Keep other threads from the model while inside, if its modules keep state."""


# The open blocks of the calling thread or asyncio task, innermost last. A task inherits those
# that were open when it was created, and never sees those that another task opens.
_blocks: ContextVar[tuple[_Attachment, ...]] = ContextVar("controlprefix_blocks", default=())


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
        # Changed by single operations, which need no lock.
        self._attachments: dict[_Attachment, None] = {}
        self._is_installed: bool | None = False  # None: an interrupt ended a change
        self._interception: contextlib.ExitStack | None = None
        self._hook: RemovableHandle | None = None
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

        Blocks may nest. A thread, an asyncio task or a generator sees the innermost block that
        it opened itself, or that was open when the task was created; never one of another.
        An interrupt (Ctrl-C) at any line leaves nothing attached.

        Args:
            batch: Slots per row.
            everywhere: Threads that opened no block (a streamer's, autograd's) see this one
                too; otherwise they see the plain model.
        """
        attachment = _Attachment(
            batch, threading.get_ident(), everywhere, _is_in_task(), _generator_that_opens()
        )
        try:
            try:
                self._attachments[attachment] = None
                self._update()
                _blocks.set((*_blocks.get(), attachment))
                yield
            finally:
                self._detach(attachment)
        finally:
            self._detach(attachment)  # once more, in case an interrupt ended the first

    def current_attachment(self) -> _Attachment | None:
        """The block whose prefix batch the calling thread's forward passes attend to.

        Raises:
            RequestError: If several threads attached one for all threads, or if only generators
                that are suspended did.
        """
        attachments = self._attachments
        if not attachments:
            return None
        thread = threading.get_ident()
        is_suspended = False
        for attachment in reversed(_blocks.get()):
            if attachment in attachments:
                frame = attachment.frame
                if frame is None or attachment.thread != thread or _is_running(frame):
                    return attachment
                is_suspended = True
        if is_suspended:
            raise RequestError(
                "a generator that is suspended has this model assembled; call the model inside "
                "that generator, or open `assembled` where the model is called"
            )
        # Another block of this thread belongs to another task or generator.
        candidates = [a for a in tuple(attachments) if a.everywhere and a.thread != thread]
        if len({a.thread for a in candidates}) > 1 or any(a.is_in_task for a in candidates):
            raise RequestError(
                "another thread or asyncio task has this model assembled and this one has not, so "
                "it is not known whose prefixes to use; open `assembled` in the thread or task "
                "that calls the model"
            )
        return candidates[-1] if candidates else None

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[AttentionCall]]:
        """Record this thread's attention calls while inside, without any slots attached."""
        with self.attached(PrefixBatch(num_rows=1, blocks={})), recording() as calls:
            yield calls

    @property
    def puts_copies_behind(self) -> bool:
        """Whether rows of one request may stand apart: Janus has its unconditional rows last."""
        return self._live_model().config.model_type == "janus"

    @property
    def attention_paths(self) -> tuple[str, ...]:
        """Where in the model the modules are whose attention sees slots."""
        return tuple(self._layers)

    def _live_model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None
        return model

    def _detach(self, attachment: _Attachment) -> None:
        self._attachments.pop(attachment, None)
        _blocks.set(tuple(a for a in _blocks.get() if a is not attachment))
        self._update()

    def _update(self) -> None:
        """Install what attachments need, or remove it if there are none."""
        if self._is_installed is not bool(self._attachments):
            # In one line, which an interrupt cannot part.
            with self._lock: self._install_or_remove()  # fmt: skip  # noqa: E701

    def _install_or_remove(self) -> None:
        """Intercept attention and mark each attention module, or undo it; can be repeated."""
        self._is_installed = None  # before the next line, for threads that attach meanwhile
        is_needed = bool(self._attachments)
        for module in list(self._handles):
            module.__dict__.pop(LAYER_ATTRIBUTE, None)
            module.__dict__.pop(HANDLE_ATTRIBUTE, None)
        if self._hook is not None:
            self._hook.remove()
        if self._interception is not None:
            self._interception.close()
        if is_needed:
            model = self._live_model()
            modules = {path: model.get_submodule(path) for path in self._layers}
            for module in (model, *modules.values()):  # it may have changed since the probe
                require_supported(module)
            for path, (site, index) in self._layers.items():
                module = modules[path]
                if module not in self._handles:
                    self._handles[module] = new_handle(module)
                setattr(module, LAYER_ATTRIBUTE, _Layer(self, site, index))
                setattr(module, HANDLE_ATTRIBUTE, self._handles[module])
            self._interception = contextlib.ExitStack()
            self._interception.enter_context(intercepted())
            if (head := model.get_output_embeddings()) is not None:
                self._hook = head.register_forward_pre_hook(_make_contiguous)
        self._is_installed = is_needed


def _is_in_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no loop runs in this thread
        return False


def _generator_that_opens() -> FrameType | None:
    """The generator whose `with` is being entered; None if it is a function's or coroutine's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller = frame.f_back
        is_manager = caller is not None and caller.f_code.co_filename == contextlib.__file__
        if frame.f_code.co_filename != contextlib.__file__ and not is_manager:
            break
        frame = caller
    return frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None


def _is_running(frame: FrameType) -> bool:
    """Whether a frame is among those of the present call."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller is frame:
            return True
        caller = caller.f_back
    return False


def _make_contiguous(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """On a slice, torch's bfloat16 matmul on CPU copies the output layer's weights per row."""
    return (args[0].contiguous(), *args[1:])
