"""Prompts that are being prefilled in chunks, beside the running batch."""

import contextlib
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from controlprefix.inference.batcher import BatchedRequest
from controlprefix.model import FrozenModel
from controlprefix.model.cache_rows import CacheRow, row_without_padding
from controlprefix.model.images import ImagePrompt, image_inputs, image_positions
from controlprefix.model.kv_cache import cache_argument, new_cache
from controlprefix.model.padding import pad_rows
from controlprefix.prefixes import Part, PrefixBatch

_MIN_TOKENS = 128  # minimum chunk size; a smaller one takes hardly less time
_CHUNK_S = 0.1  # target duration of a chunk while others decode, at least a decode step's
_DECODE_STEPS = 4  # or that of so many, for prompts that fit one chunk of `max_tokens`
_ALONE_S = 2.0  # the same while nothing is decoded, since others may come
_WAITING_S = 1.0  # the same while what is decoded waits for more rows
_YIELD_INTERVAL = 4  # a tenant served more than all decoding tenants prefills every 4th step


@dataclass(slots=True, eq=False)
class Prefill:
    """Prompts that are prefilled together: several short ones, or a long one.

    Attributes:
        sequences: Whose prompts they are.
        encoded: Whether an encoder reads them; they are padded on the right then.
        num_done: Columns that are done.
        ids, mask: `(num_rows, length)`.
        cache, cross: Their keys and values, and those of what an encoder read.
        cache_name: What the model calls its cache.
        batch: The slots of their rows; None before `prepare`.
        images: What the model reads of images, if there are any.
        positions: `(num_rows, length)`, or what the model computes for images.
        starts: Per row that is read, the ids that its decoder starts from.
        sources: Per row of the sequences, the row of the cache that has it: those of choices of
            one prompt are read once.
    """

    sequences: list[BatchedRequest]
    encoded: bool = False
    num_done: int = 0
    ids: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    cache: DynamicCache = field(init=False)
    cross: DynamicCache = field(init=False)
    cache_name: str = field(init=False)
    batch: PrefixBatch | None = None
    images: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor = field(init=False)
    starts: list[Sequence[int]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @property
    def tenant(self) -> str:
        """Whose prompts they are."""
        return self.sequences[0].resolved.tenant

    @property
    def has_images(self) -> bool:
        """Whether there are images in it; then it has one sequence."""
        return any(isinstance(sequence.prompt, ImagePrompt) for sequence in self.sequences)

    @property
    def is_one_pass(self) -> bool:
        """Whether its tokens are read together."""
        return self.encoded or self.has_images

    @property
    def length(self) -> int:
        """Columns: tokens of the longest prompt."""
        return max(len(sequence.prompt) for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return sum(len(sequence.rows) for sequence in self.sequences)

    @property
    def num_distinct_rows(self) -> int:
        """Rows that are read, of which several sequences may start."""
        return len({key for sequence in self.sequences for key in sequence.row_keys})

    @property
    def num_left(self) -> int:
        """Tokens that are left, padding included."""
        return (self.length - self.num_done) * self.num_distinct_rows

    def prepare(self, frozen: FrozenModel) -> None:
        """Assemble the prefixes and pad the prompts."""
        read: dict[Hashable, tuple[BatchedRequest, list[Part]]] = {}
        keys = []
        for sequence in self.sequences:
            for key, parts in zip(sequence.row_keys, sequence.rows, strict=True):
                read.setdefault(key, (sequence, parts))
                keys.append(key)
        numbers = {key: number for number, key in enumerate(read)}
        self.sources = [numbers[key] for key in keys]
        prompts = [sequence.prompt for sequence, _ in read.values()]
        ids, mask = pad_rows(prompts, frozen.pad_id, left=not self.encoded)
        self.ids, self.mask = ids.to(frozen.device), mask.to(frozen.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        if self.has_images:
            self.images = image_inputs(prompts, [len(row) for row in prompts], frozen.model)
            own = image_positions(frozen.model, self.ids, self.mask, self.images)
            if own is not None:
                self.positions, offsets = own
                self.sequences[0].position_offset = offsets[0]
        self.starts = [sequence.start for sequence, _ in read.values()]
        batch = frozen.assemble([parts for _, parts in read.values()])
        self.cache = new_cache(frozen.model)
        self.cache_name = cache_argument(frozen.model)
        if self.encoded:
            self.cross = new_cache(frozen.model)
        batch.set_token(0)
        self.batch = batch

    def inputs(self, end: int) -> dict[str, Any]:
        """The model's inputs of a pass over the columns up to `end`."""
        if self.encoded:
            return {
                "input_ids": self.ids,
                "attention_mask": self.mask,
                "decoder_input_ids": torch.tensor(self.starts, device=self.ids.device),
                self.cache_name: EncoderDecoderCache(self.cache, self.cross),
            }
        chunk = slice(self.num_done, end)
        return {
            "input_ids": self.ids[:, chunk],
            "attention_mask": self.mask[:, :end],
            "position_ids": self.positions[..., chunk],
            self.cache_name: self.cache,
            **self.images,
        }

    def rows(self) -> list[CacheRow]:
        """The rows of the cache that the sequences' rows start from, when all is done."""
        sequences = [sequence for sequence in self.sequences for _ in sequence.rows]
        return [
            CacheRow(
                self.cache,
                i,
                len(sequence.start),
                row_without_padding(self.cross, i, len(sequence.prompt)) if self.encoded else None,
            )
            for i, sequence in zip(self.sources, sequences, strict=True)
        ]


class PrefillQueue:
    """Decides whose prompt is prefilled next, and how much of it.

    It is one of the tenant that was served the fewest tokens: the shortest, and every other time
    the oldest, so that a short prompt does not wait for long ones, and a long one not forever.

    Args:
        max_tokens: Tokens of a chunk, at most.
        encoded: Whether an encoder reads the prompts.
    """

    def __init__(self, max_tokens: int, *, encoded: bool = False) -> None:
        self._encoded = encoded
        self._max_tokens = max_tokens
        self._prefills: list[Prefill] = []  # the oldest first
        self._tokens_per_second: float | None = None
        self._num_steps = 0

    @property
    def sequences(self) -> list[BatchedRequest]:
        """All sequences that are being prefilled."""
        return [sequence for prefill in self._prefills for sequence in prefill.sequences]

    def num_joining_rows(self, served: Callable[[str], float], decoding: Collection[str]) -> int:
        """Rows of those that need one chunk more, and need not leave steps to others.

        Args:
            served, decoding: See `next`.
        """
        return sum(
            prefill.num_rows
            for prefill in self._prefills
            if prefill.num_left <= self._max_tokens and _may_prefill(prefill, served, decoding)
        )

    def clear(self) -> None:
        """Drop everything."""
        self._prefills = []

    def add(self, sequences: Iterable[BatchedRequest]) -> None:
        """Add sequences; those of a tenant that fit one chunk are prefilled together."""
        by_tenant: dict[str, list[BatchedRequest]] = {}
        for sequence in sequences:
            by_tenant.setdefault(sequence.resolved.tenant, []).append(sequence)
        for own in by_tenant.values():
            self._add_of_tenant(own)

    def _add_of_tenant(self, sequences: Iterable[BatchedRequest]) -> None:
        group: list[BatchedRequest] = []
        read: set[Hashable] = set()

        def order(sequence: BatchedRequest) -> tuple[int, int, tuple[int, ...]]:
            # A decoder starts from as many tokens in each row.
            num_start = len(sequence.start) if self._encoded else 0
            return num_start, len(sequence.prompt), tuple(sequence.prompt)

        for sequence in sorted(sequences, key=order):
            if isinstance(sequence.prompt, ImagePrompt):
                self._prefills.append(Prefill([sequence]))
                continue
            own = sequence.row_keys
            is_full = len(sequence.prompt) * len(read.union(own)) > self._max_tokens
            is_other = self._encoded and group and len(group[0].start) != len(sequence.start)
            if is_other or (group and is_full and not read.issuperset(own)):
                self._prefills.append(Prefill(group, encoded=self._encoded))
                group, read = [], set()
            group.append(sequence)
            read.update(own)
        if group:
            self._prefills.append(Prefill(group, encoded=self._encoded))

    def remove(self, condition: Callable[[BatchedRequest], bool]) -> list[BatchedRequest]:
        """Remove the sequences that satisfy a condition, and return them.

        Of several that were begun together, all or none are removed.
        """
        removed: list[BatchedRequest] = []
        for prefill in self._prefills:
            matching = [sequence for sequence in prefill.sequences if condition(sequence)]
            if prefill.batch is None or len(matching) == len(prefill.sequences):
                prefill.sequences = [s for s in prefill.sequences if s not in matching]
                removed += matching
        self._prefills = [prefill for prefill in self._prefills if prefill.sequences]
        return removed

    def drop(self, prefill: Prefill) -> None:
        """Remove a prefill that is done or failed."""
        self._prefills.remove(prefill)

    def next(self, served: Callable[[str], float], decoding: Collection[str]) -> Prefill | None:
        """The prefill whose next chunk is due.

        Args:
            served: Tokens that a tenant was served so far.
            decoding: Tenants whose sequences are being decoded. A tenant that was served more
                tokens than each of these prefills in one of four steps.
        """
        self._num_steps += 1
        may_all_prefill = self._num_steps % _YIELD_INTERVAL == 0
        due = [
            prefill
            for prefill in self._prefills
            if may_all_prefill or _may_prefill(prefill, served, decoding)
        ]
        if not due:
            return None
        fewest = min(served(prefill.tenant) for prefill in due)
        due = [prefill for prefill in due if served(prefill.tenant) == fewest]
        return due[0] if self._num_steps % 2 else min(due, key=lambda prefill: prefill.num_left)

    @contextlib.contextmanager
    def next_chunk(
        self, prefill: Prefill, decode_s: float | None, *, waits: bool = False
    ) -> Iterator[int]:
        """Choose and measure the next chunk of a prefill: yields its end column.

        Args:
            prefill: The prefill.
            decode_s: How long the last decode step took; None if nothing is decoded now.
            waits: Whether what is decoded waits for this.
        """
        tokens = self._max_tokens
        is_long = prefill.num_left > tokens  # others may come meanwhile
        if self._tokens_per_second is not None:
            seconds = _WAITING_S if waits else _ALONE_S
            if is_long or decode_s is not None:
                # Small chunks are slow on CPUs: what is soon done need not be cut into many.
                steps = 1 if is_long else _DECODE_STEPS
                seconds = max(_CHUNK_S, steps * (decode_s or 0.0))
            tokens = min(tokens, max(_MIN_TOKENS, int(self._tokens_per_second * seconds)))
        num_rows = prefill.num_distinct_rows
        # Recurrent layers ignore the mask of a single column, in which some rows may have padding.
        end = min(prefill.length, prefill.num_done + max(2, tokens // num_rows))
        end = prefill.length if prefill.is_one_pass else end
        start = time.perf_counter()
        yield end
        num_tokens = (end - prefill.num_done) * num_rows
        speed = num_tokens / max(1e-6, time.perf_counter() - start)
        earlier = self._tokens_per_second
        self._tokens_per_second = speed if earlier is None else 0.7 * earlier + 0.3 * speed
        prefill.num_done = end


def _may_prefill(
    prefill: Prefill, served: Callable[[str], float], decoding: Collection[str]
) -> bool:
    """Whether a tenant of it was served no more than any whose sequences are decoded."""
    return served(prefill.tenant) <= min(map(served, decoding), default=float("inf"))
