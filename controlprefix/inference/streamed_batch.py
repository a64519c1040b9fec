"""One static batch whose texts go to tickets as they are generated."""

from collections.abc import Callable, Sequence
from typing import Any

from controlprefix.completion import Completion
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Ticket
from controlprefix.inference.static_generation import generate_batch
from controlprefix.inference.stopping import IncrementalDetokenizer
from controlprefix.model import FrozenModel


def generate_streamed(
    frozen: FrozenModel,
    resolved: Sequence[ResolvedRequest[Any]],
    prompts: Sequence[Sequence[int]],
    tickets: Sequence[Ticket],
    must_end: Callable[[Ticket], bool],
) -> None:
    """Generate for requests that can share a batch; their tickets get texts and results.

    Args:
        frozen, resolved, prompts: As in `generate_batch`.
        tickets: One per request; they also get an error, if there is one.
        must_end: Asked after each step; a request whose ticket must end has what it has so far.
    """
    texts = [
        TicketWriter(IncrementalDetokenizer(frozen.request_tokenizer, request.request), ticket)
        for request, ticket in zip(resolved, tickets, strict=True)
    ]

    def on_step(rows: Sequence[Sequence[int]]) -> list[bool]:
        for text, new in zip(texts, rows, strict=True):
            text.update(new)
        return list(map(must_end, tickets))

    try:
        completions = generate_batch(frozen, resolved, prompts, on_step=on_step)
    except Exception as error:
        for ticket in tickets:
            ticket.put(error)
        return
    for ticket, text, completion in zip(tickets, texts, completions, strict=True):
        if isinstance(completion, Completion):
            text.put_rest(completion.text)
        ticket.put(completion)


class TicketWriter:
    """Gives a ticket the text of its tokens, as far as it is certain.

    Args:
        text: The text of the tokens.
        ticket: Where it goes.
    """

    def __init__(self, text: IncrementalDetokenizer, ticket: Ticket) -> None:
        self._text, self._ticket = text, ticket
        self._num_characters = 0
        self._num_tokens = 0
        self.is_finished = False

    def update(self, new: Sequence[int]) -> None:
        """Take all tokens so far; what follows the end is ignored."""
        for count in range(self._num_tokens + 1, len(new) + 1):
            if self.is_finished:
                return
            added, self.is_finished = self._text.update(new[:count])
            self._num_tokens = count
            self._put(added)

    def put_rest(self, text: str) -> None:
        """Give out what of the whole text is not out yet, as of a request that was cancelled."""
        self._put(text[self._num_characters :])

    def _put(self, text: str) -> None:
        if text:
            self._num_characters += len(text)
            self._ticket.put(text)
