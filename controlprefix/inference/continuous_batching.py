"""Continuous batching: sequences join and leave a running batch between its steps.

Each scheduler step prefills one chunk of the waiting prompts (as a batch with a cache of its
own), merges finished ones into the running batch, and decodes one token per sequence. All rows
end at the same column, as transformers pads for generation, so any attention mask a model
makes of that holds. Each row has its own prefix, position, sampling, stop texts and limit;
its output does not depend on the other rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from controlprefix.errors import ModelOutputError
from controlprefix.inference.batcher import Batcher, Sequence
from controlprefix.inference.generation import model_processors
from controlprefix.inference.guidance import guided_logits
from controlprefix.inference.runner import TokenLogProbs
from controlprefix.inference.sampling import Sampler
from controlprefix.model import FrozenModel
from controlprefix.model.kv_cache import CacheRow, arrange_rows, new_cache, overwrite_row
from controlprefix.model.tokenization import pad_rows
from controlprefix.prefixes import Part, PrefixBatch

_MAX_VACANT_FRACTION = 0.25  # compact the batch above this share of vacant rows
_MAX_DEAD_COLUMNS = 256  # leading columns that are padding in every row


@dataclass(slots=True)
class _Prefill:
    """Prompts that are being prefilled, a batch of its own padded on the left."""

    sequences: list[Sequence]
    ids: Tensor
    mask: Tensor
    cache: DynamicCache
    batch: PrefixBatch
    num_done: int = 0


class ContinuousBatcher(Batcher):
    """A running batch that requests join and leave between its steps.

    Args:
        frozen: A model for which `rows_can_move` is true.
        max_sequences: Rows of the running batch.
        max_waiting: Requests that may wait for a row; more are refused.
        max_prefill_tokens: Prompt tokens per step. The more, the sooner a prompt is done, and
            the longer all others wait for their next token.
    """

    supports_log_probs = True

    def __init__(
        self,
        frozen: FrozenModel,
        *,
        max_sequences: int = 32,
        max_waiting: int = 1024,
        max_prefill_tokens: int = 512,
    ) -> None:
        self._max_prefill_tokens = max_prefill_tokens
        # Per row its sequence, or None if it is vacant; rows of a sequence stand together.
        self._rows: list[Sequence | None] = []
        self._first_rows: dict[int, int] = {}  # id of a sequence -> its first row
        self._samplers: dict[int, Sampler] = {}  # id of a sequence -> its sampler
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._cache = DynamicCache()
        self._batch: PrefixBatch | None = None
        self._prefill: _Prefill | None = None
        super().__init__(frozen, max_sequences=max_sequences, max_waiting=max_waiting)

    @property
    def _num_rows(self) -> int:
        return sum(row is not None for row in self._rows)

    def _running(self) -> list[Sequence]:
        prefilling = self._prefill.sequences if self._prefill else []
        return list({id(s): s for s in [*self._decoding(), *prefilling]}.values())

    def _reset(self) -> None:
        self._rows, self._first_rows, self._samplers = [], {}, {}
        self._prefill, self._batch = None, None
        self._cache = DynamicCache()
        self._mask = self._mask.new_zeros(0, 0)

    def _step(self) -> None:
        self._drop_cancelled_waiting()
        for sequence in self._decoding():
            if self._is_cancelled(sequence):
                self._remove(sequence)
        if self._prefill is None:
            self._start_prefill()
        if self._prefill is not None:
            self._prefill_chunk(self._prefill)
        if self._first_rows:
            self._decode_step()

    def _decoding(self) -> list[Sequence]:
        return [self._rows[first] for first in self._first_rows.values()]  # type: ignore[misc]

    # --- prefill -----------------------------------------------------------------------------

    def _start_prefill(self) -> None:
        sequences = self._take_waiting(self._max_sequences - self._num_rows)
        if not sequences:
            return
        try:
            batch = self._frozen.assemble([row for s in sequences for row in s.rows])
            batch.set_token(0)
            prompts = [sequence.prompt for sequence in sequences for _ in sequence.rows]
            ids, mask = pad_rows(prompts, self._frozen.pad_id, left=True)
            device, cache = self._frozen.device, new_cache(self._frozen.model)
            self._prefill = _Prefill(sequences, ids.to(device), mask.to(device), cache, batch)
        except Exception as error:  # a prefix that does not fit, no memory: the batch goes on
            for sequence in sequences:
                sequence.ticket.put(error)

    def _prefill_chunk(self, prefill: _Prefill) -> None:
        num_rows, length = prefill.ids.shape
        start = prefill.num_done
        end = min(length, start + max(1, self._max_prefill_tokens // num_rows))
        positions = (prefill.mask.cumsum(1) - 1).clamp(min=0)
        try:
            logits = self._forward(
                prefill.ids[:, start:end],
                prefill.mask[:, :end],
                positions[:, start:end],
                prefill.cache,
                prefill.batch,
            )
        except Exception as error:  # the running batch goes on
            self._prefill = None
            for sequence in prefill.sequences:
                sequence.ticket.put(error)
            return
        prefill.num_done = end
        if end == length:
            self._merge(prefill)
            self._prefill = None
            self._choose_tokens(prefill.sequences, logits)

    def _merge(self, prefill: _Prefill) -> None:
        """Move prefilled rows into the running batch."""
        sources: dict[int, list[CacheRow]] = {}
        row = 0
        for sequence in prefill.sequences:
            processors = model_processors(self._frozen, sequence.request, len(sequence.prompt))
            self._samplers[id(sequence)] = Sampler(
                sequence.request, self._frozen.device, processors
            )
            sources[id(sequence)] = [
                CacheRow(prefill.cache, row + i, len(sequence.prompt))
                for i in range(len(sequence.rows))
            ]
            row += len(sequence.rows)
        length = self._mask.shape[1]
        fits = self._first_rows and all(len(s.prompt) <= length for s in prefill.sequences)
        vacant = [i for i, sequence in enumerate(self._rows) if sequence is None]
        if fits and len(vacant) == row and all(len(s.rows) == 1 for s in prefill.sequences):
            for target, sequence in zip(vacant, prefill.sequences, strict=True):
                overwrite_row(self._cache, target, sources[id(sequence)][0])
                self._mask[target] = 0
                self._mask[target, length - len(sequence.prompt) :] = 1
                self._rows[target] = sequence
                self._first_rows[id(sequence)] = target
            self._batch = None  # assembled again at the next step
            return
        self._arrange([*self._decoding(), *prefill.sequences], sources)

    # --- decoding ----------------------------------------------------------------------------

    def _decode_step(self) -> None:
        """Decode one token per sequence."""
        device = self._frozen.device
        dead_columns = int(self._mask.any(0).long().argmax()) if self._mask.numel() else 0
        num_vacant = sum(row is None for row in self._rows)
        if num_vacant > _MAX_VACANT_FRACTION * len(self._rows) or dead_columns > _MAX_DEAD_COLUMNS:
            self._arrange(self._decoding())
        if self._batch is None:
            self._batch = self._frozen.assemble([self._parts_of(i) for i in range(len(self._rows))])
        if self._batch.is_scheduled:
            self._batch.set_token([0 if row is None else len(row.new) for row in self._rows])
        last = [self._frozen.pad_id if row is None else row.new[-1] for row in self._rows]
        positions = [0 if row is None else row.num_cached_tokens for row in self._rows]
        visible = torch.ones(len(self._rows), 1, dtype=torch.long, device=device)
        self._mask = torch.cat([self._mask, visible], dim=1)  # a vacant row attends to its pad
        logits = self._forward(
            torch.tensor(last, device=device)[:, None],
            self._mask,
            torch.tensor(positions, device=device)[:, None],
            self._cache,
            self._batch,
        )
        decoding = self._decoding()
        order = [self._first_rows[id(s)] + i for s in decoding for i in range(len(s.rows))]
        self._choose_tokens(decoding, logits[order])

    def _choose_tokens(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose a token per sequence, whose rows' logits stand together, in order."""
        row, tokens, invalid = 0, [], []
        for sequence in sequences:
            num_rows = len(sequence.rows)
            own = logits[row].float()
            invalid.append(logits[row : row + num_rows].isnan().any())
            if sequence.weights:
                others = list(logits[row + 1 : row + num_rows])
                own = guided_logits(own, others, sequence.weights)
            row += num_rows
            sampler = self._samplers[id(sequence)]
            scores = own[None]
            if not sampler.is_greedy:
                ids = torch.tensor([[*sequence.prompt, *sequence.new]], device=logits.device)
                scores = sampler(ids, scores)
            tokens.append(scores[0].argmax())
            if sequence.top_log_probs is not None:
                self._record_log_probs(sequence, own, int(tokens[-1]))
        columns = torch.stack([torch.stack(tokens), torch.stack(invalid).long()]).tolist()
        for sequence, token, is_invalid in zip(sequences, *columns, strict=True):
            if is_invalid:
                sequence.ticket.put(ModelOutputError())
                self._vacate(sequence)
                continue
            sequence.new.append(token)
            if self._stream_text(sequence):
                self._remove(sequence)

    @staticmethod
    def _record_log_probs(sequence: Sequence, logits: Tensor, token: int) -> None:
        log_probs = logits.float().log_softmax(-1)
        values, tokens = log_probs.topk(min(sequence.top_log_probs or 0, len(log_probs)))
        ranked = zip(tokens.tolist(), values.tolist(), strict=True)
        top = tuple((token, value) for token, value in ranked if value > -math.inf)
        sequence.ticket.tokens.append(TokenLogProbs(token, float(log_probs[token]), top))

    def _stream_text(self, sequence: Sequence) -> bool:
        """Give the ticket the new text; returns whether the sequence is finished."""
        text, finished = sequence.text.update(sequence.new)
        if text:
            sequence.ticket.put(text)
        return finished

    def _remove(self, sequence: Sequence) -> None:
        """Finish a sequence and vacate its rows."""
        sequence.finish(self._completion(sequence))
        self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        first = self._first_rows.pop(id(sequence))
        del self._samplers[id(sequence)]
        for row in range(first, first + len(sequence.rows)):
            self._rows[row] = None
        if not self._first_rows:
            self._arrange([])

    # --- rows --------------------------------------------------------------------------------

    def _arrange(
        self,
        sequences: list[Sequence],
        prefilled: Mapping[int, list[CacheRow]] | None = None,
    ) -> None:
        """Rebuild the batch without vacant rows and without columns of padding alone."""
        sources: list[CacheRow] = []
        rows: list[Sequence | None] = []
        first_rows: dict[int, int] = {}
        for sequence in sequences:
            first = self._first_rows.get(id(sequence))
            first_rows[id(sequence)] = len(rows)
            rows += [sequence] * len(sequence.rows)
            if first is None:
                sources += (prefilled or {})[id(sequence)]
            else:
                sources += [
                    CacheRow(self._cache, first + i, sequence.num_cached_tokens)
                    for i in range(len(sequence.rows))
                ]
        self._rows, self._first_rows = rows, first_rows
        self._batch = None  # assembled again at the next step
        if not sources:
            self._cache = DynamicCache()
            self._mask = self._mask.new_zeros(0, 0)
            return
        length = max(source.num_tokens for source in sources)
        arrange_rows(self._cache, sources, length)
        self._mask = torch.zeros(len(sources), length, dtype=torch.long, device=self._frozen.device)
        for i, source in enumerate(sources):
            self._mask[i, length - source.num_tokens :] = 1

    def _parts_of(self, row: int) -> list[Part]:
        sequence = self._rows[row]
        return [] if sequence is None else sequence.rows[row - self._first_rows[id(sequence)]]

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, batch: PrefixBatch
    ) -> Tensor:
        """Logits of the last position of each row, `(num_rows, vocab_size)`."""
        with self._frozen.attached(batch):
            output = self._frozen.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits
