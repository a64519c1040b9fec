"""Bodies: their size, their mistakes, and when they are parsed."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import starlette.requests

from controlprefix.errors import ModelNotFoundError
from controlprefix.model.special_tokens import TextTokenizer
from controlprefix.serving.bodies import ChatBody
from controlprefix.serving.large_bodies import _may_be_large

from servers import CHAT, Keys, Served, ask, wait_for


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [1] * 100_000},
        {"messages": [{"role": "user", "content": [1] * 100_000}]},
        {"attributes": {f"a{i}": 1.5 for i in range(50_000)}},
        {"attributes": {f"a{i}": [] for i in range(50_000)}},
        {"strengths": {f"a{i}": "x" for i in range(50_000)}},
        {"schedules": {"user": [["x", "y"]] * 50_000}},
        {"stop": [1] * 100_000},
        {"model": "m" * 900_000},
        {"logit_bias": {str(i): "x" for i in range(50_000)}},
        {"temperature": "t" * 900_000},
        {"user": "u" * 900_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_megabyte_of_mistakes_has_a_short_answer(
    limited: Served, keys: Keys, fields: dict[str, Any]
) -> None:
    response = ask(limited, keys["a"], **fields)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 8_000
    assert response.json()["error"]["message"]


@pytest.mark.slow
def test_large_bodies_of_a_tenant_take_turns(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's second one waits for the first, another tenant's does not, and a third is told."""
    monkeypatch.setattr("controlprefix.serving.large_bodies._MAX_WAITING", 2)
    sleep, released = asyncio.sleep, threading.Event()

    async def wait(seconds: float) -> None:
        while seconds > 1000 and not released.is_set():
            await sleep(0.01)
        await sleep(seconds if seconds < 1000 else 0)

    monkeypatch.setattr("controlprefix.serving.large_bodies.asyncio.sleep", wait)
    lanes = limited.gateway.large_bodies._turns
    lanes.clear()
    large = {"model": "tiny", "prompt": "x", "max_tokens": 1, "metadata": {"note": "y" * 100_000}}
    url = f"{limited.base}/v1/completions"

    def post(tenant: str) -> int:
        return httpx.post(url, json=large, headers=keys[tenant], timeout=60).status_code

    assert post("a") == 200
    lanes["a"].free_at = time.monotonic() + 3600
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, "a") for _ in range(2)]
        wait_for(lambda: lanes["a"].num_waiting == 2)
        assert post("a") == 429
        assert post("b") == 200
        assert ask(limited, keys["a"]).status_code == 200  # a small one
        assert not any(future.done() for future in waiting)
        lanes["a"].free_at = 0.0
        released.set()
        assert [future.result() for future in waiting] == [200, 200]


def test_a_body_is_not_parsed_before_its_key(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}
    assert httpx.post(f"{limited.base}{CHAT}", **body).status_code == 401  # type: ignore[arg-type]
    body["headers"] |= keys["a"]  # type: ignore[operator]
    answer = httpx.post(f"{limited.base}{CHAT}", **body)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"] or "pars" in answer.text


def test_a_prompt_that_is_far_too_long_is_not_tokenized_as_a_whole(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    tokenize = TextTokenizer.ids_of_text

    def noting(tokenizer: TextTokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return tokenize(tokenizer, text)

    monkeypatch.setattr(TextTokenizer, "ids_of_text", noting)
    answer = ask(limited, keys["a"], messages=[{"role": "user", "content": "x" * 900_000}])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert max(lengths) < 10_000


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": ["hi"]}, "messages.0: must be a JSON object"),
        ("/v1/chat/completions", {"response_format": "json"}, "response_format: must be"),
        ("/v1/chat/completions", {"extra_body": [1]}, "extra_body must be a JSON object"),
        ("/v1/chat/completions", {"model": "tiny/"}, "names no task"),
        ("/v1/chat/completions", {"max_tokens": 10**1000}, "less than or equal to"),
        ("/v1/responses", {"input": [{"role": "x", "content": "a"}]}, "input.0.role: "),
        ("/v1/completions", {"prompt": "a", "stop": [1]}, "stop.0: "),
    ],
)
def test_messages_about_bodies_name_the_place(
    limited: Served, keys: Keys, path: str, body: dict[str, Any], message: str
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    defaults = {"messages": messages} if "chat" in path else {}
    whole = {"model": "tiny", **defaults, **body}
    answer = httpx.post(f"{limited.base}{path}", json=whole, headers=keys["a"])
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]
    assert len(answer.text) < 500


@pytest.mark.slow
def test_what_json_cannot_say_is_400(limited: Served, keys: Keys) -> None:
    headers = {**keys["a"], "Content-Type": "application/json"}
    deep = b'{"type": "object", "properties": {"a": ' * 900 + b"{}" + b"}}" * 900
    form = b'{"type": "json_schema", "json_schema": {"schema": %s}}' % deep
    for content in (
        b'{"model": "tiny", "prompt": "a", "max_tokens": %s}' % (b"1" * 5000),
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "a", "response_format": %s}' % form,
    ):
        with httpx.Client(headers=headers) as client:
            answer = client.post(f"{limited.base}/v1/completions", content=content)
            assert answer.status_code == 400, answer.text
            assert client.get(f"{limited.base}/v1/models").status_code == 200  # the same connection
    for to in (10**30, "x" * 5000, "\ud800"):
        at = f"{limited.base}/v1/users/ana/rollback"
        answer = httpx.post(at, content=json.dumps({"to": to}), headers=headers)
        assert answer.status_code == 400, answer.text
        assert len(answer.text) < 500


@pytest.mark.parametrize(
    ("header", "large"),
    [
        ((b"content-length", b"65536"), False),
        ((b"content-length", b"65537"), True),
        ((b"transfer-encoding", b"chunked"), True),  # which says nothing of its size
    ],
)
def test_a_body_of_unknown_size_may_be_large(header: tuple[bytes, bytes], large: bool) -> None:
    assert _may_be_large(starlette.requests.Request({"type": "http", "headers": [header]})) == large


@pytest.mark.parametrize("served", ["tiny", "org/tiny"])
def test_a_task_follows_the_served_name_whatever_slashes_it_has(served: str) -> None:
    def task(model: str) -> str | None:
        return ChatBody(model=model, messages=[{"role": "user", "content": "x"}]).task(served)  # type: ignore[list-item]

    assert task(served) is None
    assert task(f"{served}/email") == "email"
    assert task(f"{served}/a/b") == "a/b"
    for model in ("other", f"{served}/", f"{served}2/email", "email"):
        with pytest.raises(ModelNotFoundError):
            task(model)
