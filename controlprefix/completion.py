"""Completion and Score: what comes back for a request."""

from typing import Literal

from pydantic import BaseModel, Field


class PartUsed(BaseModel):
    """One prefix that a completion was steered by.

    Attributes:
        kind, name: The prefix.
        version: Its version in the store; 0 if it is not stored.
        strength: Its strength in this request.
        relevance: With `when="relevant"`, the similarity of the prompt to those it is meant for.
    """

    kind: str
    name: str
    version: int
    strength: float
    relevance: float | None = Field(default=None, exclude_if=lambda value: value is None)


class StandIn(BaseModel):
    """What was used for a label that has no prefix.

    Attributes:
        label: The label that was asked for, such as `tone=stern`.
        how: `nearest` trained labels, the `opposite` at a negative strength, a prefix made from a
            `text` or `distilled` from one, `interpolated` between the trained numbers beside it,
            or `left out`.
        used: Trained labels and their shares of the mixture; or the text, with 1.
        similarity: Cosine of the sentence embeddings of the label and the nearest trained
            label; 1 for an opposite, a text and a number.
    """

    label: str
    how: Literal["nearest", "opposite", "text", "distilled", "interpolated", "left out"]
    used: dict[str, float]
    similarity: float


class Completion(BaseModel):
    """What was generated for one request.

    Attributes:
        text: Generated text without the end token, cut before a `stop` text.
        finish_reason: `stop` at an end token or a `stop` text, `length` at `max_new_tokens`.
        num_prompt_tokens, num_tokens: Tokens of the prompt and of the completion; slots are
            not tokens.
        parts: The prefixes used, with their versions and strengths.
        stand_ins: What was used for labels without a prefix.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_tokens: int
    parts: tuple[PartUsed, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()


class Score(BaseModel):
    """The likelihood of a completion.

    Attributes:
        log_likelihood: Natural logarithm (nats), summed over the tokens of the completion;
            an end token is not counted.
        num_tokens: Tokens of the completion.
    """

    log_likelihood: float
    num_tokens: int
