"""Users, versions, feedback, tenants and their limits over HTTP."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from controlprefix import ControlPrefix, Prefix, Request
from controlprefix.errors import RateLimitError
from controlprefix.serving import Server, ServerLimits
from controlprefix.store import PrefixStore

from helpers import frozen
from servers import (
    MESSAGES,
    MODEL,
    TOKENIZER,
    Served,
    fill,
    wait_for,
)


@pytest.mark.slow
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


@pytest.mark.slow
def test_tokens_of_a_key_are_limited_and_those_of_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    first, other = (PrefixStore(url, tenant=name) for name in ("mine", "theirs"))
    keys = [first.create_api_key("a"), first.create_api_key("b"), other.create_api_key("a")]
    keys += [first.create_api_key("c"), first.create_api_key("d")]
    served = Served(url, limits=ServerLimits(tokens_per_minute=60))
    clients = [served.client(key) for key in keys]

    def ask(client: openai.OpenAI, prompt: str = "abc", **fields: Any) -> Any:
        return client.completions.create(
            model="tiny",
            prompt=prompt,
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

        def has_none_left(key: str) -> bool:
            with contextlib.suppress(RateLimitError):
                limiter.require("mine", key)
                return False
            return True

        wait_for(lambda: has_none_left("b"))
        with pytest.raises(openai.RateLimitError):
            ask(clients[1])
        stream = ask(clients[3], "abc" * 20, stream=True)
        next(iter(stream))
        stream.close()  # 30 tokens and those of the prompt
        wait_for(lambda: has_none_left("c"))
        assert ask(clients[2]).usage.total_tokens == 33
        read = served.gateway._prompt_echo.read
        reading = threading.Event()

        def slowly(*arguments: Any) -> Any:
            reading.set()
            time.sleep(1)
            return read(*arguments)

        monkeypatch.setattr(served.gateway._prompt_echo, "read", slowly)
        impatient = clients[4].with_options(timeout=0.5, max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(
                model="tiny", prompt="abc" * 30, max_tokens=0, echo=True, logprobs=1
            )
        assert reading.is_set()
        wait_for(lambda: has_none_left("d"))  # the 90 tokens that were read
    finally:
        served.close()
        first.close()
        other.close()


@pytest.mark.slow
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
        assert httpx.post(f"{users}/ana/rollback", json={"to": "1"}).status_code == 200
        assert httpx.post(f"{users}/ana/rollback", json={"to": True}).status_code == 400
        assert httpx.get(f"{served.base}/v1/prefixes/task").json()["names"] == ["email"]
        assert httpx.get(f"{served.base}/v1/models/tiny/email").status_code == 200
        assert httpx.delete(f"{served.base}/v1/prefixes/task/email").json()["num_versions"] == 1
        assert httpx.get(f"{served.base}/v1/models/tiny/email").status_code == 404
        assert httpx.get(f"{served.base}/v1/prefixes/user/ana").status_code == 400
    finally:
        served.close()
        cp.store.close()


@pytest.mark.slow
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


def test_times_of_versions_say_that_they_are_in_utc(served: Served) -> None:
    (version,) = httpx.get(f"{served.base}/v1/users/ana").json()["versions"]
    assert version["created_at"].endswith("+00:00")
