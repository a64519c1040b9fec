"""OpenAI's Responses API for text: its body, and the form of its responses and streams."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.model.token_bytes import TokenBytes
from controlprefix.request import Request
from controlprefix.serving.bodies import (
    MAX_TOKENS,
    CompletionBody,
    NestedBody,
    requested_schema,
)
from controlprefix.serving.chat_message import MAX_ITEMS, ChatMessage
from controlprefix.serving.log_probs import TokenLogProb, chat_log_probs
from controlprefix.serving.openai import (
    CommonFields,
    Echo,
    Finished,
    Payload,
    SteeringReport,
    Usage,
    steering_report,
)


class TextFormatBody(NestedBody):
    """The form of the text: any, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    def to_schema(self) -> dict[str, Any] | None:
        """The schema of the text, or None for any text.

        Raises:
            RequestError: If the schema is missing.
        """
        return requested_schema(self.type, self.json_schema, "text.format", "a schema")


class TextBodyOptions(NestedBody):
    """Options of the text."""

    format: TextFormatBody = Field(default_factory=TextFormatBody)


class InputItem(ChatMessage):
    """A message of the input."""

    type: Literal["message"] = "message"


class ResponsesBody(CompletionBody):
    """Body of `POST /v1/responses`. Nothing is stored: send the whole conversation."""

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    """A system message in front of the input."""
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    text: TextBodyOptions = Field(default_factory=TextBodyOptions)
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Log-probabilities of the most likely tokens at each position, beside the token's own."""
    include: list[str] = Field(default_factory=list, max_length=MAX_ITEMS)
    """`message.output_text.logprobs` adds the log-probability of each token; others have no
    effect."""

    @property
    def num_log_probs(self) -> int | None:
        """Log-probabilities per token beside its own; None for none at all."""
        is_included = "message.output_text.logprobs" in self.include
        return self.top_logprobs if self.top_logprobs or is_included else None

    def to_request(
        self, model_name: str, limit: int, defaults: Mapping[str, Any], *, default_limit: int
    ) -> Request:
        """The request of this body.

        Args:
            model_name: Name of the served model.
            limit: The server's limit of new tokens.
            defaults: Sampling settings for what the body leaves out.
            default_limit: New tokens where the body names no limit.

        Raises:
            RequestError: If something is out of range.
        """
        if isinstance(self.input, str):
            messages = [{"role": "user", "content": self.input}]
        else:
            messages = [item.to_plain() for item in self.input]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        fields = self.fields(model_name, self.max_output_tokens, limit, defaults)
        fields["json_schema"] = self.text.format.to_schema()
        request = Request(messages=tuple(messages), **fields)
        if self.max_output_tokens:
            return request.model_copy(update={"max_new_tokens": self.max_output_tokens})
        return request.with_default_limit(min(default_limit, limit))


class OutputText(BaseModel):
    """Generated text."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TokenLogProb] = Field(default_factory=list)


class OutputMessage(BaseModel):
    """The generated message."""

    id: str
    type: Literal["message"] = "message"
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ResponseUsage(BaseModel):
    """Token counts; slots are not tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int] = Field(default_factory=lambda: {"cached_tokens": 0})
    output_tokens: int
    output_tokens_details: dict[str, int] = Field(default_factory=lambda: {"reasoning_tokens": 0})
    total_tokens: int


class ResponseHead(BaseModel):
    """What the body of a response begins with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str


class ResponseObject(SteeringReport, ResponseHead):
    """The body of a response, with the prefixes and versions that it was steered by."""

    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    model: str
    output: list[OutputMessage] = Field(default_factory=list)
    parallel_tool_calls: bool = False
    temperature: float | None = None
    tool_choice: str = "none"
    tools: list[Any] = Field(default_factory=list)
    top_p: float | None = None
    usage: ResponseUsage | None = None
    store: bool = False


class ResponsesFormatter:
    """The form of `/v1/responses`, which has one choice.

    Args:
        body: What was asked for.
        top: Log-probabilities per token; None for none.
        names: The bytes of tokens.
    """

    id_prefix = "resp_"

    def __init__(self, body: ResponsesBody, top: int | None, names: TokenBytes) -> None:
        self.top = top
        self._body = body
        self._names = names
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._text = ""
        self._number = 0

    def whole(self, common: CommonFields, choices: Sequence[Finished], usage: Usage) -> BaseModel:
        """The body of a response: see `ResponseFormatter.whole`."""
        (choice,) = choices
        completion = choice.completion
        is_whole = completion.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        response = self._response(common, status)
        response.incomplete_details = None if is_whole else {"reason": "max_output_tokens"}
        log_probs = chat_log_probs(choice.tokens, self._names).content
        response.output = [
            OutputMessage(
                id=self._message_id,
                status=status,
                content=[OutputText(text=completion.text, logprobs=log_probs)],
            )
        ]
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        return response.model_copy(update=steering_report([completion]))

    def opening(self, common: CommonFields, echoes: Sequence[Echo | None]) -> Iterator[Payload]:
        """The response, its message and its text, all still empty."""
        response = self._response(common, "in_progress").model_dump(mode="json")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = OutputMessage(id=self._message_id, status="in_progress", content=[])
        yield self._event(
            "response.output_item.added", output_index=0, item=item.model_dump(mode="json")
        )
        part = OutputText(text="").model_dump(mode="json")
        yield self._part_event("response.content_part.added", part=part)

    def delta(
        self,
        common: CommonFields,
        index: int,
        text: str,
        tokens: Sequence[TokenLogProbs],
        *,
        is_first: bool,
    ) -> Iterator[Payload]:
        """New text: see `ResponseFormatter.delta`."""
        if text:
            self._text += text
            log_probs = chat_log_probs(tokens, self._names).model_dump()["content"]
            yield self._part_event("response.output_text.delta", delta=text, logprobs=log_probs)

    def end(
        self, common: CommonFields, index: int, finished: Finished, tokens: Sequence[TokenLogProbs]
    ) -> Iterator[Payload]:
        """The whole text."""
        log_probs = chat_log_probs(finished.tokens, self._names).model_dump()["content"]
        text = finished.completion.text
        yield self._part_event("response.output_text.done", text=text, logprobs=log_probs)

    def closing(
        self,
        common: CommonFields,
        choices: Sequence[Finished],
        usage: Usage,
        *,
        include_usage: bool,
    ) -> Iterator[Payload]:
        """The response again, now whole."""
        response = self.whole(common, choices, usage).model_dump(mode="json")
        (item,) = response["output"]
        yield self._part_event("response.content_part.done", part=item["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _response(self, common: CommonFields, status: str) -> ResponseObject:
        return ResponseObject(
            id=common["id"],
            created_at=common["created"],
            model=common["model"],
            status=status,
            instructions=self._body.instructions,
            temperature=self._body.temperature,
            top_p=self._body.top_p,
        )

    def _part_event(self, name: str, **fields: Any) -> Payload:
        return self._event(
            name, item_id=self._message_id, output_index=0, content_index=0, **fields
        )

    def _event(self, name: str, **fields: Any) -> Payload:
        payload = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return name, payload
