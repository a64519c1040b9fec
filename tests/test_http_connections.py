"""Browsers, proxies, pages, the request log and clients that leave."""

import json
import logging
import re
import threading
import time
from typing import Any

import httpx
import pytest

from controlprefix.serving import Server, create_app, responder

from helpers import frozen
from servers import (
    MESSAGES,
    MODEL,
    TOKENIZER,
    Served,
    chat,
    wait_for,
)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_stream_begins_before_a_late_first_text(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    at = f"{served.base}/v1/chat/completions"
    expected = httpx.post(at, json={**body, "stream": False}, timeout=60).json()
    may_begin = threading.Event()
    forward = served.batcher._forward

    def late(*args: Any, **inputs: Any) -> Any:
        may_begin.wait(60)
        return forward(*args, **inputs)

    monkeypatch.setattr(served.batcher, "_forward", late)
    monkeypatch.setattr(responder, "_KEEP_ALIVE_S", 0.1)
    with httpx.stream("POST", at, json=body, timeout=10) as response:
        assert response.status_code == 200  # the head came without a text
        may_begin.set()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if "{" in line]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == expected["choices"][0]["message"]["content"]


@pytest.mark.slow
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
