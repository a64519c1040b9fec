"""JSON output: every engine writes JSON that the schema accepts, beside rows that are free."""

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import ControlPrefix, Prefix, Request, RequestError
from controlprefix.inference.json_constraint import JsonConstraint

from helpers import frozen
from models import build, byte_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def cp() -> ControlPrefix:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=2.0, seed=0))
    cp.put("attribute", "tone=warm", Prefix.random(cp.geometry, num_slots=3, scale=2.0, seed=1))
    return cp


def request(seed: int, **fields: Any) -> Request:
    return Request(
        prompt="abc", raw=True, max_new_tokens=120, temperature=1.0, seed=seed,
        json_schema=SCHEMA, **fields,
    )  # fmt: skip


def require_valid(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == {"name", "age"}
    assert len(value["name"]) <= 4
    assert 0 <= value["age"] <= 99


@pytest.mark.slow
def test_each_engine_writes_the_same_json(cp: ControlPrefix) -> None:
    free = Request(prompt="xy", raw=True, max_new_tokens=30)
    requests = [request(0), free, request(1, user="ana"), request(2, attributes={"tone": "warm"})]
    alone = [cp.generate(r) for r in requests]
    for completion in (alone[0], alone[2], alone[3]):
        require_valid(completion.text)
        assert completion.finish_reason == "stop"
    assert alone[1].text == cp.generate(free).text
    assert [c.text for c in cp.generate(requests)] == [c.text for c in alone]
    assert ["".join(cp.stream(r)) for r in requests] == [c.text for c in alone]
    with contextlib.closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(r)) for r in requests]
        assert [ticket.result().text for ticket in tickets] == [c.text for c in alone]


@pytest.mark.slow
def test_guidance_and_encoder_decoders_keep_to_the_schema(cp: ControlPrefix) -> None:
    against = request(3, attributes={"tone": {"warm": -0.5}}, user="ana")
    require_valid(cp.generate(against).text)
    model = build("t5")
    other = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    completions = other.generate([request(4), request(5), Request(prompt="a", raw=True)])
    for completion in completions[:2]:
        require_valid(completion.text)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.integers(1, 40))
def test_a_limit_cuts_json_and_nothing_else(cp: ControlPrefix, seed: int, limit: int) -> None:
    whole = cp.generate(request(seed)).text
    cut = cp.generate(request(seed).model_copy(update={"max_new_tokens": limit})).text
    assert whole.startswith(cut.rstrip("\ufffd"))


def test_any_json_and_schemas_that_cannot_be_used(cp: ControlPrefix) -> None:
    words = request(6).model_copy(update={"json_schema": {"enum": ["yes", "no"]}})
    assert json.loads(cp.generate(words).text) in ("yes", "no")
    for schema in ({"type": "nothing"}, {"type": "string", "pattern": "(?=a)b"}):
        wrong = request(7).model_copy(update={"json_schema": schema})
        with pytest.raises(RequestError, match="JSON schema"):
            cp.generate(wrong)
        with (
            contextlib.closing(cp.batcher()) as batcher,
            pytest.raises(RequestError, match="JSON schema"),
        ):
            batcher.submit(cp.resolve(wrong))
    with pytest.raises(RequestError, match="num_beams"):
        Request(prompt="a", num_beams=2, json_schema={})


def test_frozen_weights_are_untouched(cp: ControlPrefix) -> None:
    before = [p.clone() for p in cp.model.parameters()]
    cp.generate(request(8))
    assert all(map(torch.equal, before, cp.model.parameters()))


@pytest.mark.parametrize("value", ["x</s>y", "<s>é😀", "</s>"])
def test_the_text_of_a_special_token_in_a_value_is_spelt(value: str) -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    result = cp.generate("hi", raw=True, max_new_tokens=40, json_schema={"enum": [value]})
    assert json.loads(result.text) == value
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99_999_989},
        {"allOf": [{"type": "integer", "multipleOf": p} for p in (101, 103, 107)]},
        {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.1234567}}},
        {"type": "integer", "multipleOf": 10**400},
        {"type": "number", "multipleOf": True},
    ],
)
def test_schemas_that_take_a_state_per_remainder_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="multipleOf"):
        JsonConstraint(frozen(build("llama"), byte_tokenizer()), schema, 0)
    JsonConstraint(
        frozen(build("llama"), byte_tokenizer()), {"type": "number", "multipleOf": 0.01}, 0
    )


def test_remainders_are_those_of_one_number() -> None:
    """Of several numbers none is too large; nor is a value that looks like a schema."""
    apart = {
        name: {"type": "integer", "multipleOf": divisor, "default": {"multipleOf": 99_991}}
        for name, divisor in (("pieces", 144), ("grams", 250), ("days", 7))
    }
    model = frozen(build("llama"), byte_tokenizer())
    JsonConstraint(model, {"type": "object", "properties": apart}, 0)
    number = {"type": "integer", "multipleOf": 250}
    together = {"properties": {"a": {**number, "allOf": [{"multipleOf": 7}, {"multipleOf": 144}]}}}
    referred = {"properties": {"a": {**number, "$ref": "#/$defs/b"}}, "$defs": {"b": apart["days"]}}
    referred["$defs"]["c"] = apart["pieces"]
    for schema in (together, referred):
        with pytest.raises(RequestError, match="least common multiple"):
            JsonConstraint(model, {"type": "object", **schema}, 0)


def test_an_error_of_the_matcher_is_no_end_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = JsonConstraint(frozen(build("llama"), byte_tokenizer()), {"type": "integer"}, 1)

    class Failing:
        """As llguidance where it meets a limit: then it is stopped too."""

        has_failed = False

        def is_stopped(self) -> bool:
            return self.has_failed

        def consume_token(self, token: int) -> None:
            self.has_failed = True

        def is_error(self) -> bool:
            return self.has_failed

        def get_error(self) -> str:
            return "Too many items (limit 50000)\nmore"

    monkeypatch.setattr(constraint, "_matcher", Failing())
    with pytest.raises(RequestError, match=r"cannot be used: Too many items \(limit 50000\)$"):
        constraint(torch.tensor([[5, 6]]), torch.zeros(1, 300))
