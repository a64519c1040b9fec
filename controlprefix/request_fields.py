"""RequestFields: the fields of a request as keyword arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from controlprefix.request import Mixing, Unseen, When


class RequestFields(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`: the fields of `Request` beside the prompt."""

    raw: bool
    images: Sequence[Any]
    task: str | None
    attributes: Mapping[str, str | float | Mapping[str, float]]
    user: str | None
    strengths: Mapping[str, float]
    mixing: Mixing
    calibrated: bool
    unseen: Unseen
    when: When
    schedules: Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any]
    source_language: str | None
    target_language: str | None
    continue_final_message: bool
    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    num_beams: int
    stop: tuple[str, ...] | list[str]
    json_schema: Mapping[str, Any] | None
    seed: int | None
