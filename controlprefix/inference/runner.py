"""Runner: what runs submitted requests, a batch in this process or another engine."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

from controlprefix.completion import Completion
from controlprefix.errors import OverloadedError, RequestError
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.prefixes import PrefixKey

_log = logging.getLogger(__name__)

Event = str | Completion | BaseException  # new text; finally the completion, or an error
Deliver = Callable[[Event], object]


class Runner(Protocol):
    """Runs requests as they are submitted."""

    def submit(
        self,
        resolved: ResolvedRequest[Any],
        *,
        top_log_probs: int | None = None,
        deliver: Deliver | None = None,
    ) -> "Ticket":
        """Start a request.

        Args:
            resolved: The request with its prefixes.
            top_log_probs: Record each token's log-probability, and those of this many most likely
                tokens at its position; None records nothing.
            deliver: See `Ticket`.

        Raises:
            RequestError: If the request cannot be carried out by this engine.
            OverloadedError: If too many requests are waiting, or the runner is closing.
        """

    @property
    def load(self) -> tuple[int, int]:
        """Occupied rows of the batch (requests, for a remote engine), and waiting requests."""

    def require_capacity(self) -> None:
        """Check that a request could be submitted now, before it is resolved.

        Raises:
            OverloadedError: If too many requests are waiting, or the runner is closing.
        """

    def check_health(self) -> None:
        """Check that the engine answers.

        Raises:
            EngineError: If it does not.
        """

    def forget(self, tenant: str, key: PrefixKey, *, removed_at: datetime | None = None) -> None:
        """Remove what the runner keeps of a prefix beyond the requests that run.

        Args:
            tenant, key: The prefix.
            removed_at: When it was removed, in UTC; left out, now. Later requests are of one that
                was stored since.
        """

    def remove_expired(self) -> None:
        """Remove what the runner keeps beyond the requests that run and nobody used for long."""

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Accept no more requests, and finish the accepted ones.

        Args:
            timeout_s: Seconds after which unfinished requests are cancelled; None waits for all.

        Returns:
            Whether all requests were finished.
        """


def closing_error() -> OverloadedError:
    """The error of a runner that is closing."""
    return OverloadedError("no more requests are accepted: this process is shutting down")


class Ticket:
    """The result of a submitted request. Iterating yields its text as it is generated.

    Args:
        deliver: Called with each event instead, in the thread that runs the model; it must
            not block.

    Attributes:
        tokens: Tokens generated so far, if log-probabilities were asked for.
        num_prompt_tokens: Tokens of the prompt; 0 until it is tokenized.
    """

    def __init__(self, deliver: Deliver | None = None) -> None:
        self.tokens: list[TokenLogProbs] = []
        self.num_prompt_tokens = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver
        self._final: Completion | BaseException | None = None
        self._cancelled = threading.Event()
        self._on_cancel: Callable[[], object] | None = None

    def __iter__(self) -> Iterator[str]:
        if self._deliver is not None:
            raise RequestError("this ticket's events are given to its deliver function")
        while self._final is None:
            event = self._events.get()
            if isinstance(event, str):
                yield event
            else:
                self._final = event
                self._events.put(event)  # for other threads that wait
        if isinstance(self._final, BaseException):
            raise self._final

    def result(self) -> Completion:
        """Wait for the completion.

        Raises:
            ControlPrefixError, RuntimeError: If the request failed. A cancelled one may also
                return what it has so far.
        """
        for _ in self:
            pass
        assert isinstance(self._final, Completion)
        return self._final

    def cancel(self) -> None:
        """End the request at the next step."""
        self._cancelled.set()
        if self._on_cancel is not None:
            self._on_cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether the request was cancelled."""
        return self._cancelled.is_set()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """For runners: call this when the request is cancelled."""
        self._on_cancel = callback

    def put(self, event: Event) -> None:
        """For runners: hand over an event; a listener that fails cancels its own request."""
        try:
            (self._deliver or self._events.put)(event)
        except Exception:
            _log.exception("a ticket's deliver function failed; its request is cancelled")
            self.cancel()
