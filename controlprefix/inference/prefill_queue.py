"""Prompts that are being prefilled in chunks, beside the running batch."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache

from controlprefix.inference.batcher import Sequence
from controlprefix.model import FrozenModel
from controlprefix.model.kv_cache import new_cache
from controlprefix.model.tokenization import pad_rows
from controlprefix.prefixes import PrefixBatch

_MIN_TOKENS = 32  # of a chunk
_CHUNK_SECONDS = 0.2  # of a chunk while others decode or wait
_TURNS = 4  # a tenant that was served more than those who decode prefills once in so many steps


@dataclass(slots=True, eq=False)
class Prefill:
    """Prompts that are prefilled together: several short ones, or a long one.

    Attributes:
        sequences: Whose prompts they are.
        num_done: Columns that are done.
        ids, mask: `(num_rows, length)`, padded on the left.
        cache: Their keys and values.
        batch: The slots of their rows; None before `prepare`.
    """

    sequences: list[Sequence]
    num_done: int = 0
    ids: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    cache: DynamicCache = field(init=False)
    batch: PrefixBatch | None = None

    @property
    def length(self) -> int:
        """Columns: tokens of the longest prompt."""
        return max(len(sequence.prompt) for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return sum(len(sequence.rows) for sequence in self.sequences)

    @property
    def num_left(self) -> int:
        """Tokens that are left, padding included."""
        return (self.length - self.num_done) * self.num_rows

    def prepare(self, frozen: FrozenModel) -> None:
        """Assemble the prefixes and pad the prompts."""
        prompts = [sequence.prompt for sequence in self.sequences for _ in sequence.rows]
        ids, mask = pad_rows(prompts, frozen.pad_id, left=True)
        self.ids, self.mask = ids.to(frozen.device), mask.to(frozen.device)
        self.cache = new_cache(frozen.model)
        batch = frozen.assemble([row for sequence in self.sequences for row in sequence.rows])
        batch.set_token(0)
        self.batch = batch

    def inputs(self, end: int) -> tuple[Tensor, Tensor, Tensor, DynamicCache, PrefixBatch]:
        """Ids, mask, positions, cache and slots of a pass over the columns up to `end`."""
        assert self.batch is not None
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        chunk = slice(self.num_done, end)
        return self.ids[:, chunk], self.mask[:, :end], positions[:, chunk], self.cache, self.batch


class PrefillQueue:
    """Decides whose prompt is prefilled next, and how much of it.

    The shortest is next, and every other time the oldest, so that a short prompt does not wait
    for long ones, and a long one not forever.

    Args:
        max_tokens: Tokens of a chunk, at most.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prefills: list[Prefill] = []  # the oldest first
        self._tokens_per_second: float | None = None
        self._num_steps = 0

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that are being prefilled."""
        return [sequence for prefill in self._prefills for sequence in prefill.sequences]

    def clear(self) -> None:
        """Drop everything."""
        self._prefills = []

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Add sequences; those that fit one chunk together are prefilled together."""
        group: list[Sequence] = []
        for sequence in sorted(sequences, key=lambda s: len(s.prompt)):
            num_rows = sum(len(s.rows) for s in [*group, sequence])
            if group and len(sequence.prompt) * num_rows > self._max_tokens:
                self._prefills.append(Prefill(group))
                group = []
            group.append(sequence)
        if group:
            self._prefills.append(Prefill(group))

    def remove(self, condition: Callable[[Sequence], bool]) -> list[Sequence]:
        """Remove the sequences that satisfy a condition, and return them.

        Of several that were begun together, all or none are removed.
        """
        removed: list[Sequence] = []
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
            decoding: Tenants whose sequences are being decoded; one that was served more than
                all of these leaves them some steps.
        """
        self._num_steps += 1
        least = min(map(served, decoding), default=None)
        due = [
            prefill
            for prefill in self._prefills
            if least is None
            or self._num_steps % _TURNS == 0
            or min(served(s.resolved.tenant) for s in prefill.sequences) <= least
        ]
        if not due:
            return None
        return due[0] if self._num_steps % 2 else min(due, key=lambda prefill: prefill.num_left)

    @contextlib.contextmanager
    def measured(self, prefill: Prefill, *, is_alone: bool) -> Iterator[int]:
        """Choose and measure the next chunk of a prefill: yields its end column.

        Args:
            prefill: The prefill.
            is_alone: Nothing is decoded meanwhile.
        """
        tokens = self._max_tokens
        waits = not is_alone or len(self._prefills) > 1 or prefill.num_left > tokens
        if waits and self._tokens_per_second is not None:
            in_time = int(self._tokens_per_second * _CHUNK_SECONDS)
            tokens = min(tokens, max(_MIN_TOKENS, in_time))
        end = min(prefill.length, prefill.num_done + max(1, tokens // prefill.num_rows))
        start = time.perf_counter()
        yield end
        num_tokens = (end - prefill.num_done) * prefill.num_rows
        speed = num_tokens / max(1e-6, time.perf_counter() - start)
        earlier = self._tokens_per_second
        self._tokens_per_second = speed if earlier is None else 0.7 * earlier + 0.3 * speed
        prefill.num_done = end
