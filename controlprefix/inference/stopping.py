"""Stopping: end tokens, stop texts and limits, and which text can be streamed already."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.request import Completion, Request

_REPLACEMENT_CHARACTER = "\ufffd"  # a character of which not all bytes are generated yet


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


def streamable_text(
    tokenizer: RequestTokenizer, request: Request, new: Sequence[int]
) -> tuple[str, bool]:
    """The part of the text that can be streamed now, and whether generation is finished.

    Args:
        tokenizer: The tokenizer of the model.
        request: What was asked for.
        new: Ids generated so far, at least one.
    """
    is_end = new[-1] in tokenizer.end_ids
    finished = is_end or len(new) >= request.max_new_tokens
    text = tokenizer.decode(new[:-1] if is_end else new)
    cut = first_stop(text, request.stop)
    if cut is not None:
        return text[:cut], True
    if finished:
        return text, True
    # The last character may be incomplete, and a stop text may have begun.
    text = text.rstrip(_REPLACEMENT_CHARACTER)
    return text[: len(text) - partial_stop_length(text, request.stop)], False


def stream_until_stop(texts: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """A stream of texts that ends before the first stop text, even one split over texts.

    Example:
        >>> list(stream_until_stop(iter(["one EN", "D two"]), ["END"]))
        ['one ']
    """
    held = ""
    for text in texts:
        held += text
        cut = first_stop(held, stops)
        if cut is not None:
            if held[:cut]:
                yield held[:cut]
            return
        keep = partial_stop_length(held, stops)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, if there is one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text.

    Example:
        >>> partial_stop_length("one EN", ["END"])
        2
    """
    return max(
        (
            n
            for stop in stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )


def _num_tokens_to_stop(tokenizer: RequestTokenizer, request: Request, new: Sequence[int]) -> int:
    """How many tokens it took to complete the first stop text."""

    def has_stop(count: int) -> bool:
        return first_stop(tokenizer.decode(new[:count]), request.stop) is not None

    return 1 + bisect_left(range(1, len(new) + 1), True, key=has_stop)
