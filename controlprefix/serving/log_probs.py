"""Log-probabilities in OpenAI's forms."""

import codecs
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.model.token_bytes import TokenBytes


class TopLogProb(BaseModel):
    """A token and its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """A generated token, with the most likely tokens at its position."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(BaseModel):
    """Log-probabilities of a chat completion."""

    content: list[TokenLogProb]
    refusal: None = None


class TextLogProbs(BaseModel):
    """Log-probabilities of a text completion; null for a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_log_probs(tokens: Sequence[TokenLogProbs | None], names: TokenBytes) -> ChatLogProbs:
    """Log-probabilities of chat completions, with each token's own bytes."""

    def fields(token: int, log_prob: float) -> dict[str, Any]:
        return {"token": names.text(token), "logprob": log_prob, "bytes": list(names(token))}

    return ChatLogProbs(
        content=[
            TokenLogProb(
                **fields(token.token, token.log_prob),
                top_logprobs=[TopLogProb(**fields(*pair)) for pair in token.top],
            )
            for token in tokens
            if token is not None
        ]
    )


def text_log_probs(
    tokens: Sequence[TokenLogProbs | None],
    names: TokenBytes,
    *,
    first_token: int = 0,
    before: bytes = b"",
) -> TextLogProbs:
    """Log-probabilities of text completions.

    Args:
        tokens: In order; None for a prompt's first token.
        names: The bytes of tokens.
        first_token: The id of that first token.
        before: Bytes of the tokens before, which count in the offsets.
    """
    texts, offsets, top = [], [], list[dict[str, float] | None]()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    num_characters = len(decoder.decode(before))
    for token in tokens:
        token_id = first_token if token is None else token.token
        texts.append(names.text(token_id))
        value = names.in_text(token_id)
        if value and not 0x80 <= value[0] < 0xC0:  # it does not complete a character before it
            num_characters += len(decoder.decode(b"", final=True))
        offsets.append(num_characters)
        num_characters += len(decoder.decode(value))
        top.append(None if token is None else _by_text(token, names))
    return TextLogProbs(
        tokens=texts,
        token_logprobs=[None if token is None else token.log_prob for token in tokens],
        top_logprobs=top,
        text_offset=offsets,
    )


def _by_text(token: TokenLogProbs, names: TokenBytes) -> dict[str, float]:
    """The most likely tokens and the one itself by text; by id where texts are the same."""
    result: dict[str, float] = {}
    ids = {names.text(token.token): token.token}
    for token_id, log_prob in (*token.top, (token.token, token.log_prob)):
        text = names.text(token_id)
        if ids.setdefault(text, token_id) != token_id:
            text = f"token_id:{token_id}"
        result[text] = log_prob
    return result
