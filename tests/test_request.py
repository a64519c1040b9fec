"""Requests and data files: what is refused, and what the message says."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from controlprefix import Example, Request, RequestError, TrainingDataError
from controlprefix.data import as_examples, read_texts
from controlprefix.request_fields import RequestFields
from controlprefix.training import RunControl, TrainingOptions, TrainingSettings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of prompt, messages and prompt_ids"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "give one of prompt"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages have no text"),
        ({"prompt": "x", "max_tokens": 3}, "unknown field 'max_tokens'.*mean 'max_new_tokens'"),
        ({"prompt": "x", "attributes": {"tone": {"warm": math.nan}}}, "of 'tone=warm' is nan"),
        ({"prompt": "x", "attributes": {"tone": {}}}, "attribute 'tone' names no label"),
        (
            {"prompt": "x", "attributes": {"tone": ["warm"]}},
            "a label of 'tone' must be a text",
        ),
        ({"prompt": "x", "attributes": {"q=r": "s"}}, "'q=r' cannot be the name of an attribute"),
        ({"prompt": "x", "attributes": {"user": "s"}}, "'user' cannot be the name"),
        ({"prompt": "x\ud800"}, "half a surrogate pair"),
        ({"prompt": "x", "user": "\udfff"}, "half a surrogate pair"),
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"prompt": "x", "strengths": {"user": math.inf}}, "strength of 'user' is inf"),
        (
            {"prompt": "x", "num_beams": 2, "attributes": {"tone": {"warm": -1}}},
            "strengths below 0",
        ),
        ({"prompt": "x", "strengths": {"tone": 1}}, "it can name: task, user"),
        (
            {"prompt": "x", "temperature": 1e-4},
            "temperature: Input should be greater than or equal to 0.001",
        ),
        ({"prompt": "x", "top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x", "num_beams": 2, "temperature": 1.0}, "does not sample"),
        ({"prompt": "x", "stop": [""]}, "empty text"),
        ({"messages": [{"role": "user", "content": "x"}], "raw": True}, "raw continues a prompt"),
    ],
)
def test_requests_that_cannot_be_carried_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**fields)
    with pytest.raises(ValidationError):  # as pydantic users, such as web frameworks, expect it
        Request.model_validate(fields)


def test_the_options_of_generate_are_the_fields_of_a_request() -> None:
    assert RequestFields.__annotations__.keys() == Request.model_fields.keys() - {
        "prompt",
        "prompt_ids",
        "messages",
    }


def test_the_options_of_train_are_the_fields_of_its_settings() -> None:
    names = {
        field.name for kind in (TrainingSettings, RunControl) for field in dataclasses.fields(kind)
    }
    assert TrainingOptions.__annotations__.keys() == names


def test_a_message_never_repeats_a_prompts_text() -> None:
    with pytest.raises(RequestError) as caught:
        Request(prompt="my secret", top_p=7, unknown="another secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x"}, "completion: Field required"),
        ({"prompt": "x", "completion": " "}, "the completion is empty"),
        ({"prompt": "", "completion": "y"}, "the prompt is empty"),
        ({"completion": "y"}, "give one of prompt, messages and prompt_ids"),
    ],
)
def test_examples_that_cannot_be_learned_from(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        Example(**fields)


def test_a_raw_example_may_be_a_text_of_its_own() -> None:
    assert Example(prompt="", raw=True, completion="y").prompt == ""


def test_data_files_name_the_line_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps({"prompt": "x", "completion": "y"})
    path.write_text(f"{good}\n\n{good}\n")
    assert [e.task for e in as_examples(path, defaults={"task": "email"})] == ["email", "email"]
    for bad, message in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"prompt": "x"}', "line 2: completion: Field required"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(TrainingDataError, match=message):
            as_examples(path)
    separators = {"prompt": "a\u2028b\x85c", "completion": "y"}
    path.write_text(json.dumps(separators, ensure_ascii=False), encoding="utf-8-sig")
    assert as_examples(path)[0].prompt == separators["prompt"]
    path.write_text('{"prompt": ' + "9" * 5000 + "}")
    with pytest.raises(TrainingDataError, match="line 1: not JSON"):
        as_examples(path)
    path.write_text("\n")
    with pytest.raises(TrainingDataError, match="has no examples"):
        as_examples(path)
    with pytest.raises(TrainingDataError, match="no text in"):
        read_texts([path.rename(tmp_path / "data.txt")])
    with pytest.raises(TrainingDataError, match="cannot read"):
        as_examples(tmp_path / "missing.jsonl")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainingDataError, match="cannot read"):
        as_examples(path)


def test_a_temperature_of_zero_is_greedy_whatever_else_is_set() -> None:
    request = Request(prompt="x", temperature=0, top_p=0.9, top_k=5, num_beams=2)
    assert not request.do_sample
    assert request == Request(prompt="x", num_beams=2)


def test_names_are_composed_as_keys_are() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    request = Request(
        prompt="Hi",
        attributes={decomposed: {decomposed: 1.0}},
        strengths={decomposed: 0.5},
        schedules={decomposed: ((0, 1.0),)},
    )
    assert request.attributes == {composed: {composed: 1.0}}
    assert list(request.strengths) == list(request.schedules) == [composed]
    with pytest.raises(RequestError, match="named twice"):
        Request(prompt="Hi", attributes={composed: "x", decomposed: "y"})


def test_a_request_may_be_an_image_alone() -> None:
    image = b"not read before it is used"
    request = Request(prompt="", images=[image])
    assert request.images == (image,)
    message = {"role": "user", "content": "", "images": [image]}
    assert Request(messages=[message]).messages
    assert Request(messages=[{"role": "user", "content": ""}], images=[image]).messages
