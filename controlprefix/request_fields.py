"""The fields of a request as keyword arguments, and their defaults."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from controlprefix.request import SAMPLING_SETTINGS, Mixing, Unseen, When


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


ALL_TOKENS = 1 << 30  # as `top_k`: more than any vocabulary has


def with_sampling_defaults(
    fields: Mapping[str, Any], defaults: Mapping[str, float], *, num_choices: int = 1
) -> dict[str, Any]:
    """Fields of a request, with sampling settings in place of those that are left out.

    Without any setting, a request with a seed, or for several choices, samples at temperature 1.

    Args:
        fields: Fields of `Request`; `top_k` of `ALL_TOKENS` is no limit, also beside a default.
        defaults: Values of `temperature`, `top_k`, `top_p` and `min_p`.
        num_choices: How many completions are asked for.
    """
    result = dict(fields)
    if result.get("top_k") == ALL_TOKENS:
        result["top_k"] = None
        defaults = {name: value for name, value in defaults.items() if name != "top_k"}
    if (result.get("num_beams") or 1) > 1 or result.get("temperature") == 0:
        return result
    for name in SAMPLING_SETTINGS:
        if result.get(name) is None and name in defaults:
            result[name] = defaults[name]
    if all(result.get(name) is None for name in SAMPLING_SETTINGS) and (
        num_choices > 1 or result.get("seed") is not None
    ):
        result["temperature"] = 1.0
    return result
