"""OpenAI's API in detail: what clients send and expect, beyond a plain completion."""

import json
import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import ControlPrefix, Example, Prefix, Request
from controlprefix.inference.runner import TokenLogProbs
from controlprefix.model.token_bytes import TokenBytes
from controlprefix.serving import Server, ServerLimits, create_app
from controlprefix.serving.log_probs import text_log_probs
from controlprefix.store import PrefixStore

from helpers import Instance, frozen
from models import build, byte_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer
from servers import MODEL, TOKENIZER, Served, fill, wait_for

MESSAGES: Any = [{"role": "user", "content": "Tell Sam."}]


def chat(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields}
    return httpx.post(f"{served.base}/v1/chat/completions", json=body, timeout=60)


def complete(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, **fields}
    return httpx.post(f"{served.base}/v1/completions", json=body, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    data = [
        line.removeprefix("data: ")
        for line in response.text.splitlines()
        if line.startswith("data: ") and line != "data: [DONE]"
    ]
    return [json.loads(line) for line in data]


# --- fields --------------------------------------------------------------------------------------


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
            steered = chat(served, user="ana", **fields).json()
            assert [part["name"] for part in steered["parts"]] == ["ana"]
            wrong = chat(served, user="an", attributes={"tone": "wrm"}, **fields)
            assert wrong.status_code == 404
            assert "warm" in wrong.text
        finally:
            served.close()


def test_sampling_defaults_are_those_of_the_generation_config(store: str) -> None:
    model = build("llama")
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7)
    frozen_model = frozen(model, TOKENIZER)
    assert frozen_model.sampling_defaults == {"temperature": 0.5, "top_k": 7}
    gateway = Server(
        frozen_model, "sqlite://", name="tiny", open_tenant="x", sampling_defaults={"top_p": 0.9}
    )
    assert gateway.sampling_defaults == {"temperature": 0.5, "top_k": 7, "top_p": 0.9}
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


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_bytes_of_tokens_joined_are_the_text(served: Served, seed: int) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 24, "temperature": 1, "seed": seed}
    (choice,) = chat(served, **fields).json()["choices"]
    content = choice["logprobs"]["content"]
    special = TOKENIZER.all_special_tokens  # left out of the text
    joined = b"".join(bytes(t["bytes"]) for t in content if t["token"] not in special)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    for token in content:
        assert token["token"].encode() == bytes(token["bytes"]) or token["token"][:6] == "bytes:"
    streamed = [
        token
        for event in events(chat(served, stream=True, **fields))
        for choice in event["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_streamed_log_probabilities_come_with_their_text(served: Served) -> None:
    fields = {"logprobs": True, "max_tokens": 24, "temperature": 0}
    text = tokens = b""
    num_chunks_with_both = 0
    for event in events(chat(served, stream=True, **fields)):
        (choice,) = event["choices"]
        text += choice["delta"].get("content", "").encode()
        own = (choice["logprobs"] or {"content": []})["content"]
        tokens += b"".join(bytes(token["bytes"]) for token in own)
        assert len(tokens) <= len(text) or choice["finish_reason"]
        num_chunks_with_both += bool(own and choice["delta"].get("content"))
    assert num_chunks_with_both > 5


def test_text_log_probabilities_have_offsets_and_no_collisions(served: Served) -> None:
    fields = {"logprobs": 5, "max_tokens": 24, "temperature": 1.0, "seed": 3}
    (choice,) = complete(served, **fields).json()["choices"]
    log_probs = choice["logprobs"]
    for token, top, value, offset in zip(*(log_probs[name] for name in (
        "tokens", "top_logprobs", "token_logprobs", "text_offset")), strict=True):  # fmt: skip
        assert len(top) in (5, 6)
        assert top[token] == value
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    streamed = events(complete(served, stream=True, **fields))
    parts = [e["choices"][0]["logprobs"] for e in streamed if e["choices"][0]["logprobs"]]
    for name, values in log_probs.items():
        assert [x for part in parts for x in part[name]] == values


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_tokenizer(), "a 😀 日本\r\n x"),
        (sentencepiece_tokenizer(), "the é 😀 ab\n"),
        (wordpiece_tokenizer(), "hello we don"),
    ],
)
def test_token_bytes_of_each_kind_of_tokenizer(tokenizer: Any, text: str) -> None:
    names = TokenBytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(names, ids)).decode().strip() == text.strip()
    assert names(tokenizer.vocab_size + 1000) == b""


# --- text completions ----------------------------------------------------------------------------


def test_token_ids_and_echo_give_the_scores_of_the_library(served: Served, store: str) -> None:
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant="mine"))
    text = "abc defg"
    ids = list(cp.frozen_model.request_tokenizer.prompt_ids(Request(prompt=text, raw=True)))
    fields: dict[str, Any] = {"user": "ana", "attributes": {"tone": "warm"}}
    for prompt in (text, ids, [text], [ids]):
        answer = complete(
            served, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, **fields
        ).json()["choices"][0]
        log_probs = answer["logprobs"]["token_logprobs"]
        assert log_probs[0] is None
        assert len(log_probs) == len(ids) + 1
        assert answer["text"].startswith(text)
        # as lm-evaluation-harness reads a loglikelihood: the prompt's tokens after the context
        example = Example(prompt=text[:3], raw=True, completion=text[3:], **fields)
        num_context = len(ids) - len(text[3:])
        expected = cp.score([example])[0].log_likelihood
        assert sum(log_probs[num_context:-1]) == pytest.approx(expected, abs=1e-4)
    same = complete(served, prompt=ids, max_tokens=6, temperature=0).json()["choices"]
    assert same == complete(served, prompt=text, max_tokens=6, temperature=0).json()["choices"]
    cp.store.close()


def test_log_probabilities_of_prompts_are_bounded_in_memory(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.gateway, "_max_echo_tokens", 4)
    assert complete(served, prompt="abcd", echo=True, logprobs=1).status_code == 200
    assert complete(served, prompt="abcde", echo=True).status_code == 200
    refused = complete(served, prompt=["a", "abcde"], echo=True, logprobs=1)
    assert refused.status_code == 400
    assert "5 tokens" in refused.text


def test_echo_in_streams_and_without_new_tokens(served: Served) -> None:
    nothing = complete(served, prompt=["abc", "de"], echo=True, logprobs=0, max_tokens=0).json()
    assert [choice["text"] for choice in nothing["choices"]] == ["abc", "de"]
    assert nothing["usage"]["completion_tokens"] == 0
    assert [len(c["logprobs"]["tokens"]) for c in nothing["choices"]] == [3, 2]
    fields = {"echo": True, "max_tokens": 5, "logprobs": 2, "temperature": 0, "n": 2}
    whole = complete(served, **fields).json()["choices"]
    streamed = events(complete(served, stream=True, **fields))
    for i, choice in enumerate(whole):
        own = [e["choices"][0] for e in streamed if e["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in own) == choice["text"]
        tokens = [t for part in own if part["logprobs"] for t in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        offsets = [t for part in own if part["logprobs"] for t in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
    prompts: list[Any] = [[], [[]], [1, -2], [999_999], ["a", [1]]]
    for wrong in prompts:
        refused = complete(served, prompt=wrong)
        assert refused.status_code == 400
        assert "constrained" not in refused.text


# --- JSON, and the Responses API -----------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


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


def test_origins_are_allowed_by_name_alone(store: str, served: Served) -> None:
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{served.base}/v1/models", headers=ask).status_code == 405
    gateway = Server(frozen(MODEL, TOKENIZER), store, name="tiny")
    from fastapi.testclient import TestClient

    with TestClient(create_app(gateway, allow_origins=["https://app.example"])) as client:
        allowed = client.options("/v1/chat/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = client.options("/v1/chat/completions", headers={**ask, "Origin": "https://x.org"})
        assert "access-control-allow-origin" not in other.headers
        # errors too, or a page could not read them
        refused = client.get("/v1/models", headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_streams_pass_proxies(served: Served) -> None:
    headers = chat(served, stream=True).headers
    assert headers["x-accel-buffering"] == "no"
    assert "no-cache" in headers["cache-control"]
    assert headers["content-type"].startswith("text/event-stream")


def test_pages_need_no_other_server(served: Served) -> None:
    for path in ("/", "/docs", "/redoc"):
        page = httpx.get(served.base + path)
        assert page.status_code == 200
        assert not re.search(r"(?:src|href)=\"https?://", page.text)
        for source in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", page.text):
            assert httpx.get(served.base + source).status_code in (200, 307, 401)
    version = httpx.get(f"{served.base}/version").json()
    assert version["model"] == "tiny"
    assert version["fingerprint"] == frozen(MODEL, TOKENIZER).fingerprint


def test_the_schema_says_which_errors_there_are(served: Served) -> None:
    schema = httpx.get(f"{served.base}/openapi.json").json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert "security" not in operation  # this server needs no keys
    wrong = httpx.get(f"{served.base}/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"


def test_requests_are_logged_without_texts_or_users(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="controlprefix.requests"):
        chat(served, user="ana", messages=[{"role": "user", "content": "SECRET"}])
        httpx.get(f"{served.base}/v1/users/ana")
        chat(served, stream=True)
        wait_for(lambda: len(caplog.records) == 3)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["path"] for line in lines] == [
        "/v1/chat/completions", "/v1/users/{user:path}", "/v1/chat/completions",
    ]  # fmt: skip
    assert lines[0]["tenant"] == "mine"
    for line in (lines[0], lines[2]):
        assert line["completion_tokens"] > 0
        assert line["first_text_s"] <= line["seconds"]
    assert "SECRET" not in caplog.text
    assert "ana" not in caplog.text


def test_a_departure_is_noticed_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 100}
    forward = served.batcher._forward

    def slow(*args: Any, **inputs: Any) -> Any:
        time.sleep(0.2)
        return forward(*args, **inputs)

    monkeypatch.setattr(served.batcher, "_forward", slow)
    at = f"{served.base}/v1/chat/completions"

    def abandon() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(at, json=body, timeout=httpx.Timeout(5, read=0.5))

    thread = threading.Thread(target=abandon)
    thread.start()
    wait_for(lambda: served.batcher.load[0] == 1)
    thread.join()
    start = time.monotonic()
    wait_for(lambda: served.batcher.load == (0, 0))
    assert time.monotonic() - start < 5


def test_a_thousand_tenants_hold_no_more_than_ten(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    first = PrefixStore(url, tenant="t0")
    geometry = frozen(MODEL, TOKENIZER).geometry
    for i in range(12):
        store = first.for_tenant(f"t{i}")
        ControlPrefix(frozen(MODEL, TOKENIZER), store).put(
            "user", "ana", Prefix.random(geometry, num_slots=3, scale=2.0, seed=i)
        )
    gateway = Server(frozen(MODEL, TOKENIZER), url, name="tiny")
    tenants = gateway._tenants
    request = Request(prompt="abc", raw=True, user="ana", max_new_tokens=4)
    texts = set()
    for i in range(1000):
        engine = tenants._engine(f"t{i}")
        if i < 12:
            resolved = engine.resolve(request)
            assert resolved.parts[0].part.prefix.digest
            texts.add(resolved.digest)
        else:
            assert not engine.exists("user", "ana")
    assert len(texts) == 12  # each its own, from one cache
    assert len(tenants._engines) <= 256
    connections = {id(e.store._database._connections) for e in tenants._engines.values()}
    assert connections == {id(tenants._store._database._connections)}
    assert tenants._caches.prefixes.size_bytes < 12 * 3 * 4096
    assert tenants._engine("t3").resolve(request).digest in texts
    gateway.close()
    first.close()


def test_tokens_of_a_key_are_limited_and_those_of_others_are_not(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    first, other = (PrefixStore(url, tenant=name) for name in ("mine", "theirs"))
    keys = [first.create_api_key("a"), first.create_api_key("b"), other.create_api_key("a")]
    served = Served(url, limits=ServerLimits(tokens_per_minute=60))
    clients = [served.client(key) for key in keys]

    def ask(client: openai.OpenAI, **fields: Any) -> Any:
        return client.completions.create(
            model="tiny",
            prompt="abc",
            max_tokens=30,
            temperature=0,
            logit_bias={"1": -100},
            **fields,
        )

    try:
        for _ in range(2):  # 33 tokens each
            assert ask(clients[0]).usage.total_tokens == 33
        with pytest.raises(openai.RateLimitError, match="60 per minute") as caught:
            ask(clients[0])
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
        assert clients[0].models.list().data  # what costs no tokens goes on
        stream = ask(clients[1], stream=True, n=2)
        next(iter(stream))
        stream.close()  # abandoned: 2 x 30 tokens
        limiter = served.gateway._token_limiter
        wait_for(lambda: not limiter._limiter.test(limiter._item, "mine", "b"))
        with pytest.raises(openai.RateLimitError):
            ask(clients[1])
        assert ask(clients[2]).usage.total_tokens == 33
    finally:
        served.close()
        first.close()
        other.close()


def test_pages_versions_and_rollback_over_http(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    fill(url, "mine", 2.0)
    served = Served(url, open_tenant="mine")
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(url, tenant="mine"))
    for i, name in enumerate(("Zoe", "bob", "ábel", "ana")):
        cp.put("user", name, Prefix.random(cp.geometry, num_slots=2, seed=i))
    try:
        users = f"{served.base}/v1/users"
        mistyped = httpx.get(users, params={"limt": 2})
        assert mistyped.status_code == 400
        assert mistyped.json()["error"]["message"] == (
            "unknown query parameter 'limt'; this route has: after, limit"
        )
        names: list[str] = []
        while True:
            after = names[-1] if names else ""
            page = httpx.get(users, params={"after": after, "limit": 2}).json()
            names += page["users"]
            if not page["has_more"]:
                break
        assert names == sorted(["Zoe", "bob", "ábel", "ana"])
        assert [v["current"] for v in httpx.get(f"{users}/ana").json()["versions"]] == [False, True]
        rolled = httpx.post(f"{users}/ana/rollback", json={"to": 1}).json()
        assert [v["current"] for v in rolled["versions"]] == [True, False]
        label = f"{served.base}/v1/prefixes/attribute/tone=warm"
        assert httpx.put(f"{label}/aliases/canary", json={"to": 1}).json()["versions"][0][
            "aliases"
        ] == ["canary"]
        assert httpx.post(f"{label}/rollback", json={"to": "canary"}).status_code == 200
        assert httpx.post(f"{label}/rollback", json={"to": 9}).status_code == 404
        assert httpx.get(f"{served.base}/v1/prefixes/task").json()["names"] == ["email"]
        assert httpx.get(f"{served.base}/v1/models/tiny/email").status_code == 200
        assert httpx.delete(f"{served.base}/v1/prefixes/task/email").json()["num_versions"] == 1
        assert httpx.get(f"{served.base}/v1/models/tiny/email").status_code == 404
        assert httpx.get(f"{served.base}/v1/prefixes/user/ana").status_code == 400
    finally:
        served.close()
        cp.store.close()


def test_lm_evaluation_harness_gets_the_scores_of_the_library(
    served: Served, store: str, tmp_path: Path
) -> None:
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("aiohttp")
    pytest.importorskip("tenacity")
    TOKENIZER.save_pretrained(tmp_path)
    lm = completions.LocalCompletionsAPI(
        base_url=f"{served.base}/v1/completions",
        model="tiny/email",
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        batch_size=2,
        max_length=256,
    )
    texts = [("The sky is", " blue"), ("Two and", " two are four"), ("So it", " goes")]
    requests: Any = [Instance(*pair) for pair in texts]
    values = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant="mine"))
    examples = [Example(prompt=c, raw=True, completion=t, task="email") for c, t in texts]
    assert values == pytest.approx([s.log_likelihood for s in cp.score(examples)], abs=1e-3)
    cp.store.close()


def test_the_clients_of_the_example_that_are_installed_get_texts(served: Served) -> None:
    script = Path(__file__).parent.parent / "examples" / "clients.py"
    command = [sys.executable, str(script), f"{served.base}/v1", "tiny", "--user", "ana"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()[2:]
    assert len(rows) >= 3
    assert not [row for row in rows if "**" in row]


def test_feedback_is_kept_for_training(served: Served) -> None:
    def send(**body: Any) -> httpx.Response:
        return httpx.post(f"{served.base}/v1/feedback", json=body, timeout=60)

    pair = {"user": "zoe", "prompt": "Tell Sam.", "chosen": "hey", "rejected": "Dear Sam"}
    first = send(**pair)
    assert first.status_code == 201
    assert first.json() == {"user": "zoe", "num_kept": 1}
    changed = send(user="zoe", messages=MESSAGES, task="note", draft="Dear Sam", final="hi Sam")
    assert changed.json()["num_kept"] == 2
    with PrefixStore(served.url, tenant="mine") as store:
        entries = [json.loads(text) for text in store.feedback("zoe")]
    assert entries[1]["chosen"] == "hi Sam"
    assert entries[1]["rejected"] == "Dear Sam"
    assert entries[1]["task"] == "note"
    for wrong, message in (
        ({**pair, "chosen": "Dear Sam"}, "the same text"),
        ({**pair, "draft": "x", "final": "y"}, "give chosen and rejected, or draft and final"),
        ({"user": "zoe", "prompt": "Tell Sam.", "draft": "x"}, "draft and final"),
        ({**pair, "prompt": None}, "give one of prompt, messages"),
        ({**pair, "rating": 5}, "rating"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "user"),
    ):
        answer = send(**wrong)
        assert answer.status_code == 400, wrong
        assert message in answer.json()["error"]["message"]
    httpx.delete(f"{served.base}/v1/users/zoe")


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


def test_times_of_versions_say_that_they_are_in_utc(served: Served) -> None:
    (version,) = httpx.get(f"{served.base}/v1/users/ana").json()["versions"]
    assert version["created_at"].endswith("+00:00")


def test_tokens_of_one_text_are_told_apart() -> None:
    names: Any = SimpleNamespace(text=lambda _: "a", in_text=lambda _: b"a")
    token = TokenLogProbs(5, -1.0, ((7, -0.5), (5, -1.0)))
    assert text_log_probs([token], names).top_logprobs == [{"a": -1.0, "token_id:7": -0.5}]
