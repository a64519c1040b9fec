"""Static batching: one batch after another, for any model.

It serves models whose cached rows cannot be moved between caches (see `batch_cache`). Requests that
arrive meanwhile wait for the end of the batch.
"""

from controlprefix.inference.batcher import BatchedRequest, Batcher
from controlprefix.inference.static_generation import batches_of
from controlprefix.inference.streamed_batch import generate_streamed


class StaticBatcher(Batcher):
    """Runs the waiting requests together, one batch after another.

    Log-probabilities are not supported.

    Args:
        frozen, limits: See `Batcher`.
    """

    supports_log_probs = False
    _batch: tuple[BatchedRequest, ...] = ()

    @property
    def _num_rows(self) -> int:
        return sum(len(sequence.rows) for sequence in self._batch)

    def _running(self) -> list[BatchedRequest]:
        return list(self._batch)

    def _reset(self) -> None:
        self._batch = ()

    def _step(self) -> None:
        self._drop_cancelled_waiting()
        self._batch = tuple(self._take_waiting())
        requests = [sequence.request for sequence in self._batch]
        prompts = [sequence.prompt for sequence in self._batch]
        for indices in batches_of(self._frozen, requests, prompts, max(1, len(requests))):
            group = [self._batch[i] for i in indices]
            generate_streamed(
                self._frozen,
                [sequence.resolved for sequence in group],
                [sequence.prompt for sequence in group],
                [sequence.ticket for sequence in group],
                lambda ticket: self._abandoned or ticket.is_cancelled,
            )
        self._batch = ()
