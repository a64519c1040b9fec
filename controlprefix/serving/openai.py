"""OpenAI's forms of chat and text completions, whole and as streams."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field

from controlprefix.completion import Completion, PartUsed, StandIn
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.model.token_bytes import TokenBytes
from controlprefix.serving.log_probs import (
    ChatLogProbs,
    TextLogProbs,
    chat_log_probs,
    text_log_probs,
)

CommonFields = Mapping[str, Any]  # `id`, `created` and `model` of a response
Item = TypeVar("Item")
Payload = tuple[str | None, Mapping[str, Any]]  # name and data of a server-sent event


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


class AssistantMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class OwnReport(BaseModel):
    """What one choice was steered by, where choices differ."""

    parts: list[PartUsed] | None = Field(default=None, exclude_if=lambda value: value is None)
    stand_ins: list[StandIn] | None = Field(default=None, exclude_if=lambda value: value is None)


class ChatChoice(OwnReport):
    """One chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogProbs | None
    finish_reason: str


class TextChoice(OwnReport):
    """One text completion."""

    index: int
    text: str
    logprobs: TextLogProbs | None
    finish_reason: str


class SteeringReport(BaseModel):
    """What a response was steered by."""

    parts: list[PartUsed] = Field(default_factory=list)
    stand_ins: list[StandIn] | None = Field(default=None, exclude_if=lambda value: value is None)


class CompletionHead(BaseModel):
    """What the bodies of completions begin with."""

    id: str
    object: str
    created: int
    model: str


class ChatCompletionResponse(SteeringReport, CompletionHead):
    """The body of a chat completion, with the prefixes and versions that it was steered by."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class TextCompletionResponse(SteeringReport, CompletionHead):
    """The body of a text completion, with the prefixes and versions that it was steered by."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated in front of its completion.

    Attributes:
        text: The prompt.
        ids: Its tokens.
        tokens: Their log-probabilities, if they were asked for.
    """

    text: str
    ids: Sequence[int]
    tokens: Sequence[TokenLogProbs | None] = ()


@dataclass(frozen=True)
class Finished:
    """A finished choice: its completion, and log-probabilities if they were asked for."""

    completion: Completion
    tokens: Sequence[TokenLogProbs]
    echo: Echo | None = None


def steering_report(completions: Sequence[Completion]) -> dict[str, Any]:
    """`parts` and `stand_ins` of a response, of all its choices."""
    parts = [part for completion in completions for part in completion.parts]
    stand_ins = [stand_in for completion in completions for stand_in in completion.stand_ins]
    return {"parts": _distinct(parts), "stand_ins": _distinct(stand_ins) or None}


def own_reports(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """`parts` and `stand_ins` of each choice, where they differ between choices."""
    reports = [
        {"parts": list(completion.parts), "stand_ins": list(completion.stand_ins) or None}
        for completion in completions
    ]
    return reports if any(report != reports[0] for report in reports) else [{} for _ in reports]


def _distinct(items: Sequence[Item]) -> list[Item]:
    return [item for i, item in enumerate(items) if item not in items[:i]]


class ResponseFormatter(Protocol):
    """The form of a response.

    Attributes:
        id_prefix: What ids begin with.
        top: Log-probabilities per token; None for none.
    """

    id_prefix: str
    top: int | None

    def whole(self, common: CommonFields, choices: Sequence[Finished], usage: Usage) -> BaseModel:
        """The body of a response that is not streamed."""

    def opening(self, common: CommonFields, echoes: Sequence[Echo | None]) -> Iterator[Payload]:
        """What a stream begins with."""

    def delta(
        self,
        common: CommonFields,
        index: int,
        text: str,
        tokens: Sequence[TokenLogProbs],
        *,
        is_first: bool,
    ) -> Iterator[Payload]:
        """New text of a choice, and the tokens that it comes from."""

    def end(
        self, common: CommonFields, index: int, finished: Finished, tokens: Sequence[TokenLogProbs]
    ) -> Iterator[Payload]:
        """The end of a choice, with the tokens that were not reported yet."""

    def closing(
        self,
        common: CommonFields,
        choices: Sequence[Finished],
        usage: Usage,
        *,
        include_usage: bool,
    ) -> Iterator[Payload]:
        """What a stream ends with."""


class ChatFormatter:
    """The form of `/v1/chat/completions`.

    Args:
        top: Log-probabilities per token; None for none.
        names: The bytes of tokens.
    """

    id_prefix = "chatcmpl-"

    def __init__(self, top: int | None, names: TokenBytes) -> None:
        self.top = top
        self._names = names

    def whole(self, common: CommonFields, choices: Sequence[Finished], usage: Usage) -> BaseModel:
        """The body of a response: see `ResponseFormatter.whole`."""
        completions = [choice.completion for choice in choices]
        reports = own_reports(completions)
        return ChatCompletionResponse(
            **common,
            **steering_report(completions),
            choices=[
                ChatChoice(
                    index=i,
                    message=AssistantMessage(content=choice.completion.text),
                    logprobs=None if self.top is None else self._log_probs(choice.tokens),
                    finish_reason=choice.completion.finish_reason,
                    **own,
                )
                for i, (choice, own) in enumerate(zip(choices, reports, strict=True))
            ],
            usage=usage,
        )

    def opening(self, common: CommonFields, echoes: Sequence[Echo | None]) -> Iterator[Payload]:
        """Nothing: the first text of a choice has its role."""
        yield from ()

    def delta(
        self,
        common: CommonFields,
        index: int,
        text: str,
        tokens: Sequence[TokenLogProbs],
        *,
        is_first: bool,
    ) -> Iterator[Payload]:
        """New text of a choice: see `ResponseFormatter.delta`."""
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        yield self._chunk(common, index, delta, tokens, None)

    def end(
        self, common: CommonFields, index: int, finished: Finished, tokens: Sequence[TokenLogProbs]
    ) -> Iterator[Payload]:
        """The end of a choice: see `ResponseFormatter.end`."""
        name, body = self._chunk(common, index, {}, tokens, finished.completion.finish_reason)
        yield name, {**body, **_dumped_report(finished)}

    def closing(
        self,
        common: CommonFields,
        choices: Sequence[Finished],
        usage: Usage,
        *,
        include_usage: bool,
    ) -> Iterator[Payload]:
        """The usage, if it was asked for."""
        if include_usage:
            body = {"object": "chat.completion.chunk", "choices": [], "usage": usage.model_dump()}
            yield None, {**common, **body}

    def _chunk(
        self,
        common: CommonFields,
        index: int,
        delta: Mapping[str, str],
        tokens: Sequence[TokenLogProbs],
        reason: str | None,
    ) -> Payload:
        log_probs = self._log_probs(tokens).model_dump() if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return None, {**common, "object": "chat.completion.chunk", "choices": [choice]}

    def _log_probs(self, tokens: Sequence[TokenLogProbs]) -> ChatLogProbs:
        return chat_log_probs(tokens, self._names)


class TextFormatter:
    """The form of `/v1/completions`.

    Args:
        top: Log-probabilities per token; None for none.
        names: The bytes of tokens.
    """

    id_prefix = "cmpl-"

    def __init__(self, top: int | None, names: TokenBytes) -> None:
        self.top = top
        self._names = names
        self._before: dict[int, bytes] = {}  # per choice the bytes that were streamed

    def whole(self, common: CommonFields, choices: Sequence[Finished], usage: Usage) -> BaseModel:
        """The body of a response: see `ResponseFormatter.whole`."""
        completions = [choice.completion for choice in choices]
        reports = own_reports(completions)
        return TextCompletionResponse(
            **common,
            **steering_report(completions),
            choices=[
                TextChoice(
                    index=i,
                    text=(choice.echo.text if choice.echo else "") + choice.completion.text,
                    logprobs=None if self.top is None else self._whole_log_probs(choice),
                    finish_reason=choice.completion.finish_reason,
                    **own,
                )
                for i, (choice, own) in enumerate(zip(choices, reports, strict=True))
            ],
            usage=usage,
        )

    def opening(self, common: CommonFields, echoes: Sequence[Echo | None]) -> Iterator[Payload]:
        """The prompts, if they are repeated."""
        for i, echo in enumerate(echoes):
            if echo is not None:
                log_probs = None
                if self.top is not None:
                    log_probs = self._echo_log_probs(echo).model_dump()
                    self._before[i] = self._bytes(echo.ids)
                yield self._chunk(common, i, echo.text, log_probs, None)

    def delta(
        self,
        common: CommonFields,
        index: int,
        text: str,
        tokens: Sequence[TokenLogProbs],
        *,
        is_first: bool,
    ) -> Iterator[Payload]:
        """New text of a choice: see `ResponseFormatter.delta`."""
        yield self._chunk(common, index, text, self._next_log_probs(index, tokens), None)

    def end(
        self, common: CommonFields, index: int, finished: Finished, tokens: Sequence[TokenLogProbs]
    ) -> Iterator[Payload]:
        """The end of a choice: see `ResponseFormatter.end`."""
        log_probs = self._next_log_probs(index, tokens)
        name, body = self._chunk(common, index, "", log_probs, finished.completion.finish_reason)
        yield name, {**body, **_dumped_report(finished)}

    def closing(
        self,
        common: CommonFields,
        choices: Sequence[Finished],
        usage: Usage,
        *,
        include_usage: bool,
    ) -> Iterator[Payload]:
        """The usage, if it was asked for."""
        if include_usage:
            body = {"object": "text_completion", "choices": [], "usage": usage.model_dump()}
            yield None, {**common, **body}

    def _chunk(
        self, common: CommonFields, index: int, text: str, log_probs: Any, reason: str | None
    ) -> Payload:
        choice = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}
        return None, {**common, "object": "text_completion", "choices": [choice]}

    def _whole_log_probs(self, choice: Finished) -> TextLogProbs:
        if choice.echo is None:
            return text_log_probs(choice.tokens, self._names)
        return text_log_probs(
            [*choice.echo.tokens, *choice.tokens], self._names, first_token=choice.echo.ids[0]
        )

    def _echo_log_probs(self, echo: Echo) -> TextLogProbs:
        return text_log_probs(echo.tokens, self._names, first_token=echo.ids[0])

    def _next_log_probs(self, index: int, tokens: Sequence[TokenLogProbs]) -> Any:
        if not tokens:
            return None
        before = self._before.get(index, b"")
        self._before[index] = before + self._bytes([token.token for token in tokens])
        return text_log_probs(tokens, self._names, before=before).model_dump()

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._names.in_text, ids))


def _dumped_report(finished: Finished) -> dict[str, Any]:
    report = SteeringReport(**steering_report([finished.completion]))
    return report.model_dump(mode="json")
