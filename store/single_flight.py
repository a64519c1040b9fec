"""SingleFlight: concurrent callers share one query."""

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from controlprefix.prefixes import PrefixKey

Result = TypeVar("Result")
Query = Callable[[Collection[PrefixKey]], Mapping[PrefixKey, Result]]


@dataclass
class _Batch(Generic[Result]):
    """The keys of callers that will share the next query, and its results."""

    keys: set[PrefixKey] = field(default_factory=set)
    results: Mapping[PrefixKey, Result] | None = None
    failed: bool = False


class SingleFlight(Generic[Result]):
    """Merges the queries of threads that call while another query is running.

    A caller never joins a query that is already running, since that one's snapshot may
    predate the call.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_running = False
        self._next: _Batch[Result] = _Batch()

    def fetch(
        self, keys: Collection[PrefixKey], query: Query[Result]
    ) -> Mapping[PrefixKey, Result]:
        """The results of a query for some keys.

        Args:
            keys: Keys to query.
            query: Called by one of the waiting threads for the keys of all. If it fails, each
                thread queries its own keys, so one caller's bad key fails no other caller.
        """
        with self._changed:
            batch = self._next
            batch.keys |= set(keys)
            self._changed.wait_for(
                lambda: batch.results is not None or batch.failed or not self._is_running
            )
            leads = batch.results is None and not batch.failed
            if leads:
                self._is_running, self._next = True, _Batch()
        if leads:
            try:
                batch.results = query(batch.keys)
            except BaseException:
                batch.failed = True
                if batch.keys == set(keys):
                    raise
            finally:
                with self._changed:
                    self._is_running = False
                    self._changed.notify_all()
        if batch.failed:
            return query(keys)
        assert batch.results is not None
        return {key: batch.results[key] for key in keys if key in batch.results}
