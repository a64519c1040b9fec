"""OpenAI's response forms, as pydantic models."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from controlprefix.completion import Completion, StandIn
from controlprefix.inference.runner import TokenLogProbs

Decode = Callable[[int], str]


class ErrorBody(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorResponse(BaseModel):
    """The body of an error response."""

    error: ErrorBody


class Usage(BaseModel):
    """Token counts; slots are not tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    """Log-probabilities of a text completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


LogProbs = ChatLogProbs | TextLogProbs


class AssistantMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogProbs | None
    finish_reason: str


class TextChoice(BaseModel):
    """One text completion."""

    index: int
    text: str
    logprobs: TextLogProbs | None
    finish_reason: str


class CompletionResponse(BaseModel):
    """The body of a completion, with what was used for labels without a prefix."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice | TextChoice]
    usage: Usage
    stand_ins: list[StandIn] | None = Field(default=None, exclude_if=lambda value: value is None)


class ChatFormat:
    """The form of `/v1/chat/completions`.

    Args:
        top: Log-probabilities per token; None for none.
    """

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, top: int | None) -> None:
        self.top = top

    def choice(self, index: int, completion: Completion, log_probs: Any) -> ChatChoice:
        """A whole choice."""
        return ChatChoice(
            index=index,
            message=AssistantMessage(content=completion.text),
            logprobs=log_probs,
            finish_reason=completion.finish_reason,
        )

    def text_delta(self, index: int, text: str, *, is_first: bool) -> dict[str, Any]:
        """New text of a choice in a stream."""
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def final_delta(self, index: int, reason: str, log_probs: Any) -> dict[str, Any]:
        """The end of a choice in a stream."""
        return {"index": index, "delta": {}, "logprobs": log_probs, "finish_reason": reason}

    def log_probs(self, tokens: Sequence[TokenLogProbs], decode: Decode) -> ChatLogProbs:
        """Log-probabilities of a choice."""

        def fields(token: int, log_prob: float) -> dict[str, Any]:
            text = decode(token)
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

        content = [
            TokenLogProb(
                **fields(token.token, token.log_prob),
                top_logprobs=[TopLogProb(**fields(*pair)) for pair in token.top],
            )
            for token in tokens
        ]
        return ChatLogProbs(content=content)


class TextFormat:
    """The form of `/v1/completions`.

    Args:
        top: Log-probabilities per token; None for none.
    """

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, top: int | None) -> None:
        self.top = top

    def choice(self, index: int, completion: Completion, log_probs: Any) -> TextChoice:
        """A whole choice."""
        return TextChoice(
            index=index,
            text=completion.text,
            logprobs=log_probs,
            finish_reason=completion.finish_reason,
        )

    def text_delta(self, index: int, text: str, *, is_first: bool) -> dict[str, Any]:
        """New text of a choice in a stream."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def final_delta(self, index: int, reason: str, log_probs: Any) -> dict[str, Any]:
        """The end of a choice in a stream."""
        return {"index": index, "text": "", "logprobs": log_probs, "finish_reason": reason}

    def log_probs(self, tokens: Sequence[TokenLogProbs], decode: Decode) -> TextLogProbs:
        """Log-probabilities of a choice."""
        texts = [decode(token.token) for token in tokens]
        return TextLogProbs(
            tokens=texts,
            token_logprobs=[token.log_prob for token in tokens],
            top_logprobs=[{decode(t): value for t, value in token.top} for token in tokens],
            text_offset=[sum(map(len, texts[:i])) for i in range(len(texts))],
        )


Format = ChatFormat | TextFormat
