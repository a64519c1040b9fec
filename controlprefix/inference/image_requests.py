"""Requests with images beside a running batch: one after another, in a thread of their own.

The tokens of an image are read together, and some models compute positions of their own for them,
so such a prompt cannot be cut into chunks or moved into the running batch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Ticket
from controlprefix.inference.streamed_text import generate_streamed
from controlprefix.model import FrozenModel
from controlprefix.model.images import ImagePrompt


class ImageRequests:
    """Carries out requests with images, in the order in which they come.

    Args:
        frozen: The model.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen
        self._lock = threading.Lock()
        self._tickets: list[Ticket] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="controlprefix-images")

    def __len__(self) -> int:
        return len(self._tickets)

    def submit(self, resolved: ResolvedRequest[Any], prompt: ImagePrompt, ticket: Ticket) -> Ticket:
        """Start a request when those before it are finished."""
        with self._lock:
            self._tickets.append(ticket)
        self._pool.submit(self._run, resolved, prompt, ticket)
        return ticket

    def close(self, *, cancel: bool) -> None:
        """Finish the accepted requests, or end them at their next token."""
        if cancel:
            with self._lock:
                tickets = list(self._tickets)
            for ticket in tickets:
                ticket.cancel()
        self._pool.shutdown(wait=True)

    def _run(self, resolved: ResolvedRequest[Any], prompt: ImagePrompt, ticket: Ticket) -> None:
        try:
            generate_streamed(
                self._frozen, [resolved], [prompt], [ticket], lambda own: own.is_cancelled
            )
        finally:
            with self._lock:
                self._tickets.remove(ticket)
