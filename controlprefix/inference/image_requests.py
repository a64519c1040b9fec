"""Requests with images beside a running batch: one after another, in a thread of their own.

The tokens of an image are read together, and some models compute positions of their own for them,
so such a prompt cannot be cut into chunks or moved into the running batch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from controlprefix.completion import Completion
from controlprefix.inference.generation import generate_batch
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Ticket
from controlprefix.inference.stopping import TextStream
from controlprefix.inference.streamed_text import StreamedText
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
        cancelled = threading.Event()
        ticket.on_cancel(cancelled.set)
        if ticket.is_cancelled:  # while it waited; it ends after its first token
            cancelled.set()
        text = StreamedText(TextStream(self._frozen.request_tokenizer, resolved.request), ticket)
        try:
            (result,) = generate_batch(
                self._frozen, [resolved], [prompt], streamer=_Streamer(text), cancelled=cancelled
            )
        except Exception as error:
            ticket.put(error)
        else:
            if isinstance(result, Completion):
                text.put_rest(result.text)
            ticket.put(result)
        finally:
            with self._lock:
                self._tickets.remove(ticket)


class _Streamer(BaseStreamer):
    """Collects generated tokens, and gives their text out."""

    def __init__(self, text: StreamedText) -> None:
        self._text = text
        self._new: list[int] = []
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # `generate` puts it first
            self._is_prompt = False
            return
        self._new += value.flatten().tolist()
        self._text.update(self._new)

    def end(self) -> None:
        """Nothing to do: the completion follows."""
