"""OpenAI's API in detail: what clients send and expect, beyond a plain completion."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlprefix import ControlPrefix
from controlprefix.serving import Server, create_app
from controlprefix.serving.bodies import TextBody
from controlprefix.store import PrefixStore

from helpers import frozen
from models import build, byte_tokenizer
from servers import (
    MESSAGES,
    TOKENIZER,
    Served,
    chat,
    complete,
    events,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "field",
    [
        "temperature", "n", "stream", "presence_penalty", "frequency_penalty", "logprobs",
        "top_logprobs", "top_p", "stop", "seed", "user", "max_tokens", "logit_bias", "attributes",
        "strengths", "schedules", "tools", "response_format", "chat_template_kwargs", "unheard_of",
    ],
)  # fmt: skip
def test_null_counts_as_left_out(served: Served, field: str) -> None:
    assert chat(served, **{field: None}).status_code == 200


@pytest.mark.parametrize("top_k", [-1, 0])
def test_all_tokens_are_no_limit_also_beside_a_default(top_k: int) -> None:
    body = TextBody.model_validate({"model": "m", "prompt": "x", "top_k": top_k})
    defaults = {"temperature": 0.5, "top_k": 20}
    (request,) = body.to_requests(
        "m", [{"prompt": "x"}], 8, defaults, default_limit=8, max_tokens=None
    )
    assert (request.temperature, request.top_k) == (0.5, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1}, {"top_k": 0}, {"top_p": 0}, {"stop": ""}, {"stop": ["", "x"]},
        {"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"tools": []},
        {"tool_choice": "auto"}, {"max_tokens": -1}, {"metadata": {"a": "b"}, "store": False},
        {"reasoning_effort": "low", "verbosity": "low", "service_tier": "auto"},
        {"stop": [f"s{i}" for i in range(17)]},
    ],
)  # fmt: skip
def test_values_that_ask_for_nothing_are_taken(served: Served, fields: dict[str, Any]) -> None:
    assert chat(served, **fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attributs": {"tone": "warm"}}, "unknown field 'attributs'; did you mean 'attributes'?"),
        ({"strength": {"user": 1}}, "did you mean 'strengths'?"),
        ({"min_tokens": 3}, "unknown field 'min_tokens'"),
        ({"extra_body": {"attribute": {"tone": "warm"}}}, "did you mean 'attributes'?"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tools are not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: give a text, or a list of"),
    ],
)
def test_fields_that_mean_something_else_are_refused(
    served: Served, fields: dict[str, Any], message: str
) -> None:
    response = chat(served, **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_literal_extra_body_is_unwrapped(served: Served) -> None:
    fields = {"temperature": 0, "max_tokens": 12}
    steered = chat(served, **fields, attributes={"tone": "warm"}, user="ana").json()
    wrapped = {"attributes": {"tone": "warm"}, "user": "ana"}
    assert chat(served, **fields, extra_body=wrapped).json()["choices"] == steered["choices"]


@pytest.mark.slow
def test_a_limit_that_was_left_out_fits_the_context(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    model, tokenizer = build("llama", max_position_embeddings=64), byte_tokenizer(chat=True)
    gateway = Server(frozen(model, tokenizer), url, name="tiny", open_tenant="mine")
    cp = ControlPrefix(frozen(model, tokenizer), PrefixStore("sqlite://"))
    try:
        from fastapi.testclient import TestClient

        with TestClient(create_app(gateway), base_url="http://localhost") as client:

            def ask(content: str, **fields: Any) -> Any:
                messages = [{"role": "user", "content": content}]
                body = {"model": "tiny", "messages": messages, "temperature": 0, **fields}
                return client.post("/v1/chat/completions", json=body)

            answer = ask("a" * 20).json()
            usage = answer["usage"]
            assert usage["prompt_tokens"] + usage["completion_tokens"] <= 64
            assert answer["choices"][0]["message"]["content"] == cp.generate("a" * 20).text
            for refused in (ask("a" * 20, max_tokens=60), ask("a" * 70)):
                assert refused.status_code == 400
                assert refused.json()["error"]["code"] == "context_length_exceeded"
    finally:
        cp.store.close()


@pytest.mark.slow
def test_unknown_users_are_refused_without_naming_others_or_served_plainly(store: str) -> None:
    for mode in ("refuse", "plain"):
        served = Served(store, open_tenant="mine", unknown_users=mode)
        try:
            fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "strengths": {"user": 0.5}}
            response = chat(served, user="an", **fields)
            if mode == "refuse":
                assert response.status_code == 404
                assert "ana" not in response.text
                continue
            assert response.json()["parts"] == []
            plain = chat(served, temperature=0, max_tokens=8).json()
            assert response.json()["choices"] == plain["choices"]
            # No prefix is left whose relevance could be asked for.
            assert chat(served, user="an", when="relevant", **fields).json()["parts"] == []
            steered = chat(served, user="ana", **fields).json()
            assert [part["name"] for part in steered["parts"]] == ["ana"]
            wrong = chat(served, user="an", attributes={"tone": "wrm"}, **fields)
            assert wrong.status_code == 404
            assert "warm" in wrong.text
        finally:
            served.close()


@pytest.mark.slow
def test_sampling_defaults_are_those_of_the_generation_config(store: str) -> None:
    model = build("llama")
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7)
    frozen_model = frozen(model, TOKENIZER)
    assert frozen_model.sampling_defaults == {"temperature": 0.5, "top_k": 7}
    gateway = Server(
        frozen_model, "sqlite://", name="tiny", open_tenant="x", sampling_defaults={"top_p": 0.9}
    )
    assert gateway.sampling_defaults == {"temperature": 0.5, "top_k": 7, "top_p": 0.9}
    cold = Server(
        frozen_model,
        "sqlite://",
        name="tiny",
        open_tenant="x",
        sampling_defaults={"temperature": 1e-5},
    )
    assert cold.sampling_defaults["temperature"] == 1e-3  # as of requests
    cold.close()
    gateway.close()
    served = Served(store, open_tenant="mine", sampling_defaults={"temperature": 0.7})
    try:
        first, other, same = (
            chat(served, max_tokens=20, **fields).json()["choices"]
            for fields in ({"seed": 1}, {"seed": 1, "temperature": 1.4}, {"seed": 1})
        )
        assert first == same != other
        greedy = chat(served, max_tokens=20, temperature=0).json()["choices"]
        assert greedy == chat(served, max_tokens=20, temperature=0, seed=4).json()["choices"]
        assert greedy != first
    finally:
        served.close()


def test_answers_name_the_prefixes_and_versions_that_wrote_them(served: Served) -> None:
    fields = {"model": "tiny/email", "user": "ana", "attributes": {"tone": {"warm": 0.5}}}
    expected = [
        {"kind": "task", "name": "email", "version": 1, "strength": 1.0},
        {"kind": "attribute", "name": "tone=warm", "version": 1, "strength": 0.5},
        {"kind": "user", "name": "ana", "version": 1, "strength": 1.0},
    ]
    assert chat(served, **fields).json()["parts"] == expected
    assert complete(served, **fields).json()["parts"] == expected
    last = events(chat(served, stream=True, **fields))[-1]
    assert last["parts"] == expected


# --- log-probabilities ---------------------------------------------------------------------------


# --- text completions ----------------------------------------------------------------------------


# --- JSON, and the Responses API -----------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_json_output_in_each_form(served: Served) -> None:
    client = served.client()
    schema_format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    completion = client.chat.completions.create(
        model="tiny", messages=MESSAGES, user="ana", response_format=schema_format
    )
    assert json.loads(completion.choices[0].message.content or "").keys() == {"ok"}
    text_format: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = client.responses.create(model="tiny", input="hi", text=text_format)
    assert json.loads(response.output_text).keys() == {"ok"}
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}
    refused = chat(served, response_format=wrong)
    assert refused.status_code == 400
    assert "JSON schema" in refused.text


@pytest.mark.slow
def test_the_responses_api_writes_what_chat_writes(served: Served) -> None:
    client = served.client()
    fields: Any = {"model": "tiny/email", "user": "ana", "temperature": 0}
    messages: Any = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    whole = client.chat.completions.create(messages=messages, max_tokens=12, **fields)
    response = client.responses.create(
        instructions="Be kind.", input=MESSAGES, max_output_tokens=12, **fields
    )
    assert response.output_text == whole.choices[0].message.content
    assert response.usage is not None
    assert whole.usage is not None
    assert response.usage.total_tokens == whole.usage.total_tokens
    is_cut = whole.choices[0].finish_reason == "length"
    assert response.status == ("incomplete" if is_cut else "completed")
    types = []
    with client.responses.stream(
        instructions="Be kind.", input=MESSAGES, max_output_tokens=12, **fields
    ) as stream:
        for event in stream:
            types.append(event.type)
    assert types[0] == "response.created"
    assert types[-1] in ("response.completed", "response.incomplete")
    deltas = client.responses.create(
        instructions="Be kind.", input=MESSAGES, max_output_tokens=12, stream=True, **fields
    )
    texts = [event.delta for event in deltas if event.type == "response.output_text.delta"]
    assert "".join(texts) == response.output_text
    bodies: list[dict[str, Any]] = [
        {"input": []},
        {"input": "x", "previous_response_id": "y"},
        {},
    ]
    for wrong in bodies:
        body = {"model": "tiny", **wrong}
        assert httpx.post(f"{served.base}/v1/responses", json=body).status_code == 400


# --- browsers, proxies, and operators -------------------------------------------------------------


@pytest.mark.slow
def test_the_clients_of_the_example_that_are_installed_get_texts(served: Served) -> None:
    script = Path(__file__).parent.parent / "examples" / "clients.py"
    command = [sys.executable, str(script), f"{served.base}/v1", "tiny", "--user", "ana"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()[2:]
    assert len(rows) >= 3
    assert not [row for row in rows if "**" in row]


def test_fields_of_the_library_are_told_where_they_are_here(served: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}

    def message(**fields: Any) -> str:
        answer = httpx.post(f"{served.base}/v1/chat/completions", json={**body, **fields})
        assert answer.status_code == 400
        return str(answer.json()["error"]["message"])

    assert "name the task in model" in message(task="email")
    assert "give response_format" in message(json_schema={})
    assert "unknown field 'foo'" in message(foo={})
    url = f"{served.base}/v1/chat/completions"
    answer = httpx.post(url, content=b"{bad", headers={"Content-Type": "application/json"})
    assert "the body is no JSON" in answer.json()["error"]["message"]
    answer = httpx.post(url, content=b'{"model": "tiny"}')
    assert "Content-Type: application/json" in answer.json()["error"]["message"]
