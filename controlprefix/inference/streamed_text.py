"""StreamedText: gives a ticket the text of tokens as they are generated."""

from collections.abc import Sequence

from controlprefix.inference.runner import Ticket
from controlprefix.inference.stopping import TextStream


class StreamedText:
    """Gives a ticket the text of its tokens, as far as it is certain.

    Args:
        text: The text of the tokens.
        ticket: Where it goes.
    """

    def __init__(self, text: TextStream, ticket: Ticket) -> None:
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
