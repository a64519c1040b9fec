"""Strengths below 0 steer away from a part by the documented formula, in any batch."""

import json
import math
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WatermarkingConfig

from controlprefix import (
    ControlPrefix,
    Example,
    Prefix,
    Request,
    RequestError,
    TrainingDataError,
)
from controlprefix.errors import ModelOutputError
from controlprefix.inference.guidance import combined_logits, without_implausible

from models import build, byte_tokenizer

NAMES = (("task", "note"), ("attribute", "tone=warm"), ("user", "ana"), ("attribute", "mood=glad"))


def engine(name: str) -> ControlPrefix:
    cp = ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    for seed, (kind, part) in enumerate(NAMES):
        prefix = Prefix.random(cp.geometry, num_slots=3 + seed, scale=1.0, seed=seed)
        cp.put(kind, part, prefix)  # type: ignore[arg-type]
    return cp


@pytest.fixture(scope="module", params=["llama", "bart"])
def steered(request: pytest.FixtureRequest) -> ControlPrefix:
    return engine(request.param)


PARTS: list[dict[str, Any]] = [
    {"task": "note", "attributes": {"tone": {"warm": 0.8}, "mood": "glad"}, "mixing": "logits"},
    {
        "user": "ana",
        "attributes": {"tone": {"warm": 1.5}, "mood": {"glad": -0.5}},
        "strengths": {"user": 0.5, "tone": 2.0},
        "mixing": "logits",
    },
    {"task": "note", "attributes": {"tone": {"warm": -0.7}}},
    {"task": "note", "user": "ana", "strengths": {"user": -1.5, "task": 0.5}},
    {"attributes": {"tone": {"warm": -1.0}}, "user": "ana", "strengths": {"user": -0.5}},
]


Rows = tuple[dict[str, Any], list[tuple[dict[str, Any], float]]]


def rows_of(parts: dict[str, Any]) -> Rows:
    """The base row, and each part applied in logit space with its weight, written out by hand."""
    mild = {"user": "ana", "strengths": {"user": 0.5}}
    rows: dict[int, Rows] = {
        0: (
            {"task": "note"},
            [
                ({"task": "note", "attributes": {"tone": "warm"}}, 0.8),
                ({"task": "note", "attributes": {"mood": "glad"}}, 1.0),
            ],
        ),
        1: (
            mild,
            [
                ({**mild, "attributes": {"tone": "warm"}}, 3.0),
                ({**mild, "attributes": {"mood": "glad"}}, -0.5),
            ],
        ),
        2: ({"task": "note"}, [({"task": "note", "attributes": {"tone": "warm"}}, -0.7)]),
        3: (
            {"task": "note", "strengths": {"task": 0.5}},
            [({"task": "note", "user": "ana", "strengths": {"task": 0.5}}, -1.5)],
        ),
        4: ({}, [({"attributes": {"tone": "warm"}}, -1.0), ({"user": "ana"}, -0.5)]),
    }
    return rows[PARTS.index(parts)]


def logits_after(cp: ControlPrefix, prompt: str, new: list[int], **parts: Any) -> torch.Tensor:
    ids = torch.tensor([cp.tokenizer(prompt)["input_ids"]])
    inputs = {"input_ids": torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)}
    if cp.model.config.is_encoder_decoder:
        start = [cp.model.config.decoder_start_token_id]
        inputs = {"input_ids": ids, "decoder_input_ids": torch.tensor([[*start, *new]])}
    with torch.no_grad(), cp.assembled(Request(prompt=prompt, raw=True, **parts)):
        return cp.model(**inputs).logits[0, -1]


def reference(cp: ControlPrefix, prompt: str, new: list[int], parts: dict[str, Any]) -> Any:
    base_parts, others = rows_of(parts)
    base = logits_after(cp, prompt, new, **base_parts)
    return base + sum(w * (logits_after(cp, prompt, new, **p) - base) for p, w in others)


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_greedy_tokens_are_those_of_the_formula(
    steered: ControlPrefix, parts: dict[str, Any]
) -> None:
    new: list[int] = []
    while len(new) < 8 and (not new or new[-1] != 1):
        base_parts, _ = rows_of(parts)
        base = logits_after(steered, "Hello", new, **base_parts)
        likely = base >= base.max() + math.log(0.01)  # others are ruled out
        result = reference(steered, "Hello", new, parts)
        new.append(int(torch.where(likely, result, -math.inf).argmax()))
    request = Request(prompt="Hello", raw=True, max_new_tokens=8, **parts)
    plain = Request(prompt="Bye", raw=True, max_new_tokens=8)
    (_, mixed, _) = steered.generate([plain, request, plain])
    output = [token for token in new if token != 1]
    expected = steered.tokenizer.decode(output, skip_special_tokens=True)
    assert steered.generate(request).text == mixed.text == expected
    named = {part.name: part.strength for part in mixed.parts}
    assert "tone=warm" in named or "ana" in named
    assert "".join(steered.stream(request)) == expected


@pytest.mark.parametrize("parts", PARTS)
def test_scores_are_those_of_the_formula(steered: ControlPrefix, parts: dict[str, Any]) -> None:
    completion = "ok then"
    ids = steered.tokenizer(completion)["input_ids"]
    expected = 0.0
    for i, token in enumerate(ids):
        logits = reference(steered, "Hello", ids[:i], parts).double()
        expected += float(logits.log_softmax(-1)[token])
    example = Example(prompt="Hello", raw=True, completion=completion, **parts)
    other = Example(prompt="Hi", raw=True, completion="x", user="ana")
    alone = steered.score([example])[0]
    mixed = steered.score([other, example, other])[1]
    assert alone.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert mixed.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert alone.num_tokens == len(ids)


@pytest.mark.slow
@given(weight=st.floats(-2, 2), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_negative_strengths_in_a_batch_give_what_they_give_alone(weight: float, seed: int) -> None:
    cp = _cp()
    request = Request(
        prompt="Hello",
        raw=True,
        user="ana",
        strengths={"user": weight},
        temperature=1.0,
        seed=seed,
        max_new_tokens=6,
    )
    others = [Request(prompt="Hi there", raw=True, task="note", max_new_tokens=9)] * 2
    assert cp.generate([others[0], request, others[1]])[1].text == cp.generate(request).text


_made: list[ControlPrefix] = []


def _cp() -> ControlPrefix:
    if not _made:
        _made.append(engine("llama"))
    return _made[0]


def test_guidance_is_refused_where_it_is_not_supported() -> None:
    cp = _cp()
    away = {"user": "ana", "strengths": {"user": -1.0}}
    with (
        pytest.raises(RequestError, match="use generate, stream or score"),
        cp.assembled(Request(prompt="x", **away)),
    ):
        pass
    with pytest.raises(RequestError, match="num_beams above 1 cannot be combined"):
        Request(prompt="x", num_beams=2, **away)
    with pytest.raises(RequestError, match="num_beams above 1 cannot be combined with mixing"):
        Request(prompt="x", num_beams=2, attributes={"tone": "warm"}, mixing="logits")
    with pytest.raises(RequestError, match="dials are calibrated for mixing='attention'"):
        Request(prompt="x", attributes={"tone": "warm"}, mixing="logits", calibrated=True)
    pair = {"task": "note", "attributes": {"tone": "warm"}, "mixing": "logits"}
    with pytest.raises(TrainingDataError, match="row 1 has mixing='logits'"):
        cp.train([Example(prompt="x", completion="y", **pair)], learn="task")
    with pytest.raises(TrainingDataError, match="row 1 has a strength below 0"):
        cp.train([Example(prompt="x", completion="y", task="note", **away)], learn="task")


def test_tokens_that_the_base_finds_implausible_are_not_chosen() -> None:
    base = torch.tensor([[5.0, 4.0, 0.0, -math.inf]])  # 1/100 of the likeliest is at 0.39
    away = torch.tensor([[5.0, 4.0, -90.0, 0.0]])
    combined = combined_logits(base, [away], [-3.0])
    assert combined[0, 2] == 270.0
    result = without_implausible(base, combined)
    assert result[0].isfinite().tolist() == [True, True, False, False]


def test_tokens_that_the_model_rules_out_stay_so() -> None:
    base, row = torch.tensor([0.0, -math.inf]), torch.tensor([1.0, -math.inf])
    combined = combined_logits(base, [row], [-1.0])
    assert combined.tolist() == [-1.0, -math.inf]
    assert without_implausible(base, combined).tolist() == [-1.0, -math.inf]


def test_a_weight_of_0_is_absent_with_logit_mixing_too() -> None:
    cp = _cp()
    absent = {"attributes": {"tone": {"warm": 0.0}}, "mixing": "logits"}
    request = Request(prompt="Hello", raw=True, max_new_tokens=6, **absent)
    plain = Request(prompt="Hello", raw=True, max_new_tokens=6)
    assert cp.generate(request).text == cp.generate(plain).text
    assert cp.resolve(request).num_rows == 1


def test_beams_and_schedules_cannot_be_combined_with_logit_mixing() -> None:
    for what in ({"num_beams": 2}, {"user": "ana", "schedules": {"user": [(0, 1.0)]}}):
        with pytest.raises(RequestError, match="cannot be combined with mixing"):
            Request(prompt="x", mixing="logits", **what)


def confident(**generation_config: Any) -> ControlPrefix:
    """A model that is as sure of its tokens as a trained one: few of them are plausible."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    for name, value in generation_config.items():
        setattr(model.generation_config, name, value)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    cp.put("attribute", "tone=warm", Prefix.random(cp.geometry, num_slots=2, seed=1))
    return cp


def in_both_engines(cp: ControlPrefix, **fields: Any) -> str:
    request = Request(
        prompt="hello", attributes={"tone": "warm"}, **{"max_new_tokens": 12, **fields}
    )
    with closing(cp.batcher()) as batcher:
        in_running_batch = batcher.submit(cp.resolve(request), top_log_probs=0)
        assert in_running_batch.result().text == cp.generate(request).text
        assert all(math.isfinite(token.log_prob) for token in in_running_batch.tokens)
    return in_running_batch.result().text


GUIDED: list[dict[str, Any]] = [{"strengths": {"tone": -1.0}}, {"mixing": "logits"}]


@pytest.mark.parametrize("guided", GUIDED, ids=str)
def test_guided_json_is_json(guided: dict[str, Any]) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    text = in_both_engines(confident(), json_schema=schema, max_new_tokens=40, **guided)
    assert isinstance(json.loads(text), list)


@pytest.mark.slow
@pytest.mark.parametrize("guided", GUIDED, ids=str)
def test_a_bias_chooses_and_bans_tokens_with_guidance_too(guided: dict[str, Any]) -> None:
    cp = confident()
    tokenizer = byte_tokenizer()
    (chosen,) = tokenizer.encode("x")
    assert in_both_engines(cp, logit_bias={chosen: 100.0}, **guided) == "x" * 12
    usual = tokenizer.encode(in_both_engines(cp, **guided))
    without = in_both_engines(cp, logit_bias=dict.fromkeys(usual, -100.0), **guided)
    assert not set(usual) & set(tokenizer.encode(without))


@pytest.mark.slow
@pytest.mark.parametrize("guided", [{}, *GUIDED], ids=str)
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"sequence_bias": {(50,): 5.0, (60,): 8.0}}, {"temperature": 2.0, "seed": 1}),
        ({"bad_words_ids": [[i] for i in range(40, 240)]}, {}),
        ({"renormalize_logits": True}, {"repetition_penalty": 0.8}),
        ({"max_time": 0.0}, {}),
        ({"no_repeat_ngram_size": 1}, {}),
        ({"forced_eos_token_id": 1}, {"json_schema": {"type": "object"}, "max_new_tokens": 3}),
        (
            {"watermarking_config": WatermarkingConfig(bias=50.0, seeding_scheme="lefthash")},
            {"temperature": 0.8, "seed": 1},
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_generation_config_means_the_same_in_every_engine(
    guided: dict[str, Any], config: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert in_both_engines(confident(**config), **fields, **guided)


@pytest.mark.parametrize("guided", [{}, *GUIDED], ids=str)
def test_guided_requests_without_allowed_tokens_are_errors_of_their_own(
    guided: dict[str, Any],
) -> None:
    cp = confident(
        suppress_tokens=[token for word in "tf" for token in byte_tokenizer().encode(word)]
    )
    own = Request(
        prompt="hello", attributes={"tone": "warm"}, json_schema={"type": "boolean"}, **guided
    )
    plain = Request(prompt="hello", max_new_tokens=4)
    with pytest.raises(ModelOutputError):
        cp.generate(own)
    with closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(request)) for request in (own, plain)]
        with pytest.raises(ModelOutputError):
            tickets[0].result()
        assert tickets[1].result().text == cp.generate(plain).text


@pytest.mark.slow
def test_a_finished_row_is_not_an_error_while_others_go_on() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = build("llama", pad_token_id=tokenizer.eos_token_id)
    model.generation_config.no_repeat_ngram_size = 3  # which rules paddings out
    cp = ControlPrefix.from_pretrained(model, tokenizer=tokenizer, store="sqlite://")
    short = Request(prompt="Hello", raw=True, max_new_tokens=20, json_schema={"type": "boolean"})
    long = Request(prompt="Hello you", raw=True, max_new_tokens=30)
    expected = [cp.generate(request).text for request in (short, long)]
    assert [completion.text for completion in cp.generate([short, long])] == expected


def test_a_request_whose_tokens_are_all_ruled_out_is_an_error() -> None:
    cp = confident(suppress_tokens=list(range(300)))
    request = Request(prompt="hello", attributes={"tone": "warm"}, temperature=1.0)
    with pytest.raises(ModelOutputError, match="rule out every token"):
        cp.generate(request)
    with closing(cp.batcher()) as batcher:
        with pytest.raises(ModelOutputError, match="rule out every token"):
            batcher.submit(cp.resolve(request)).result()
