"""What a person may ask for, and what comes back."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlprefix.attributes import weighted_labels
from controlprefix.errors import RequestError, TrainingDataError, known_names
from controlprefix.prefixes import schedule as course

_MOST_LABELS = 64
_MOST_STOPS, _LONGEST_STOP = 16, 256


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Request(BaseModel):
    """One generation: what to write, in whose voice, and how to sample.

    Attributes:
        prompt: The text to answer. A chat model's template is applied to it as one
            user message, unless `raw`.
        messages: A conversation, in place of `prompt`.
        raw: Continue `prompt` as it stands, without a template; an empty one begins any text.
        task: The shared task prefix.
        attributes: For each attribute its label, or labels with weights.
        user: The user whose prefix to add.
        strengths: Multiplies parts: keys are `task`, `user`, or an attribute; 0 is
            absent, 1 as trained, below 0 leads away from the part (at the price of a row).
        mixing: How labels come together. `attention`: their slots beside each other, so that
            they share the attention there is. `logits`: each label has a row of its own beside
            the task and the user, and what each changes in the logits is added up, times its
            weight: firmer control of several attributes, at the price of a row a label. Weights
            below 0 for the labels that are not meant make it firmer still.
        calibrated: Weights and strengths of attributes are positions of their labels' dials, at
            which the measured attribute moves evenly (see `controlprefix.evaluation`).
        unseen: What to do with a label that has no prefix: `refuse` it, take the `nearest` known
            labels by sentence embeddings (left out where nothing is near), or make a prefix of
            its `text`, the description in the attribute space or a sentence that names it.
            `Completion.stand_ins` says what was used.
        schedules: Change strengths along the generation: for parts, as in `strengths`, points
            `(token, multiplier)`, joined by straight lines; `{"tone": [(0, 1), (40, 0)]}` fades
            the tone out over the first 40 new tokens. For generation only.
        max_new_tokens: Tokens to generate at most.
        temperature, top_k, top_p, min_p: Sample; with none of them, decoding is greedy.
            The lowest temperature is 0.001.
        repetition_penalty: Above 1, repeats become less likely.
        num_beams: Beam search, when above 1; it does not sample.
        stop: Texts that end the completion; they are cut off.
        seed: Of this request's sampling; the same in any batch.

    Raises:
        RequestError: If a field is unknown, missing or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    raw: bool = False
    task: str | None = None
    attributes: dict[str, str | dict[str, float]] = Field(default_factory=dict)
    user: str | None = None
    strengths: dict[str, float] = Field(default_factory=dict)
    mixing: Literal["attention", "logits"] = "attention"
    calibrated: bool = False
    unseen: Literal["refuse", "nearest", "text"] = "refuse"
    schedules: dict[str, tuple[tuple[int, float], ...]] = Field(default_factory=dict)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float | None = Field(default=None, ge=1e-3, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    num_beams: int = Field(default=1, ge=1)
    stop: tuple[str, ...] = ()
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RequestError(_explain(error, type(self).model_fields)) from None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return any(x is not None for x in (self.temperature, self.top_k, self.top_p, self.min_p))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(map(is_whole_text, _texts(self.model_dump()))):
            raise ValueError("a text holds half a surrogate pair, which is no character")
        self._check_prompt()
        if self.raw and self.messages is not None:
            raise ValueError("raw continues a prompt; messages need the chat template")
        for attribute, chosen in self.attributes.items():
            if "=" in attribute or attribute in {"", "task", "user"}:
                raise ValueError(f"{attribute!r} cannot be the name of an attribute")
            if not chosen:
                raise ValueError(
                    f"attribute {attribute!r} names no label; give one, or leave it out"
                )
        labels = weighted_labels(self.attributes)
        if len(labels) > _MOST_LABELS:
            raise ValueError(f"{len(labels)} labels; a request may name {_MOST_LABELS}")
        for label in labels:
            product = label.weight * self.strengths.get(label.attribute, 1.0)
            _check_strength(label.weight, f"of {label.name}")
            _check_strength(product, f"of {label.name}")
        for field in ("strengths", "schedules"):
            for part in getattr(self, field):
                if part not in {"task", "user", *self.attributes}:
                    raise ValueError(
                        f"{field} names {part!r}; this request has: "
                        f"{known_names(part, ['task', 'user', *self.attributes])}"
                    )
        for part, strength in self.strengths.items():
            _check_strength(strength, f"of {part!r}")
        for part, points in self.schedules.items():
            try:
                course.check(points)
            except ValueError as error:
                raise ValueError(f"the schedule of {part!r} {error}") from None
        if (self.schedules or self.num_beams > 1) and (why := self._rows_of_its_own()):
            what = "schedules" if self.schedules else "num_beams above 1"
            raise ValueError(f"{what} cannot be combined with {why}")
        if self.mixing == "logits" and self.calibrated:
            raise ValueError("dials are measured with attention; leave mixing or calibrated out")
        if self.num_beams > 1 and self.samples:
            raise ValueError(
                "num_beams above 1 does not sample; leave temperature, top_* and min_p out"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which ends every completion at once")
        if len(self.stop) > _MOST_STOPS or any(len(one) > _LONGEST_STOP for one in self.stop):
            raise ValueError(
                f"stop may hold {_MOST_STOPS} texts of up to {_LONGEST_STOP} characters"
            )
        return self

    def _rows_of_its_own(self) -> str:
        """What makes the request need more rows than one, if anything does."""
        weights = [label.weight for label in weighted_labels(self.attributes)]
        if any(strength < 0 for strength in (*weights, *self.strengths.values())):
            return "strengths below 0"
        return "mixing='logits'" if self.mixing == "logits" else ""

    def _check_prompt(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        begins_a_text = self.raw and self.prompt == ""
        if self.prompt is not None and not self.prompt.strip() and not begins_a_text:
            raise ValueError("the prompt is empty; write what to answer, or give raw=True for any")
        if self.messages is not None and not any(m.content.strip() for m in self.messages):
            raise ValueError("messages are empty; write what to answer")


class Example(Request):
    """A Request whose completion is known: to learn from, or to score.

    Raises:
        TrainingDataError: If a field is unknown, missing or out of range.
    """

    completion: str

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except RequestError as error:
            raise TrainingDataError(str(error)) from None

    def _check_prompt(self) -> None:
        if self.schedules:
            raise ValueError("schedules run along a generation; an example has its text already")
        if not self.completion.strip():
            raise ValueError("the completion is empty; an example needs the text to learn")
        super()._check_prompt()


class PartUsed(BaseModel):
    """One prefix that a completion was steered by."""

    kind: str
    name: str
    version: int
    strength: float


class StandIn(BaseModel):
    """What stood in for a label without a prefix.

    Attributes:
        label: The one that was asked for, such as `tone=stern`.
        how: By the `nearest` known labels, by a `text`, or not at all.
        used: Known labels and their shares; or the text, with 1.
        similarity: Of the nearest label: the cosine of its sentence embedding; 1 for a text.
    """

    label: str
    how: Literal["nearest", "text", "left out"]
    used: dict[str, float]
    similarity: float


class Completion(BaseModel):
    """What was generated for one request.

    Attributes:
        text: Without the end token, and cut before a `stop` text.
        finish_reason: `stop` at an end token or a `stop` text, `length` at `max_new_tokens`.
        num_prompt_tokens, num_tokens: Tokens read and written; slots are not tokens.
        parts: The prefixes used, with their versions.
        stand_ins: For labels that had none.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_tokens: int
    parts: tuple[PartUsed, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()


class Score(BaseModel):
    """How likely a completion is.

    Attributes:
        log_likelihood: Natural logarithm (nats), summed over the tokens of the
            completion; an end token is not counted.
        num_tokens: Tokens of the completion.
    """

    log_likelihood: float
    num_tokens: int


def is_whole_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can hold half a surrogate pair, texts cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a nested value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _check_strength(strength: float, what: str) -> None:
    if not abs(strength) <= course.MOST:  # nor NaN
        raise ValueError(
            f"strength {what} is {strength}; give a finite number up to {course.MOST:g}"
        )


def _explain(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """pydantic's findings in one line each, without echoing the text of a prompt."""
    lines = []
    for found in error.errors(include_url=False, include_input=False):
        place = ".".join(str(step) for step in found["loc"])
        if found["type"] == "extra_forbidden":
            lines.append(f"unknown field {place!r}; a request has: {known_names(place, fields)}")
        else:
            message = found["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: {message}" if place else message)
    return "; ".join(lines)
