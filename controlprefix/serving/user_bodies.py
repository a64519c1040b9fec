"""Request bodies about users: enrolment, training and feedback."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.example import Preference
from controlprefix.serving.chat_message import MAX_ITEMS, ChatMessage

_MAX_TEXTS = 10_000
_MAX_STEPS = 2000
_MAX_SLOTS = 256


class LearningBody(BaseModel):
    """Body of `POST /v1/users/{user}/learn`: how a job trains."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    steps: int | None = Field(default=None, ge=1, le=_MAX_STEPS)
    """Training steps; left out, as many as the library's default epochs have."""

    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Learning rate; left out, the library's default."""

    num_slots: int | None = Field(default=None, ge=1, le=_MAX_SLOTS)
    """Slots of a new prefix without a decoder."""


class TrainingBody(LearningBody):
    """How a job trains a user's prefix on texts: options of `ControlPrefix.train_users`."""

    as_codes: bool | None = None
    """With a decoder, train and store the user's code alone; else all slots."""


class EnrolmentBody(BaseModel):
    """Body of `PUT /v1/users/{user}`: arguments of `ControlPrefix.enroll`, or for a job."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    texts: list[str] = Field(min_length=1, max_length=_MAX_TEXTS)
    decoder: str | None = None
    refine: bool = False
    num_slots: int | None = Field(default=None, ge=1, le=_MAX_SLOTS)
    """Without a decoder: slots at most; left out, 64."""

    keep_texts: bool = False
    keep_profile: bool = False
    add: bool = False
    """With the decoder of the earlier enrolment: update the code with these texts too."""

    guard: bool = False
    """With a decoder: shrink the predicted code towards the mean code, by the factor with the
    lowest loss on held-out texts of the user."""

    train: TrainingBody | None = None
    """Train the prefix in a job, instead of making it at once."""

    def job_options(self) -> dict[str, Any]:
        """What a worker needs to train on the texts.

        Raises:
            RequestError: If an option has no effect in a job.
        """
        for name in ("refine", "num_slots", "keep_profile", "add", "guard"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} has no effect in a job; leave it out, or leave train out"
                )
        options = self.train.model_dump(exclude_none=True) if self.train else {}
        if self.decoder is not None:
            if "num_slots" in options:
                raise RequestError(
                    "train.num_slots is for a prefix without a decoder; leave it out"
                )
            options["decoder"] = self.decoder
        elif "as_codes" in options:
            raise RequestError("train.as_codes is for a decoder; name one, or leave it out")
        return {"texts": self.texts, **options}


class FeedbackBody(BaseModel):
    """Body of `POST /v1/feedback`: a `Preference`, or a draft and what became of it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    user: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, max_length=MAX_ITEMS)
    task: str | None = None
    attributes: dict[str, Any] = {}
    chosen: str | None = None
    """The better text."""

    rejected: str | None = None
    """The other one."""

    draft: str | None = None
    """A text that the user changed; it counts as rejected."""

    final: str | None = None
    """What the user made of the draft; it counts as chosen."""

    def preference(self) -> Preference:
        """The preference.

        Raises:
            RequestError: If there are not two texts, or a field is invalid.
        """
        pairs = [(self.chosen, self.rejected), (self.final, self.draft)]
        named = [pair for pair in pairs if pair != (None, None)]
        if len(named) != 1 or None in named[0]:
            raise RequestError("give chosen and rejected, or draft and final")
        fields = self.model_dump(
            exclude_unset=True, exclude={"chosen", "rejected", "draft", "final", "messages"}
        )
        if self.messages is not None:  # not as they are: an image there might be a path
            fields["messages"] = [message.to_plain() for message in self.messages]
        ((chosen, rejected),) = named
        try:
            return Preference(**fields, chosen=chosen, rejected=rejected)
        except TrainingDataError as error:
            raise RequestError(str(error)) from None
