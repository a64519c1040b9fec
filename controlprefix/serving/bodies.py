"""Request bodies: OpenAI's fields, and the steering fields of `controlprefix.Request`."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from controlprefix.errors import ModelNotFoundError, RequestError
from controlprefix.request import Request, SteeringFields, is_valid_unicode
from controlprefix.request_fields import ALL_TOKENS, with_sampling_defaults
from controlprefix.serving.chat_message import MAX_ITEMS, ChatMessage

_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
# Fields of OpenAI's API that change nothing that is generated here.
_IGNORED_FIELDS = frozenset(
    {
        "background", "include", "metadata", "parallel_tool_calls", "prompt_cache_key",
        "prompt_cache_retention", "reasoning", "reasoning_effort", "safety_identifier",
        "service_tier", "store", "truncation", "verbosity",
    }
)  # fmt: skip
# They would change the result and are not supported: better to say so than to ignore them.
_UNSUPPORTED = frozenset(
    {
        "audio", "best_of", "conversation", "function_call", "functions", "modalities",
        "prediction", "previous_response_id", "prompt_logprobs", "suffix", "tool_choice", "tools",
        "web_search_options",
    }
)  # fmt: skip
# Values that ask for nothing, beside null, false, "none", and what is empty.
_IGNORED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "max_completion_tokens": (-1,),
    "max_tokens": (-1,),
    "modalities": (["text"],),
    "tool_choice": ("auto",),
}
MAX_TOKENS = 1 << 31
_MAX_PROMPT_IDS = 1 << 20
MIN_TEMPERATURE = 1e-3
# Values that mean something to other servers: the most likely token alone, and all tokens.
_OTHER_VALUES: Mapping[tuple[str, float], float] = {
    ("top_p", 0): 1e-6,
    ("top_k", 0): ALL_TOKENS,
    ("top_k", -1): ALL_TOKENS,
}


class NestedBody(BaseModel):
    """An object within a body; a field that is null counts as left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(NestedBody):
    """How a stream ends."""

    include_usage: bool = False


class JsonSchema(NestedBody):
    """A JSON schema with a name."""

    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(NestedBody):
    """The form of a completion: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def to_schema(self) -> dict[str, Any] | None:
        """The schema of the completion, or None for any text.

        Raises:
            RequestError: If the schema is missing.
        """
        schema = None if self.json_schema is None else self.json_schema.json_schema
        return requested_schema(self.type, schema, "response_format", "json_schema.schema")


def requested_schema(
    kind: str, schema: dict[str, Any] | None, field: str, name: str
) -> dict[str, Any] | None:
    """The schema that a format stands for, or None for any text.

    Args:
        kind: `text`, `json_object` or `json_schema`.
        schema: The schema of the body, if there is one.
        field, name: Names of the format and of its schema, for errors.

    Raises:
        RequestError: If the schema is missing.
    """
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if schema is None:
        raise RequestError(f"{field} of the type json_schema needs {name}")
    return schema


class CompletionBody(SteeringFields):
    """Fields of all completions.

    `model` is the model's name, or the name and a task: `smollm2/email`. A field that is null
    counts as left out.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        extra = data.pop("extra_body", None)  # clients that do not unwrap it themselves
        if extra is not None and not isinstance(extra, Mapping):
            raise ValueError("extra_body must be a JSON object")
        data |= extra or {}
        names = {field.alias or name for name, field in cls.model_fields.items()}
        result: dict[str, Any] = {}
        for name, value in data.items():
            is_empty = value is None or value in _IGNORED_VALUES.get(name, ())
            if is_empty or name in _IGNORED_FIELDS - names:
                continue
            if name in names:
                is_number = isinstance(value, (int, float))
                result[name] = _OTHER_VALUES.get((name, value), value) if is_number else value
            elif name not in _UNSUPPORTED or not _is_default(value):
                raise ValueError(_refusal(str(name), names))
        return result

    @property
    def num_choices(self) -> int:
        """Completions per prompt."""
        return 1

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return False

    def fields(
        self,
        model_name: str,
        max_tokens: int | None,
        limit: int,
        defaults: Mapping[str, Any],
        num_choices: int = 1,
    ) -> dict[str, Any]:
        """The fields of `Request` that all requests of this body have in common.

        Args:
            model_name: Name of the served model.
            max_tokens: The limit that was asked for.
            limit: The server's limit.
            defaults: Sampling settings for what the body leaves out.
            num_choices: Completions per prompt.

        Raises:
            RequestError: If something is out of range.
        """
        if max_tokens is not None and max_tokens > limit:
            name = next((name for name in _LIMITS if getattr(self, name, None)), "max_tokens")
            raise RequestError(f"{name} is {max_tokens}; this server generates {limit} at most")
        steering = self.model_dump(include=set(SteeringFields.model_fields) & self.model_fields_set)
        temperature = self.temperature and max(MIN_TEMPERATURE, self.temperature)
        fields = {
            **steering,
            "task": self.task(model_name),
            "user": self.user or None,
            "temperature": temperature,
            "seed": None if self.seed is None else self.seed % (1 << 63),
        }
        return with_sampling_defaults(fields, defaults, num_choices=num_choices)

    def task(self, model_name: str) -> str | None:
        """The task in the `model` field.

        Raises:
            ModelNotFoundError: If it names another model.
        """
        task = self.model.removeprefix(f"{model_name}/")  # the name may contain slashes
        if task == self.model != model_name:
            raise ModelNotFoundError(
                f"no model {self.model[:80]!r} here; there is {model_name!r}, and "
                f"{model_name}/<task>"
            )
        if not task:
            raise ModelNotFoundError(f"{self.model[:80]!r} names no task after the slash")
        return None if self.model == model_name else task


class ChoicesBody(CompletionBody):
    """Fields of chat and text completions."""

    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    n: int = Field(default=1, ge=1, le=10_000)
    stop: str | Annotated[list[str], Field(max_length=MAX_ITEMS)] = Field(default_factory=list)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def num_choices(self) -> int:
        """Completions per prompt."""
        return self.n

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def to_requests(
        self,
        model_name: str,
        prompts: Sequence[dict[str, Any]],
        limit: int,
        defaults: Mapping[str, Any],
        *,
        default_limit: int,
        max_tokens: int | None,
    ) -> list[Request]:
        """The requests of this body: `n` per prompt.

        Args:
            model_name: Name of the served model.
            prompts: The prompt of each, as a field of `Request`.
            limit: The server's limit of new tokens.
            defaults: Sampling settings for what the body leaves out.
            default_limit: New tokens where the body names no limit.
            max_tokens: The body's limit.

        Raises:
            RequestError: If something is out of range.
        """
        fields = self.fields(model_name, max_tokens, limit, defaults, self.n)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        fields["stop"] = [text for text in stop if text]
        if self.response_format is not None:
            fields["json_schema"] = self.response_format.to_schema()
        requests = []
        for prompt in prompts:
            request = Request(**prompt, **fields)
            if max_tokens:
                request = request.model_copy(update={"max_new_tokens": max_tokens})
            else:
                request = request.with_default_limit(min(default_limit, limit))
            for i in range(self.n):
                seed = None if self.seed is None else (self.seed + i) % (1 << 63)
                requests.append(request.model_copy(update={"seed": seed}))
        return requests


class ChatBody(ChoicesBody):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_ITEMS)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _check_top_log_probs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


PromptIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0)]],
    Field(min_length=1, max_length=_MAX_PROMPT_IDS),
]


class TextBody(ChoicesBody):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | PromptIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_ITEMS)]
    )
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _check_log_probs(cls, value: Any) -> Any:
        return None if value is False else value  # as chat completions write it

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _check_prompt(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # a line for each form that it might have had
            raise ValueError(
                "give a text, token ids, or a list of either, none of them an empty list; "
                f"up to {MAX_ITEMS:,} prompts and {_MAX_PROMPT_IDS:,} ids"
            ) from None

    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as fields of `Request`."""
        if isinstance(self.prompt, str):
            return [{"prompt": self.prompt, "raw": True}]
        if isinstance(self.prompt[0], int):
            return [{"prompt_ids": self.prompt}]
        return [
            {"prompt": prompt, "raw": True} if isinstance(prompt, str) else {"prompt_ids": prompt}
            for prompt in self.prompt
        ]


class ClassifyBody(BaseModel):
    """Body of `POST /v1/classify`."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1, max_length=64)

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, texts: list[str]) -> list[str]:
        if not all(map(is_valid_unicode, texts)):
            raise ValueError("a text contains half a surrogate pair, which is not a character")
        return texts


# Where fields of the library are in this API.
_ELSEWHERE = {
    "task": "name the task in model, such as 'smollm2/email'",
    "json_schema": "give response_format",
    "max_new_tokens": "give max_tokens",
    "num_beams": "beams are not supported by this server",
}


def _is_default(value: Any) -> bool:
    """Whether leaving a field out asks for the same."""
    return value is False or (
        isinstance(value, (str, list, dict)) and value in ("", "none", [], {})
    )


def _refusal(name: str, names: set[str]) -> str:
    """Why a field is refused."""
    if name in _UNSUPPORTED:
        return f"{name} is not supported by this server; leave it out"
    if name in _ELSEWHERE:
        return f"unknown field {name!r}; {_ELSEWHERE[name]}"
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "it is no field of this API"
    return f"unknown field {name[:80]!r}; {hint}"
