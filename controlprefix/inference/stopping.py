"""Stopping: end tokens, stop texts and limits, and which text can be streamed already."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

from controlprefix.completion import Completion
from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.request import Request

_REPLACEMENT_CHARACTER = "\ufffd"  # a character of which not all bytes are generated yet
_MAX_JOINED_WORDS = 4  # "do n ' t" becomes "don't"
_TAIL_TOKENS = 16  # decoded beyond one token per byte to find a stop text
_MAX_TAIL_TOKENS = 32  # decoded at each step; what is before is decoded once
_CONTEXT_TOKENS = 8  # decoded with them, since text may depend on the tokens before


def completion_from_tokens(
    tokenizer: RequestTokenizer, request: Request, prompt: Sequence[int], new: list[int]
) -> Completion:
    """The completion in generated tokens, cut at an end token, a stop text or the limit.

    Args:
        tokenizer: The tokenizer of the model.
        request: What was asked for.
        prompt: Ids of the prompt.
        new: Generated ids; what follows the end is ignored.
    """
    new = new[: request.max_new_tokens]
    reason: Literal["stop", "length"] = "length"
    end = next((i for i, token in enumerate(new) if token in tokenizer.end_ids), None)
    if end is not None:
        new, reason = new[:end], "stop"
    text = tokenizer.decode(new)
    cut = first_stop(text, request.stop)
    if cut is not None:
        text, reason = text[:cut], "stop"
        # What follows is padding from while other rows went on.
        new = new[: _num_tokens_to_stop(tokenizer, request, new)]
    return Completion(
        text=text, finish_reason=reason, num_prompt_tokens=len(prompt), num_tokens=len(new)
    )


class IncrementalDetokenizer:
    """Gives out the text of a completion while its tokens are generated.

    The texts joined are the text of the completion, whatever the tokenizer does to spaces.

    Args:
        tokenizer: The tokenizer of the model.
        request: What was asked for.
    """

    def __init__(self, tokenizer: RequestTokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._given = ""
        self._decoded = ""  # text of the first `_num_decoded` tokens
        self._num_decoded = 0
        self._context = ""  # text of the last of these, decoded alone

    def update(self, new: Sequence[int]) -> tuple[str, bool]:
        """The text that became certain, and whether generation is finished.

        Args:
            new: Ids generated so far, at least one.
        """
        text, finished = self._certain_text(new)
        if not text.startswith(self._given):
            return "", finished
        added = text[len(self._given) :]
        self._given = text
        return added, finished

    def rest(self, text: str) -> str:
        """What of the whole text was not given out, as of a request that was cancelled."""
        rest = text.removeprefix(self._given) if text.startswith(self._given) else ""
        self._given += rest
        return rest

    def _certain_text(self, new: Sequence[int]) -> tuple[str, bool]:
        is_end = new[-1] in self._tokenizer.end_ids
        finished = is_end or len(new) >= self._request.max_new_tokens
        text = self._decode(new[:-1] if is_end else new)
        # An incomplete UTF-8 sequence may still become another character.
        cut = first_stop(text if finished else _complete(text), self._request.stop)
        if cut is not None:
            return text[:cut], True
        if finished:
            return text, True
        if unsettled := self._tokenizer.num_unsettled(new):
            text = self._decode(new[: len(new) - unsettled])
        else:
            self._advance(new, text)
        # The last character may be incomplete, and a stop text may have begun.
        text = _complete(text)
        text = text[: len(text) - partial_stop_length(text, self._request.stop)]
        if self._tokenizer.joins_words:  # the spaces of the last words may still vanish
            text = " ".join(text.split(" ")[:-_MAX_JOINED_WORDS])
        return text, False

    def _decode(self, new: Sequence[int]) -> str:
        """The text of all tokens, of which only the last ones are decoded."""
        if len(new) < self._num_decoded or not self._num_decoded:
            return self._tokenizer.decode(new)
        tail = self._tokenizer.decode(new[self._num_decoded - _CONTEXT_TOKENS :])
        if not tail.startswith(self._context):
            return self._tokenizer.decode(new)
        return self._decoded + tail[len(self._context) :]

    def _advance(self, new: Sequence[int], text: str) -> None:
        """Keep the text, so that its tokens need not be decoded again."""
        if len(new) - self._num_decoded < _MAX_TAIL_TOKENS or self._tokenizer.joins_words:
            return
        context = self._tokenizer.decode(new[-_CONTEXT_TOKENS:])
        # Behind a blank, or an incomplete character, the next tokens may be read otherwise.
        if context.strip() and not context[-1].isspace() and context[-1] != _REPLACEMENT_CHARACTER:
            self._decoded, self._num_decoded, self._context = text, len(new), context


def _complete(text: str) -> str:
    """A text without a last character that may be incomplete."""
    return text.rstrip(_REPLACEMENT_CHARACTER)


def has_stop(tokenizer: RequestTokenizer, request: Request, new: Sequence[int]) -> bool:
    """Whether the last of some generated tokens completed a stop text."""
    if not request.stop:
        return False
    longest = max(len(text.encode()) for text in request.stop)  # a token has a byte at least
    tail = tokenizer.decode(new[-(longest + _TAIL_TOKENS) :])
    if first_stop(_complete(tail), request.stop) is None:
        return False
    return first_stop(_complete(tokenizer.decode(new)), request.stop) is not None


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, if there is one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text.

    Example:
        >>> partial_stop_length("one EN", ["END"])
        2
    """
    longest = 0
    for stop in stops:
        at = stop.find(text[-1:], longest) if text else -1
        while 0 <= at < min(len(stop) - 1, len(text)):
            if text.endswith(stop[: at + 1]):
                longest = max(longest, at + 1)
            at = stop.find(text[-1:], at + 1)
    return longest


def _num_tokens_to_stop(tokenizer: RequestTokenizer, request: Request, new: Sequence[int]) -> int:
    """How many tokens it took to complete the first stop text."""

    def is_complete(count: int) -> bool:
        text = tokenizer.decode(new[:count])
        whole = text if count == len(new) else _complete(text)
        return first_stop(whole, request.stop) is not None

    return 1 + bisect_left(range(1, len(new) + 1), True, key=is_complete)
