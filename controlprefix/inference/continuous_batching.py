"""Continuous batching: sequences join and leave a running batch between its steps.

Each step prefills one chunk of prompts (see `prefill_queue`), merges finished ones into the
running batch, and decodes one token per sequence. Rows are left-padded to a common last column,
as in transformers' `generate`, so the model's own attention masks stay correct. Each row has its
own prefix, position, sampling, stop texts and limit; its output does not depend on the other rows.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from controlprefix.errors import ModelOutputError
from controlprefix.inference.batch_cache import BatchCache
from controlprefix.inference.batcher import BatchedRequest, Batcher, BatchLimits
from controlprefix.inference.generation_config import forced_end_id, model_processors
from controlprefix.inference.guidance import GuidanceTerm, combined_logits
from controlprefix.inference.prefill_queue import Prefill, PrefillQueue
from controlprefix.inference.sampling import BatchSampler
from controlprefix.model import FrozenModel
from controlprefix.model.cache_rows import CacheRow
from controlprefix.model.log_probs import token_log_probs_of
from controlprefix.prefixes import Part, PrefixBatch
from controlprefix.request import Request

_MAX_VACANT_FRACTION = 0.25  # compact the batch above this share of vacant rows
_MAX_SKIPPED = 3  # consecutive decode steps to skip while more rows are about to join
_MAX_DEAD_COLUMNS = 256  # leading columns that are padding in every row


class ContinuousBatcher(Batcher):
    """A running batch that requests join and leave between its steps.

    Args:
        frozen: A model for which `can_share_running_batch` is true.
        max_prefill_tokens: Prompt tokens per step, at most. The more, the sooner a prompt is
            done, and the longer all others wait for their next token.
        limits: See `BatchLimits`.
    """

    supports_log_probs = True

    def __init__(
        self,
        frozen: FrozenModel,
        *,
        max_prefill_tokens: int = 512,
        **limits: Unpack[BatchLimits],
    ) -> None:
        # Per row its sequence, or None if it is vacant; rows of a sequence stand together.
        self._rows: list[BatchedRequest | None] = []
        self._first_rows: dict[int, int] = {}  # id of a sequence -> its first row
        self._cache = BatchCache(frozen)
        self._batch: PrefixBatch | None = None  # None: rows have changed
        self._sampler: BatchSampler | None = None
        self._prefills = PrefillQueue(max_prefill_tokens, encoded=frozen.is_encoder_decoder)
        self._decode_s = 0.0  # of the last step
        self._num_skipped = 0  # decode steps in a row that were left out
        request = Request(prompt="", raw=True)
        self._has_processors = bool(
            model_processors(frozen, request, [frozen.pad_id], [frozen.pad_id])
        )
        self._forced_end = forced_end_id(frozen)
        super().__init__(frozen, **limits)

    @property
    def _num_rows(self) -> int:
        # Also read by other threads, while rows come and go.
        prefilled = sum(len(sequence.rows) for sequence in list(self._prefills.sequences))
        return sum(row is not None for row in list(self._rows)) + prefilled

    def _running(self) -> list[BatchedRequest]:
        return [*self._decoding(), *self._prefills.sequences]

    def _reset(self) -> None:
        self._prefills.clear()
        self._arrange([])

    def _step(self) -> None:
        self._drop_cancelled_waiting()
        for sequence in self._prefills.remove(self._is_cancelled):
            sequence.finish(self._completion(sequence))
        for sequence in self._decoding():
            if self._is_cancelled(sequence):
                self._remove(sequence)
        self._prefills.add(self._take_waiting())
        decoding = {sequence.resolved.tenant for sequence in self._decoding()}
        # Larger batches cost little more, so decoding waits while many rows are about to join.
        joining = self._prefills.num_joining_rows(self._waiting.served, decoding)
        num_decoding = sum(row is not None for row in self._rows)
        waits = joining > num_decoding and self._num_skipped < _MAX_SKIPPED
        if (prefill := self._prefills.next(self._waiting.served, decoding)) is not None:
            self._prefill_chunk(prefill, waits=waits and bool(decoding))
        self._num_skipped = self._num_skipped + 1 if waits else 0
        if self._first_rows and not waits:
            start = time.perf_counter()
            self._decode_step()
            self._decode_s = time.perf_counter() - start

    def _decoding(self) -> list[BatchedRequest]:
        return [self._rows[first] for first in self._first_rows.values()]  # type: ignore[misc]

    # --- prefill -----------------------------------------------------------------------------

    def _prefill_chunk(self, prefill: Prefill, *, waits: bool) -> None:
        try:
            decodes = bool(self._first_rows) and not waits
            decode_s = self._decode_s if decodes else None
            with self._prefills.next_chunk(prefill, decode_s, waits=waits) as end:
                if prefill.batch is None:
                    prefill.prepare(self._frozen)
                assert prefill.batch is not None
                logits = self._forward(prefill.batch, **prefill.inputs(end))
        except Exception as error:  # the running batch goes on
            self._prefills.drop(prefill)
            for sequence in prefill.sequences:
                sequence.ticket.put(error)
            return
        if prefill.num_done == prefill.length:
            self._prefills.drop(prefill)
            self._merge(prefill)
            rows = [sequence for sequence in prefill.sequences for _ in sequence.rows]
            firsts = [rows.index(sequence) for sequence in prefill.sequences]
            logits = logits[prefill.sources]
            self._choose_tokens(prefill.sequences, firsts, logits, _sampler_of(rows, logits.device))

    def _merge(self, prefill: Prefill) -> None:
        """Move prefilled rows into the running batch."""
        sources: dict[int, list[CacheRow]] = {}
        prefilled = prefill.rows()
        row = 0
        for sequence in prefill.sequences:
            sequence.sampling.forced_end = self._forced_end
            if self._has_processors:
                sequence.sampling.processors = model_processors(
                    self._frozen, sequence.request, sequence.prompt, sequence.start
                )
            sources[id(sequence)] = prefilled[row : row + len(sequence.rows)]
            row += len(sequence.rows)
        fits = self._first_rows and all(map(self._cache.fits, prefilled))
        fits = fits and _most_slots(prefill.sequences) <= self._cache.num_slots
        vacant = [i for i, sequence in enumerate(self._rows) if sequence is None]
        if fits and len(vacant) == row and all(len(s.rows) == 1 for s in prefill.sequences):
            for target, sequence in zip(vacant, prefill.sequences, strict=True):
                self._cache.overwrite(target, sources[id(sequence)][0])
                self._rows[target] = sequence
                self._first_rows[id(sequence)] = target
            self._batch, self._sampler = None, None  # made again at the next step
            return
        self._arrange([*self._decoding(), *prefill.sequences], sources)

    # --- decoding ----------------------------------------------------------------------------

    def _decode_step(self) -> None:
        """Decode one token per sequence."""
        longest = max(sequence.num_cached_tokens for sequence in self._decoding())
        dead_columns = self._cache.mask.shape[1] - longest
        num_vacant = sum(row is None for row in self._rows)
        if num_vacant > _MAX_VACANT_FRACTION * len(self._rows) or dead_columns > _MAX_DEAD_COLUMNS:
            self._arrange(self._decoding())
        if self._batch is None:
            self._batch = self._frozen.assemble([self._parts_of(i) for i in range(len(self._rows))])
        sampler = self._sampler = self._sampler or _sampler_of(self._rows, self._frozen.device)
        if self._batch.is_scheduled:
            self._batch.set_token([0 if row is None else len(row.new) for row in self._rows])
        last = [self._frozen.pad_id if row is None else row.new[-1] for row in self._rows]
        positions = [
            0 if row is None else row.num_cached_tokens + row.position_offset for row in self._rows
        ]
        with self._cache.next_column(last, positions) as inputs:  # a vacant row attends to its pad
            logits = self._forward(self._batch, **inputs)
        decoding = self._decoding()
        firsts = [self._first_rows[id(sequence)] for sequence in decoding]
        self._choose_tokens(decoding, firsts, logits, sampler)

    def _choose_tokens(
        self,
        sequences: list[BatchedRequest],
        firsts: list[int],
        logits: Tensor,
        sampler: BatchSampler,
    ) -> None:
        """Choose a token per sequence.

        Args:
            sequences: Sequences of the batch.
            firsts: The first row of each.
            logits: Logits of all rows, `(num_rows, vocab_size)`.
            sampler: Chooses tokens for all rows.
        """
        logits = logits.float()
        invalid = logits.amax(1).isnan()
        for sequence, first in zip(sequences, firsts, strict=True):
            if sequence.weights:
                invalid[first] = invalid[first : first + len(sequence.rows)].any()
        recorded = [
            (sequence, first)
            for sequence, first in zip(sequences, firsts, strict=True)
            if sequence.top_log_probs is not None
        ]
        # Before sampling, which may write to the logits.
        own_logits = {
            first: combined_logits(
                logits[first],
                [*logits[first + 1 : first + len(sequence.rows)]],
                sequence.weights,
            ).clone()
            for sequence, first in recorded
        }
        tokens = sampler(logits)
        assert sampler.is_impossible is not None
        columns = torch.stack([tokens, (invalid | sampler.is_impossible).long()]).tolist()
        for sequence, first in recorded:
            sequence.ticket.tokens += token_log_probs_of(
                own_logits[first][None], [columns[0][first]], sequence.top_log_probs or 0
            )
        for sequence, first in zip(sequences, firsts, strict=True):
            token, is_invalid = columns[0][first], columns[1][first]
            error = ModelOutputError() if is_invalid else sampler.errors.pop(first, None)
            if error is not None:
                sequence.ticket.put(error)
                self._vacate(sequence)
                continue
            sequence.new.append(token)
            if self._stream_text(sequence):
                self._remove(sequence)

    def _stream_text(self, sequence: BatchedRequest) -> bool:
        """Give the ticket the new text; returns whether the sequence is finished."""
        text, finished = sequence.text.update(sequence.new)
        if text:
            sequence.ticket.put(text)
        return finished

    def _remove(self, sequence: BatchedRequest) -> None:
        """Finish a sequence and vacate its rows."""
        sequence.finish(self._completion(sequence))
        self._vacate(sequence)

    def _vacate(self, sequence: BatchedRequest) -> None:
        first = self._first_rows.pop(id(sequence))
        for row in range(first, first + len(sequence.rows)):
            self._rows[row] = None
        if not self._first_rows:
            self._arrange([])

    # --- rows --------------------------------------------------------------------------------

    def _arrange(
        self,
        sequences: list[BatchedRequest],
        prefilled: Mapping[int, list[CacheRow]] | None = None,
    ) -> None:
        """Rebuild the batch without vacant rows and without columns of padding alone."""
        sources: list[CacheRow] = []
        rows: list[BatchedRequest | None] = []
        first_rows: dict[int, int] = {}
        for sequence in sequences:
            first = self._first_rows.get(id(sequence))
            first_rows[id(sequence)] = len(rows)
            rows += [sequence] * len(sequence.rows)
            if first is None:
                sources += (prefilled or {})[id(sequence)]
            else:
                sources += [
                    self._cache.row(first + i, sequence.num_cached_tokens, len(sequence.prompt))
                    for i in range(len(sequence.rows))
                ]
        self._rows, self._first_rows = rows, first_rows
        self._batch, self._sampler = None, None  # made again at the next step
        if not sources:
            self._cache.clear()
            return
        self._cache.arrange(sources, _most_slots(sequences))

    def _parts_of(self, row: int) -> list[Part]:
        sequence = self._rows[row]
        return [] if sequence is None else sequence.rows[row - self._first_rows[id(sequence)]]

    def _forward(self, batch: PrefixBatch, **inputs: Any) -> Tensor:
        """Logits of the last position of each row, `(num_rows, vocab_size)`."""
        with self._frozen.exclusive(), self._frozen.attached(batch):
            if not self._frozen.is_encoder_decoder:
                inputs["logits_to_keep"] = 1
            elif "input_ids" in inputs:  # by itself, since some encoders refuse `use_cache`
                inputs["encoder_outputs"] = self._frozen.model.get_encoder()(
                    input_ids=inputs.pop("input_ids"), attention_mask=inputs["attention_mask"]
                )
            output = self._frozen.model(**inputs, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


def _sampler_of(rows: Sequence[BatchedRequest | None], device: torch.device) -> BatchSampler:
    """Samples the first row of each sequence; the others only change its logits."""
    sampled = [
        None if sequence is None or (i and rows[i - 1] is sequence) else sequence.sampling
        for i, sequence in enumerate(rows)
    ]
    guidance = {
        i: [GuidanceTerm(i + 1 + n, weight) for n, weight in enumerate(sequence.weights)]
        for i, sequence in enumerate(rows)
        if sequence is not None and sampled[i] is not None
    }
    return BatchSampler(sampled, device, guidance)


def _most_slots(sequences: Sequence[BatchedRequest]) -> int:
    """Slots of the row with the most."""
    rows = (parts for sequence in sequences for parts in sequence.rows)
    return max(sum(part.prefix.num_slots for part in parts) for parts in rows)
