"""FrozenModel: one frozen transformers model with its tokenizer and the means to steer it."""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, Unpack
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import RequestError
from controlprefix.model.loading import LoadOptions, load
from controlprefix.model.rope import Rope
from controlprefix.model.row_independence import check_rows
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import reads_before_zero
from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.prefixes import Geometry, Part, Prefix, PrefixBatch
from controlprefix.request import SAMPLING_SETTINGS

_pass_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class FrozenModel:
    """A frozen model, its tokenizer, and what attaches prefixes to it.

    Runs a short forward pass and hashes the weights, also if the model was given to another
    `FrozenModel` before: it may have changed in place since.

    Args:
        model: A transformers model; its weights must not change.
        tokenizer: Its tokenizer.
        chat_template_kwargs: Variables for its chat template, in every prompt.
        processor: Reads images; left out, the one that is stored with the model.
        load_processor: Loads that one; left out, it is looked for by the model's name.
        is_from_files: Whether the model was just loaded, so that nothing was changed in it: then
            what passes show of it is kept in the user's cache.

    Attributes:
        model, tokenizer: As given.
        request_tokenizer: Requests -> token ids, and generated ids -> text.
        steering: Attaches prefix batches to the model.
        rows: Which rows can share a batch.

    Raises:
        UnsupportedModelError: If the model's attention cannot take slots.
        RequestError: If `tokenizer` is not a tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
        *,
        load_processor: Callable[[], Any] | None = None,
        is_from_files: bool = False,
    ) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise RequestError(f"tokenizer is {tokenizer!r:.60}; give the model's tokenizer")
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs
        self._pass_lock = _pass_locks.setdefault(model, threading.RLock())
        self.request_tokenizer = RequestTokenizer(
            model, tokenizer, chat_template_kwargs, processor, load_processor=load_processor
        )
        self.steering = Steering.for_model(model, probe_again=True)
        self.rows = check_rows(model, use_cache=is_from_files)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | nn.Module,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load and freeze a model, with the options of `controlprefix.model.loading.load`."""
        loaded = load(model, **options)
        return cls(
            loaded.model,
            loaded.tokenizer,
            chat_template_kwargs,
            processor,
            load_processor=loaded.load_processor,
            is_from_files=not isinstance(model, nn.Module)
            and not options.get("trust_remote_code", False),
        )

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The attention shapes and weights fingerprint that prefixes must match."""
        weak_self = weakref.ref(self)  # a prefix must not keep a model in memory

        def shift(prefix: Prefix, positions: int) -> Prefix:
            frozen = weak_self()
            if frozen is None:
                raise RequestError(
                    "the model of this geometry is no longer loaded; load it, and give its geometry"
                )
            return frozen.rope.shifted(prefix, positions)

        return replace(self.steering.geometry, shift=shift)

    @functools.cached_property
    def rope(self) -> Rope:
        """How positions rotate the model's keys.

        Raises:
            UnsupportedModelError: If its prefixes cannot be shifted along positions.
        """
        return Rope.of(self)

    @functools.cached_property
    def reads_before_zero(self) -> bool:
        """Whether the model reads tokens at negative positions as it does at others."""
        return reads_before_zero(self)

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The sampling settings of the model's generation config; none if it decodes greedily."""
        config: Any = self.model.generation_config
        if config is None or not config.do_sample:
            return {}
        values = {name: getattr(config, name, None) for name in SAMPLING_SETTINGS}
        # 0 and 1 switch some of them off; none at all is temperature 1.
        on = {name: value for name, value in values.items() if value not in (None, 0)}
        return on or {"temperature": 1.0}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and settings: see `controlprefix.model.fingerprint`."""
        return self.geometry.fingerprint

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self.model.dtype

    @property
    def pad_id(self) -> int:
        """Token id to pad rows with; it is always masked."""
        return self.request_tokenizer.pad_id

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder that reads the prompt."""
        return self.request_tokenizer.is_encoder_decoder

    def batches(self, num_tokens: Sequence[int], size: int) -> Iterator[list[int]]:
        """Cut rows into batches, so that no row changes another.

        Args:
            num_tokens: Tokens of each row, those that it will generate included.
            size: Rows of a batch, at most.

        Yields:
            The indices of the rows of a batch.
        """
        batch: list[int] = []
        for i, count in enumerate(num_tokens):
            alone = self.rows.must_be_alone(count)
            if batch and (alone or len(batch) == size):
                yield batch
                batch = []
            if alone:
                yield [i]
            else:
                batch.append(i)
        if batch:
            yield batch

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads from the model while inside, if its modules keep state.

        Passes that run beside others (generation, scores, training) are made inside: one whose
        state must last for several passes, as in `generate`, stays inside for all of them.
        """
        with self._pass_lock if self.rows.keeps_state else contextlib.nullcontext():
            yield

    def assemble(self, rows: Sequence[Sequence[Part]]) -> PrefixBatch:
        """Put the parts of each row together, in the device and dtype of the model."""
        return self.steering.assemble(rows)

    @contextlib.contextmanager
    def attached(self, batch: PrefixBatch, *, everywhere: bool = False) -> Iterator[None]:
        """Let the model attend to a batch's slots while inside: see `Steering.attached`."""
        with self.steering.attached(batch, everywhere=everywhere):
            yield
