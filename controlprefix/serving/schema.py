"""What clients send, in OpenAI's form, with what is ours beside it."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from controlprefix.errors import RequestError
from controlprefix.request import Request

# Ask for something that would be ignored: better to say so.
_UNSUPPORTED = (
    "audio",
    "best_of",
    "echo",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "prediction",
    "prompt_logprobs",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
)


def _says_nothing(field: str, value: Any) -> bool:
    """Whether leaving the field out asks for the same."""
    if value is None or value is False or (field == "best_of" and value == 1):
        return True
    return isinstance(value, (str, list, dict)) and value in ("", "none", [], {})


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class Asked(BaseModel):
    """Fields of both kinds of completion."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=10_000)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # Ours.
    attributes: dict[str, str | dict[str, float]] = Field(default_factory=dict)
    strengths: dict[str, float] = Field(default_factory=dict)
    schedules: dict[str, list[tuple[int, float]]] = Field(default_factory=dict)
    mixing: Literal["attention", "logits"] = "attention"
    calibrated: bool = False
    unseen: Literal["refuse", "nearest", "text"] = "refuse"
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def requests(
        self, name: str, prompts: Sequence[dict[str, Any]], most_tokens: int
    ) -> list[Request]:
        """What to generate: `n` for each prompt.

        Args:
            name: Of the model.
            prompts: `prompt` or `messages` of each.
            most_tokens: That may be asked for.

        Raises:
            RequestError: If something cannot be had.
        """
        for field in _UNSUPPORTED:
            if not _says_nothing(field, (self.model_extra or {}).get(field)):
                raise RequestError(f"{field} is not supported by this server; leave it out")
        if self.frequency_penalty or self.presence_penalty:
            raise RequestError(
                "frequency_penalty and presence_penalty are not supported; use repetition_penalty"
            )
        tokens = self.max_completion_tokens or self.max_tokens or min(256, most_tokens)
        if tokens > most_tokens:
            raise RequestError(f"max_tokens is {tokens}; this server gives {most_tokens} at most")
        settings: dict[str, Any] = {
            "task": self.task(name),
            "user": self.user or None,
            "attributes": self.attributes,
            "strengths": self.strengths,
            "schedules": self.schedules,
            "mixing": self.mixing,
            "calibrated": self.calibrated,
            "unseen": self.unseen,
            "max_new_tokens": tokens,
            "repetition_penalty": self.repetition_penalty,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
        }
        if self.temperature:
            settings["temperature"] = max(1e-3, self.temperature)
            settings |= {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return [
            Request(
                **prompt,
                **settings,
                **({} if self.seed is None else {"seed": (self.seed + i) % (1 << 63)}),
            )
            for prompt in prompts
            for i in range(self.n)
        ]

    def task(self, name: str) -> str | None:
        """What the model's name says behind the slash.

        Raises:
            ModelNotFoundError: If it is another model's name.
        """
        model, _, task = self.model.partition("/")
        if model != name and self.model != name:
            raise ModelNotFoundError(
                f"no model {self.model!r} here; there is {name!r}, and {name}/<task>"
            )
        return None if self.model == name else task or None


class ModelNotFoundError(RequestError):
    """Another model's name."""


class ChatMessage(BaseModel):
    """A turn, whose content may be given in parts of text."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    def plain(self) -> dict[str, str]:
        """As a template takes it.

        Raises:
            RequestError: If a part is no text.
        """
        if isinstance(self.content, str):
            text = self.content
        else:
            if any(part.get("type") != "text" for part in self.content):
                raise RequestError("only text can be read; leave other parts of a message out")
            text = "".join(str(part.get("text", "")) for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


class TextAsked(Asked):
    """`/v1/completions`."""

    prompt: str | list[str]
    logprobs: int | None = Field(default=None, ge=0, le=20)


class ToJudge(BaseModel):
    """`POST /v1/judge`: which labels texts show."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1, max_length=64)


class Enrolment(BaseModel):
    """`PUT /v1/users/{user}`."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1)
    decoder: str | None = None
    refine: bool = False
    keep_texts: bool = False
