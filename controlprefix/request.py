"""Request: what a caller asks for."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from controlprefix.errors import (
    RequestError,
    TrainingDataError,
    known_names,
    validation_message,
)
from controlprefix.labels import (
    RESERVED_PARTS,
    check_attribute_name,
    check_labels,
    weighted_labels,
    with_composed_names,
)
from controlprefix.message import MAX_IMAGES, Images, Message
from controlprefix.prefixes.key import PrefixKey
from controlprefix.prefixes.schedule import MAX_STRENGTH, Schedule, check_schedule

Mixing = Literal["attention", "logits"]
Unseen = Literal["refuse", "nearest", "text", "distill"]
When = Literal["always", "relevant"]

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p")
_MAX_INT = 1 << 31  # of what becomes a tensor
_MAX_BEAMS = 256
_MAX_LABELS = 64
_MAX_ENTRIES = 256  # of any dict
_MAX_STOP_TEXTS, _MAX_STOP_CHARACTERS = 64, 256


class NamedPart(NamedTuple):
    """One part that a request names: the key of its prefix, its strength and its schedule."""

    key: PrefixKey
    strength: float
    schedule: Schedule = ()


class SteeringFields(BaseModel):
    """The request fields that Python, HTTP and the command line have in common."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    user: str | None = None
    """User whose prefix to add."""

    attributes: Annotated[dict[str, str | dict[str, float]], BeforeValidator(check_labels)] = Field(
        default_factory=dict, max_length=_MAX_ENTRIES
    )
    """Per attribute its label, or a mixture as a dict of labels and weights. A label may be a
    number: between two trained numbers, it is a mixture of both."""

    strengths: Annotated[dict[str, float], BeforeValidator(with_composed_names)] = Field(
        default_factory=dict, max_length=_MAX_ENTRIES
    )
    """Strength per part, by `task`, `user` or the attribute. 0 is absent, 1 as trained, below 0
    steers away from the part: in an extra row of the batch, or, for a decoupled prefix, by
    subtracting its output."""

    mixing: Mixing = "attention"
    """How several labels are combined. With `attention` their slots share one attention. With
    `logits` each label has an extra row, and the changes of the logits are added up: firmer
    control of several attributes, and firmer still with negative weights for unwanted labels."""

    calibrated: bool = False
    """Read weights and strengths of attributes as positions of their labels' calibrated dials
    (see `controlprefix.evaluation.calibrate`)."""

    unseen: Unseen = "refuse"
    """What to do with a label that has no prefix. `refuse` refuses it, `nearest` steers away from
    its opposite, if the attribute file names one that is trained, or else mixes the trained labels
    nearest by sentence embedding, `text` makes a prefix from a text (the description in
    the attribute file, or a sentence that names the label). `distill` trains a prefix to do what
    that text says, at its first use, in about a minute, and stores it; not over HTTP."""

    when: When = "always"
    """With `relevant`, prefixes that have learned which prompts they are for (see
    `cp.learn_relevance`) have strength 0 on others; those that have not are attached."""

    schedules: Annotated[
        dict[str, Annotated[tuple[tuple[int, float], ...], Field(max_length=1000)]],
        BeforeValidator(with_composed_names),
    ] = Field(default_factory=dict, max_length=_MAX_ENTRIES)
    """Strength schedule per part, as `(token, multiplier)` points joined by straight lines.
    `{"tone": [(0, 1), (40, 0)]}` fades the tone out over the first 40 new tokens."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=_MAX_ENTRIES)
    """Variables for the model's chat template, such as `enable_thinking`, with their values."""

    source_language: str | None = None
    """Language of the prompt, as the tokenizer of a multilingual encoder-decoder names it
    (`eng_Latn`). Left out, the one that the tokenizer is set to."""

    target_language: str | None = None
    """Language of the completion, named likewise. Left out, the one of the model's generation
    config."""

    continue_final_message: bool = False
    """Continue the last of `messages`, which is the assistant's, instead of answering it."""

    top_k: int | None = Field(default=None, ge=1, lt=_MAX_INT)
    """Sample from the k most likely tokens."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the most likely tokens that have this probability together."""

    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens at least this likely, relative to the most likely token."""

    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1, tokens that occurred before become less likely, those of the prompt too."""

    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Is subtracted from the logits of tokens that were generated before."""

    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Is subtracted from a token's logit for each time it was generated before."""

    logit_bias: dict[
        Annotated[int, Field(ge=0, lt=_MAX_INT)], Annotated[float, Field(ge=-100, le=100)]
    ] = Field(default_factory=dict, max_length=1024)
    """Per token id a number that is added to its logit."""


class Request(SteeringFields):
    """One generation: what to write, in whose voice, and how to sample.

    Without `temperature`, `top_k`, `top_p` and `min_p`, decoding is greedy.

    Raises:
        RequestError: If a field is unknown, missing or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    prompt: str | None = None
    """Text to answer. A chat model's template is applied to it as one user message, unless
    `raw`."""

    messages: tuple[Message, ...] | None = None
    """A conversation, instead of `prompt`."""

    prompt_ids: tuple[Annotated[int, Field(ge=0, lt=_MAX_INT)], ...] | None = None
    """Token ids to continue as they are, instead of `prompt`."""

    images: Images = ()
    """Images that the prompt, or the last message of the user, is about: paths, bytes, data URIs
    or Pillow images. They come before the text; of a `raw` prompt, each on a line of its own."""

    raw: bool = False
    """Continue `prompt` as it is, without a chat template; with an empty prompt the
    model writes unconditionally."""

    task: str | None = None
    """Task whose prefix to use."""

    max_new_tokens: int = Field(default=128, ge=1, lt=_MAX_INT)
    """Maximum number of tokens to generate. Left out, fewer where the context has less room."""

    temperature: float | None = Field(default=None, ge=1e-3, allow_inf_nan=False)
    """Sampling temperature, 0.001 or more; 0 is greedy, whatever the other sampling settings."""

    num_beams: int = Field(default=1, ge=1, le=_MAX_BEAMS)
    """Number of beams; with more than one, beam search, which does not sample."""

    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are cut off."""

    json_schema: dict[str, Any] | None = None
    """JSON schema of the completion; an empty one allows any JSON."""

    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    """Seed of this request's sampling; the result is the same in any batch."""

    _source: str = PrivateAttr("")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            message = validation_message(error, type(self).model_fields, "a request")
            raise RequestError(message) from None

    def from_source(self, source: str) -> Self:
        """The same with where it was read from, such as `rows.csv line 3`, for errors."""
        copied = self.model_copy()
        copied._source = source
        return copied

    def with_default_limit(self, max_new_tokens: int) -> Self:
        """The same with a limit that still counts as left out."""
        copied = self.model_copy(update={"max_new_tokens": max_new_tokens})
        copied.model_fields_set.discard("max_new_tokens")
        return copied

    def place(self, number: int) -> str:
        """Where it is, for errors: where it was read from, or its number from 1."""
        return self._source or f"row {number}"

    def require_sampling(self, number: int) -> None:
        """Refuse beams, for callers that sample several texts.

        Args:
            number: Number of the row from 1, for the error.

        Raises:
            TrainingDataError: If it has them.
        """
        if self.num_beams > 1:
            raise TrainingDataError(
                f"{self.place(number)} has num_beams={self.num_beams}, but texts are sampled; "
                "leave it out"
            )

    @property
    def texts(self) -> list[str]:
        """The prompt, or the text of each message; empty for token ids."""
        return [message.content for message in self.messages or ()] or [self.prompt or ""]

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The prompt or the messages, as messages with the images that belong to them."""
        if self.messages is None:
            return (Message(role="user", content=self.prompt or "", images=self.images),)
        if not self.images:
            return self.messages
        last = max(i for i, message in enumerate(self.messages) if message.role == "user")
        message = self.messages[last]
        changed = message.model_copy(update={"images": (*self.images, *message.images)})
        return (*self.messages[:last], changed, *self.messages[last + 1 :])

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn at random."""
        return any(getattr(self, name) is not None for name in SAMPLING_SETTINGS)

    @property
    def has_penalty(self) -> bool:
        """Whether logits depend on the tokens before."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    @property
    def changes_logits(self) -> bool:
        """Whether the most likely token is not always chosen."""
        return bool(
            self.do_sample or self.has_penalty or self.logit_bias or self.json_schema is not None
        )

    @property
    def named_parts(self) -> list[NamedPart]:
        """The parts that the request names, each with its strength and schedule."""
        parts: list[tuple[PrefixKey, str, float]] = []
        if self.task is not None:
            parts.append((PrefixKey("task", self.task), "task", 1.0))
        for label in weighted_labels(self.attributes):
            parts.append((label.key, label.attribute, label.weight))
        if self.user is not None:
            parts.append((PrefixKey("user", self.user), "user", 1.0))
        return [
            NamedPart(key, weight * self.strengths.get(name, 1.0), self.schedules.get(name, ()))
            for key, name, weight in parts
        ]

    @model_validator(mode="before")
    @classmethod
    def _without_sampling_at_zero(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and fields.get("temperature") == 0:
            return {**fields, **dict.fromkeys(SAMPLING_SETTINGS)}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            is_text = all(map(is_valid_unicode, _texts_in(self.model_dump())))
        except RecursionError:
            raise ValueError("a value is nested too deeply") from None
        if not is_text:
            raise ValueError("a text contains half a surrogate pair, which is not a character")
        self._check_prompt()
        if self.raw and self.messages is not None:
            raise ValueError("raw continues a prompt; messages need the chat template")
        for attribute, labels in self.attributes.items():
            check_attribute_name(attribute)
            if not labels:
                raise ValueError(
                    f"attribute {attribute!r} names no label; give one, or leave it out"
                )
        if self.continue_final_message and (
            self.messages is None or self.messages[-1].role != "assistant"
        ):
            raise ValueError("continue_final_message needs messages that end with the assistant's")
        self._check_strengths()
        if (self.schedules or self.num_beams > 1) and (reason := self._reason_for_extra_rows()):
            field = "schedules" if self.schedules else "num_beams above 1"
            raise ValueError(f"{field} cannot be combined with {reason}")
        if self.mixing == "logits" and self.calibrated:
            raise ValueError("dials are calibrated for mixing='attention'; leave one of both out")
        if self.num_beams > 1 and self.do_sample:
            raise ValueError(
                "num_beams above 1 does not sample; leave temperature, top_* and min_p out"
            )
        if self.num_beams > 1 and (
            self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.json_schema is not None
        ):
            raise ValueError(
                "num_beams above 1 cannot be combined with presence_penalty, frequency_penalty, "
                "logit_bias or json_schema"
            )
        if "" in self.stop:
            raise ValueError("stop contains an empty text, which ends every completion at once")
        too_long = any(len(text) > _MAX_STOP_CHARACTERS for text in self.stop)
        if len(self.stop) > _MAX_STOP_TEXTS or too_long:
            raise ValueError(
                f"stop may hold {_MAX_STOP_TEXTS} texts of up to {_MAX_STOP_CHARACTERS} characters"
            )
        return self

    def _check_strengths(self) -> None:
        labels = weighted_labels(self.attributes)
        if len(labels) > _MAX_LABELS:
            raise ValueError(f"{len(labels)} labels; a request may name {_MAX_LABELS}")
        for label in labels:
            _check_strength(label.weight, label.key.name)
            product = label.weight * self.strengths.get(label.attribute, 1.0)
            _check_strength(product, label.key.name)
        parts = [*RESERVED_PARTS, *self.attributes]
        for field in ("strengths", "schedules"):
            for part in getattr(self, field):
                if part not in parts:
                    raise ValueError(
                        f"{field} names {part!r}, which is neither task, user nor an attribute "
                        f"of this request; it can name: {known_names(part, parts)}"
                    )
        for part, strength in self.strengths.items():
            _check_strength(strength, part)
        for part, points in self.schedules.items():
            try:
                check_schedule(points)
            except ValueError as error:
                raise ValueError(f"the schedule of {part!r} {error}") from None

    def _reason_for_extra_rows(self) -> str:
        """Why the request needs more than one row of a batch; empty if it does not."""
        weights = [label.weight for label in weighted_labels(self.attributes)]
        if any(strength < 0 for strength in (*weights, *self.strengths.values())):
            return "strengths below 0"
        return "mixing='logits'" if self.mixing == "logits" else ""

    def _check_prompt(self) -> None:
        prompts = (self.prompt, self.messages, self.prompt_ids)
        if sum(prompt is not None for prompt in prompts) != 1:
            raise ValueError("give one of prompt, messages and prompt_ids")
        if self.prompt_ids == ():
            raise ValueError("prompt_ids is empty; give at least one id")
        if self.images and self.prompt_ids is not None:
            raise ValueError("images have no place among prompt_ids; give a prompt")
        roles = {message.role for message in self.messages or ()}
        if self.images and roles and "user" not in roles:
            raise ValueError("images belong to the user's last message, and there is none")
        num_images = sum(len(message.images) for message in self.conversation)
        if num_images > MAX_IMAGES:
            raise ValueError(f"{num_images} images; a request may have {MAX_IMAGES}")
        starts_any_text = self.raw and self.prompt == ""
        is_blank = self.prompt is not None and not self.prompt.strip() and not self.images
        if is_blank and not starts_any_text:
            raise ValueError("the prompt is empty; write what to answer, or give raw=True for any")
        contents = [message.content.strip() or message.images for message in self.messages or ()]
        if self.messages is not None and not (self.images or any(contents)):
            raise ValueError("messages have no text; write what to answer")


AnyRequest = TypeVar("AnyRequest", bound=Request)


def is_valid_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: JSON can hold half a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a nested value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts_in(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_in(item)


def _check_strength(strength: float, part: str) -> None:
    if not abs(strength) <= MAX_STRENGTH:  # also false for NaN
        raise ValueError(
            f"strength of {part!r} is {strength}; give a finite number up to {MAX_STRENGTH:g}"
        )
