"""Strengths that change along a generation: each token as the model at that strength has it."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from controlprefix import ControlPrefix, Example, Prefix, Request, RequestError, TrainingDataError
from controlprefix.inference.static_generation import _NanCheck
from controlprefix.prefixes.assembly import Part, assemble
from controlprefix.prefixes.schedule import multiplier_at

from models import build, byte_tokenizer

FADING = ((0, 1.0), (3, 0.25), (5, 0.0), (7, 2.0))


def engine_of(name: str) -> ControlPrefix:
    cp = ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    for seed, label in enumerate(("warm", "cold")):
        prefix = Prefix.random(cp.geometry, num_slots=4, scale=3.0, seed=seed)
        cp.put("attribute", f"tone={label}", prefix)
    return cp


@pytest.fixture(scope="module")
def steered() -> ControlPrefix:
    return engine_of("llama")


def by_hand(cp: ControlPrefix, prompt: str, schedule: Any, count: int) -> str:
    """A token at a time, with another batch assembled for each."""
    prefix = cp.get("attribute", "tone=warm")
    ids = torch.tensor([cp.tokenizer(prompt)["input_ids"]])
    cache, new, read = DynamicCache(), [], ids
    for token in range(count):
        batch = assemble([[Part(prefix, multiplier_at(schedule, token))]], cp.geometry)
        with torch.no_grad(), cp.frozen_model.attached(batch):
            logits = cp.model(read, past_key_values=cache).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] in cp.frozen_model.request_tokenizer.end_ids:
            break
        read = torch.tensor([new[-1:]])
    return cp.frozen_model.request_tokenizer.decode(new)


def asked(prompt: str, **more: Any) -> Request:
    fields = {"attributes": {"tone": "warm"}, "schedules": {"tone": FADING}}
    return Request(prompt=prompt, raw=True, max_new_tokens=12, **{**fields, **more})


@pytest.mark.slow
def test_each_token_is_that_of_its_own_strength(steered: ControlPrefix) -> None:
    for prompt in ("ab", "hello there"):
        expected = by_hand(steered, prompt, FADING, 12)
        assert steered.generate(asked(prompt)).text == expected
        assert "".join(steered.stream(asked(prompt))) == expected
        steady = steered.generate(asked(prompt, schedules={})).text
        assert steady == by_hand(steered, prompt, ((0, 1.0),), 12)
        assert steady != expected


@pytest.mark.slow
def test_a_row_with_a_schedule_is_the_same_in_any_batch(steered: ControlPrefix) -> None:
    rows = [
        asked("ab"),
        asked("hello there", schedules={}),
        asked("abc", schedules={"tone": [(4, 3.0)]}),
        asked("x", attributes={"tone": {"warm": 0.5, "cold": 2.0}}),
        Request(prompt="plain", raw=True, max_new_tokens=12),
        asked("ab", temperature=1.0, seed=3),
    ]
    alone = [steered.generate(row).text for row in rows]
    assert [item.text for item in steered.generate(rows)] == alone
    assert steered.generate(asked("abc", schedules={"tone": [(4, 3.0)]})).text == (
        steered.generate(asked("abc", schedules={}, strengths={"tone": 3.0})).text
    )


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_logits_under_a_schedule_are_the_same_in_any_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside slots that all rows share, and without padding, so that nothing is masked."""
    cp = engine_of(name)
    cp.put("task", "note", Prefix.random(cp.geometry, num_slots=2, scale=2.0, seed=7))
    first_rows: list[torch.Tensor] = []
    check = _NanCheck.__call__

    def record(self: _NanCheck, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first_rows.append(scores[0].clone())
        return check(self, input_ids, scores)

    monkeypatch.setattr(_NanCheck, "__call__", record)
    row = asked("ab", task="note")
    cp.generate(row)
    alone = list(first_rows)
    assert len(alone) > 8
    for prompt in ("cd", "a longer prompt"):
        first_rows.clear()
        cp.generate([row, Request(prompt=prompt, raw=True, max_new_tokens=12, task="note")])
        assert len(first_rows) >= len(alone)
        for own, in_batch in zip(alone, first_rows, strict=False):
            assert torch.allclose(own, in_batch, atol=1e-4)


def test_beams_follow_a_schedule_too(steered: ControlPrefix) -> None:
    faded = steered.generate(asked("ab", num_beams=3, schedules={"tone": [(0, 0.0)]}))
    plain = steered.generate(Request(prompt="ab", raw=True, max_new_tokens=12, num_beams=3))
    assert faded.text == plain.text


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"user": []}, "the schedule of 'user' has no points"),
        ({"tone": [(3, 1.0), (2, 1.0)]}, "tokens in rising order, from 0"),
        ({"tone": [(0, -1.0)]}, "must be a finite number >= 0"),
        ({"tone": [(0, 1.0), (10**400, 0.0)]}, "tokens in rising order"),
        ({"mood": [(0, 1.0)]}, "schedules names 'mood', which is neither task"),
    ],
)
def test_what_is_no_schedule_is_refused(schedules: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        asked("x", schedules=schedules)


def test_schedules_are_for_generation(steered: ControlPrefix) -> None:
    with pytest.raises(RequestError, match="cannot be combined with strengths below 0"):
        asked("x", strengths={"tone": -1.0})
    with pytest.raises(RequestError, match="use generate or stream"), steered.assembled(asked("x")):
        pass
    with pytest.raises(TrainingDataError, match="an example has its text already"):
        Example(prompt="x", completion="y", user="ana", schedules={"user": [(0, 1.0)]})
