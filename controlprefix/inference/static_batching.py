"""Static batching: one batch after another, for any model.

It serves models whose cached rows cannot be moved between caches (encoder-decoders, sliding
windows, recurrent layers). Requests that arrive meanwhile wait for the end of the batch.
"""

from collections.abc import Sequence as Rows

from controlprefix.completion import Completion
from controlprefix.inference.batcher import Batcher, Sequence
from controlprefix.inference.generation import batch_key, generate_batch
from controlprefix.inference.streamed_text import StreamedText


class StaticBatcher(Batcher):
    """Runs the waiting requests together, one batch after another.

    Log-probabilities are not supported.

    Args:
        frozen, max_sequences, max_waiting, max_sequences_per_tenant: See `Batcher`.
    """

    supports_log_probs = False
    _batch: tuple[Sequence, ...] = ()

    @property
    def _num_rows(self) -> int:
        return sum(len(sequence.rows) for sequence in self._batch)

    def _running(self) -> list[Sequence]:
        return list(self._batch)

    def _reset(self) -> None:
        self._batch = ()

    def _step(self) -> None:
        self._drop_cancelled_waiting()
        self._batch = tuple(self._take_waiting())
        groups: dict[object, list[Sequence]] = {}
        for sequence in self._batch:
            groups.setdefault(batch_key(sequence.request), []).append(sequence)
        batches = [
            [group[i] for i in batch]
            for group in groups.values()
            for batch in self._frozen.batches(
                [len(s.prompt) + s.request.max_new_tokens for s in group], len(group)
            )
        ]
        for group in batches:
            self._run_batch(group)
        self._batch = ()

    def _run_batch(self, group: list[Sequence]) -> None:
        texts = [StreamedText(sequence.text, sequence.ticket) for sequence in group]

        def on_step(rows: Rows[Rows[int]]) -> list[bool]:
            for text, new in zip(texts, rows, strict=True):
                text.update(new)
            return [self._is_cancelled(sequence) for sequence in group]

        try:
            completions = generate_batch(
                self._frozen,
                [sequence.resolved for sequence in group],
                [sequence.prompt for sequence in group],
                on_step=on_step,
            )
        except Exception as error:  # the other groups go on
            for sequence in group:
                sequence.ticket.put(error)
            return
        for sequence, text, completion in zip(group, texts, completions, strict=True):
            if isinstance(completion, Completion):
                text.put_rest(completion.text)
            sequence.ticket.put(completion)
