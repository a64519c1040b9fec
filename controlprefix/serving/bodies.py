"""Request bodies: OpenAI's fields, and the steering fields of `controlprefix.Request`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from controlprefix.errors import ModelNotFoundError, RequestError
from controlprefix.request import Request, SteeringFields

# They would change the result and are not supported: better to say so than to ignore them.
_UNSUPPORTED = (
    "audio",
    "best_of",
    "echo",
    "function_call",
    "functions",
    "modalities",
    "prediction",
    "prompt_logprobs",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
)
_MAX_ITEMS = 1000  # of any list in a body
_MAX_TEXTS = 10_000
_DEFAULT_MAX_TOKENS = 256
_MIN_TEMPERATURE = 1e-3


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class CompletionBody(SteeringFields):
    """Fields of chat and text completions.

    `model` is the model's name, or the name and a task: `smollm2/email`.
    """

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    n: int = Field(default=1, ge=1, le=10_000)
    stop: str | Annotated[list[str], Field(max_length=_MAX_ITEMS)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def to_requests(
        self, model_name: str, prompts: Sequence[dict[str, Any]], max_new_tokens: int
    ) -> list[Request]:
        """The requests of this body: `n` per prompt.

        Args:
            model_name: Name of the served model.
            prompts: `prompt` or `messages` of each.
            max_new_tokens: The server's limit.

        Raises:
            RequestError: If something is not supported or out of range.
        """
        for field in _UNSUPPORTED:
            if not _is_default(field, (self.model_extra or {}).get(field)):
                raise RequestError(f"{field} is not supported by this server; leave it out")
        limit = min(_DEFAULT_MAX_TOKENS, max_new_tokens)
        num_tokens = self.max_completion_tokens or self.max_tokens or limit
        if num_tokens > max_new_tokens:
            raise RequestError(
                f"max_tokens is {num_tokens}; this server generates {max_new_tokens} at most"
            )
        fields = self.model_dump(include=set(SteeringFields.model_fields))
        fields |= {
            "task": self.task(model_name),
            "user": self.user or None,
            "max_new_tokens": num_tokens,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
        }
        if self.temperature:
            fields["temperature"] = max(_MIN_TEMPERATURE, self.temperature)
        else:  # greedy
            fields |= {"top_k": None, "top_p": None, "min_p": None}
        return [
            Request(
                **prompt,
                **fields,
                **({} if self.seed is None else {"seed": (self.seed + i) % (1 << 63)}),
            )
            for prompt in prompts
            for i in range(self.n)
        ]

    def task(self, model_name: str) -> str | None:
        """The task in the `model` field.

        Raises:
            ModelNotFoundError: If it names another model.
        """
        model, _, task = self.model.partition("/")
        if model != model_name and self.model != model_name:
            raise ModelNotFoundError(
                f"no model {self.model[:80]!r} here; there is {model_name!r}, and "
                f"{model_name}/<task>"
            )
        return None if self.model == model_name else task or None


class ChatMessage(BaseModel):
    """A message, whose content may be given as text parts."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], Field(max_length=_MAX_ITEMS)]

    def to_plain(self) -> dict[str, str]:
        """The message as a chat template takes it.

        Raises:
            RequestError: If a part is not text.
        """
        if isinstance(self.content, str):
            text = self.content
        else:
            if any(part.get("type") != "text" for part in self.content):
                raise RequestError("only text is supported; leave other parts of a message out")
            text = "".join(str(part.get("text", "")) for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(CompletionBody):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_ITEMS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


class TextBody(CompletionBody):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(max_length=_MAX_ITEMS)]
    logprobs: int | None = Field(default=None, ge=0, le=20)


class ClassifyBody(BaseModel):
    """Body of `POST /v1/classify`."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1, max_length=64)


class EnrolmentBody(BaseModel):
    """Body of `PUT /v1/users/{user}`: the arguments of `ControlPrefix.enroll`."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1, max_length=_MAX_TEXTS)
    decoder: str | None = None
    refine: bool = False
    keep_texts: bool = False


def _is_default(field: str, value: Any) -> bool:
    """Whether leaving the field out asks for the same."""
    if value is None or value is False or (field == "best_of" and value == 1):
        return True
    return isinstance(value, (str, list, dict)) and value in ("", "none", [], {})
