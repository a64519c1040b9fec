"""Comparisons: which rows they take, split and refuse."""

import math
from typing import Any, cast

import pytest

from controlprefix import (
    ContextLengthError,
    Example,
    RequestError,
    TrainingDataError,
    UnsupportedModelError,
)
from controlprefix.evaluation.comparison import (
    compare,
    measures,
)
from controlprefix.evaluation.comparison.compare import _split

from helpers import COMPARISON, engine, greetings


@pytest.mark.slow
def test_references_of_one_prompt_stay_together() -> None:
    rows = [
        Example(prompt=prompt, completion=completion, attributes={"tone": tone})
        for prompt in "abc"
        for tone in ("warm", "cold")
        for completion in (f"{prompt} {tone} 1", f"{prompt} {tone} 2")
    ]
    requests = measures.distinct_requests(rows)
    assert [row.completion for row in requests] == [row.completion for row in rows[::2]]
    assert measures.rows_of_requests(rows, requests[1:2]) == rows[2:4]
    second = [row.completion for row in rows[1::2]]
    assert math.isclose(measures.text_figures(rows, requests, second)["chrF"], 100)
    others = [row.completion for row in rows[3::2]] + [rows[1].completion]  # of other labels
    assert measures.text_figures(rows, requests, others)["chrF"] < 100


def test_no_label_is_held_out_as_a_whole() -> None:
    """Where each label has a prompt of its own, too."""
    labels = [f"topic {i}" for i in range(5)]
    rows = [
        Example(
            prompt=f"Write about {label}.", completion=f"It is {i}", attributes={"topic": label}
        )
        for label in labels
        for i in range(20)
    ]
    training, validation, test = _split(
        lambda own, _: cast(list[Example], own), rows, 0.2, 0.2, None, 96
    )
    assert {row.attributes["topic"] for row in training} == set(labels)
    assert len(training) + len(validation) + len(test) == len(rows)
    assert len({row.attributes["topic"] for row in test}) > 1


def test_other_prompts_leave_room_for_an_answer() -> None:
    settings = {**COMPARISON, "methods": ["plain"], "other_prompts": ["Hi", "x" * 9999]}
    with pytest.raises(ContextLengthError, match="one of other_prompts, leaves no room"):
        compare(engine(), greetings(8), **settings)
    assert compare(engine(), greetings(8), too_long="skip", **settings).figures("plain", "nats")


def test_mistakes_are_clear_errors() -> None:
    cp, rows = engine(), greetings(8)
    with pytest.raises(TrainingDataError, match="no method 'lora'"):
        compare(cp, rows, **{**COMPARISON, "methods": ["lora"]})
    with pytest.raises(TrainingDataError, match="num_rates is 4"):
        compare(cp, rows, **{**COMPARISON, "num_rates": 4})
    two = [rows[0], rows[1].model_copy(update={"task": "other"})]
    with pytest.raises(TrainingDataError, match="2 tasks .*one task at a time"):
        compare(cp, two, **COMPARISON)
    with pytest.raises(TrainingDataError, match="test is 2"):
        compare(cp, rows, **COMPARISON, test=2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"seeds": 1}, "seeds is 1; compare takes a list"),
        ({"seeds": [0.5]}, "compare takes a list of ints"),
        ({"methods": 3}, "methods is 3"),
        ({"other_prompts": "Hello"}, "other_prompts is 'Hello'; compare takes a list"),
    ]
    for change, message in wrong:
        with pytest.raises(RequestError, match=message):
            compare(cp, rows, **{**COMPARISON, **change})
    for change, message in (
        ({"seeds": [-1]}, "seeds must be 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens 1 or more"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            compare(cp, rows, **{**COMPARISON, **change})
    ids = [row.model_copy(update={"prompt": None, "prompt_ids": (5, 6)}) for row in rows]
    with pytest.raises(TrainingDataError, match="has token ids or images"):
        compare(cp, ids, **COMPARISON)
    with pytest.raises(ContextLengthError, match="shorten it"):
        compare(cp, [*rows, rows[0].model_copy(update={"prompt": "x" * 9999})], **COMPARISON)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        compare(engine("bart"), rows, **COMPARISON)


@pytest.mark.slow
def test_rows_beyond_the_context_are_refused_or_left_out() -> None:
    rows = [*greetings(6), Example(prompt="Write", completion="word " * 5000, task="t")]
    rows = [row.model_copy(update={"task": "t"}) for row in rows]
    settings = {**COMPARISON, "methods": ["plain"]}
    with pytest.raises(ContextLengthError, match="row 13:"):
        compare(engine(), rows, **settings)
    with pytest.raises(TrainingDataError, match="none of the 1 rows fits"):
        compare(engine(), rows[:12], test=rows[12:], too_long="skip", **settings)
    with pytest.raises(RequestError, match="'refuse' or 'skip'"):
        compare(engine(), rows, too_long="cut", **settings)  # type: ignore[arg-type]
    report = compare(engine(), rows, too_long="skip", **settings)
    fitting = compare(engine(), rows[:12], **settings)
    assert report.options["data"] == fitting.options["data"]
