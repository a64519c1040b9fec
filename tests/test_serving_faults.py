"""Servers under faults: keys, limits, errors inside, departures, and stops."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from controlprefix import ControlPrefix, StoreError
from controlprefix.prefixes import PrefixKey
from controlprefix.serving import ServerLimits
from controlprefix.serving.tenants import Tenants
from controlprefix.store import NewVersion, PrefixStore
from controlprefix.store.model_store import ModelStore

from databases import own_server, restart
from helpers import frozen
from servers import MESSAGES, MODEL, TOKENIZER, Keys, Served, ask, expected, fill, wait_for


@pytest.mark.slow
def test_a_key_opens_its_own_tenant_and_no_other(store: str) -> None:
    with (
        PrefixStore(store, tenant="mine") as own_store,
        PrefixStore(store, tenant="theirs") as other,
    ):
        keys = {"mine": own_store.create_api_key("k"), "theirs": other.create_api_key("k")}
        served = Served(store)
        try:
            for tenant, key in keys.items():
                outcome = served.client(key).chat.completions.create(
                    model="tiny", messages=MESSAGES, user="ana", max_tokens=12, temperature=0
                )
                assert outcome.choices[0].message.content == expected(
                    store, tenant, prompt=MESSAGES[0]["content"], user="ana", max_new_tokens=12
                )
            other.put([])
            enrolled = {"headers": {"Authorization": f"Bearer {keys['mine']}"}}
            at = f"{served.base}/v1/users/only-mine"
            httpx.put(at, json={"texts": ["x"]}, **enrolled)  # type: ignore[arg-type]
            with pytest.raises(openai.NotFoundError):
                served.client(keys["theirs"]).chat.completions.create(
                    model="tiny", messages=MESSAGES, user="only-mine", max_tokens=2
                )
            swapped = ".".join([*keys["theirs"].split(".")[:2], keys["mine"].split(".")[2]])
            for invalid in ("none", swapped, keys["mine"] + "x", "cp.bm9ib2R5.x"):
                answer = httpx.get(
                    f"{served.base}/v1/models", headers={"Authorization": f"Bearer {invalid}"}
                )
                assert answer.status_code == 401, invalid
            assert httpx.get(f"{served.base}/v1/models").status_code == 401
            assert (
                "nobody" not in served.gateway._tenants._engines
            )  # a wrong key leaves nothing behind
        finally:
            served.close()
            own_store.revoke_api_key("k")
            other.revoke_api_key("k")


@pytest.mark.slow
def test_rates_queues_and_times_are_limited(store: str) -> None:
    with PrefixStore(store, tenant="mine") as own_store:
        key = own_store.create_api_key("limited")
    limits = ServerLimits(requests_per_minute=3, max_sequences=1, max_waiting=1, timeout_s=1.0)
    served = Served(store, limits=limits)
    try:
        client = served.client(key)
        for _ in range(3):
            client.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            client.models.list()
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
    finally:
        served.close()
    served = Served(
        store,
        open_tenant="mine",
        limits=ServerLimits(max_sequences=1, max_waiting=1, timeout_s=1.0),
    )
    try:
        ask: Any = served.client().completions.create
        slow = {"model": "tiny", "prompt": "x", "max_tokens": 200, "temperature": 0}
        forward = served.batcher._forward

        def slowly(*args: Any, **inputs: Any) -> Any:
            time.sleep(0.05)
            return forward(*args, **inputs)

        served.batcher._forward = slowly
        with ThreadPoolExecutor(6) as pool:
            outcome = [pool.submit(ask, **slow) for _ in range(6)]
            statuses = []
            for item in outcome:
                error = item.exception()
                statuses.append(
                    error.status_code if isinstance(error, openai.APIStatusError) else 0
                )
        assert 503 in statuses
        assert 504 in statuses
        wait_for(lambda: served.batcher.load == (0, 0))  # who timed out has left the batch
    finally:
        served.close()


@pytest.mark.slow
def test_what_goes_wrong_inside_is_told_to_the_log_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = served.client().completions.create
    secret = "sqlite:////secret/place.db"

    def broken(*_: Any, **__: Any) -> Any:
        raise StoreError(f"cannot read the store {secret!r}")

    with monkeypatch.context() as patch:
        patch.setattr(ModelStore, "change_token", lambda _: None)  # ask the store each time
        patch.setattr(ModelStore, "fetch", broken)
        with pytest.raises(openai.APIStatusError) as caught:
            ask(model="tiny/email", prompt="x", max_tokens=2)
    assert caught.value.status_code == 503
    assert secret not in str(caught.value)

    def failing(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(secret)

    with monkeypatch.context() as patch:
        patch.setattr("controlprefix.serving.routes.models._models", failing)
        answer = httpx.get(f"{served.base}/v1/models")
    assert (answer.status_code, secret in answer.text) == (500, False)
    metrics = httpx.get(f"{served.base}/metrics").text
    assert 'path="/v1/models",status="500"} 1.0' in metrics

    forward = served.batcher._forward
    served.batcher._forward = failing
    try:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as invalid:
                ask(model="tiny", prompt="x", max_tokens=2, stream=stream)
            assert invalid.value.status_code == 500
            assert secret not in str(invalid.value)
    finally:
        served.batcher._forward = forward
    assert ask(model="tiny", prompt="x", max_tokens=2).choices[0].text is not None


@pytest.mark.slow
def test_a_closed_connection_leaves_the_batch(served: Served) -> None:
    async def hang_up(*, stream: bool) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 220, "temperature": 1, "n": 4,
                "stream": stream, "repetition_penalty": 1.2}  # fmt: skip
        async with httpx.AsyncClient() as client:

            async def read() -> None:
                at = f"{served.base}/v1/completions"
                async with client.stream("POST", at, json=body, timeout=60) as answer:
                    async for _ in answer.aiter_lines():
                        pass

            reading = asyncio.create_task(read())
            await asyncio.to_thread(wait_for, lambda: served.batcher.load[0] > 0)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    forward = served.batcher._forward

    def slowly(*args: Any, **inputs: Any) -> Any:
        time.sleep(0.1)  # all of it would take 22 s
        return forward(*args, **inputs)

    served.batcher._forward = slowly
    try:
        for stream in (True, False):
            asyncio.run(hang_up(stream=stream))
            wait_for(lambda: served.batcher.load == (0, 0))
    finally:
        served.batcher._forward = forward


@pytest.mark.slow
def test_a_server_told_to_stop_finishes_what_it_has(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "controlprefix.cli", "serve", "--model", str(folder),
        "--store", store, "--tenant", "mine", "--port", str(port), "--served-model-name", "tiny",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}
    ) as process:
        base = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(f"{base}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        else:
            pytest.fail("the server was never ready")
        body = {"model": "tiny", "prompt": "x", "max_tokens": 240, "temperature": 0, "stream": True,
                "repetition_penalty": 1.3}  # fmt: skip
        text, reason = "", None
        with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=60) as answer:
            for i, line in enumerate(answer.iter_lines()):
                if i == 4:
                    process.send_signal(signal.SIGTERM)
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
        assert reason in ("length", "stop")
        assert process.wait(60) == 0, process.stdout and process.stdout.read()
    whole = expected(store, prompt="x", raw=True, max_new_tokens=240, repetition_penalty=1.3)
    assert text == whole


@pytest.mark.slow
def test_a_soak_with_faults_loses_nothing(tmp_path: Path) -> None:
    """The database restarts twice while clients ask, enrol, hang up and send nonsense."""
    with own_server(tmp_path / "data") as (server, url):
        fill(url, "mine", 2.0)
        soak(server, url)


def soak(server: Any, url: str) -> None:
    served = Served(url, open_tenant="mine", limits=ServerLimits(max_sequences=8, max_waiting=64))
    users = [None, "ana"]
    texts_alone = {
        user: expected(url, prompt="soak", raw=True, max_new_tokens=12, user=user) for user in users
    }
    stop = threading.Event()
    answers: list[tuple[int, Any]] = []
    saved: list[str] = []
    lock = threading.Lock()

    def ask(i: int) -> None:
        user = users[i % 2]
        body = {"model": "tiny", "prompt": "soak", "max_tokens": 12, "temperature": 0, "user": user}
        answer = httpx.post(f"{served.base}/v1/completions", json=body, timeout=60)
        text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
        with lock:
            answers.append((answer.status_code, text is None or text == texts_alone[user]))

    def hang_up(i: int) -> None:
        body = {"model": "tiny", "prompt": "soak", "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{served.base}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_raw(), b"")

    def nonsense(i: int) -> None:
        content = [b"{", b"[]", b'{"model": 7}', b"\xff" * 100, b'{"model": "tiny", "prompt": []}']
        answer = httpx.post(f"{served.base}/v1/completions", content=content[i % 5], timeout=60)
        with lock:
            answers.append((answer.status_code, 400 <= answer.status_code < 500))

    def enrol(i: int) -> None:
        user = f"soak{i}"
        answer = httpx.put(
            f"{served.base}/v1/users/{user}", json={"texts": ["hello there"]}, timeout=60
        )
        with lock:
            answers.append((answer.status_code, True))
            if answer.status_code == 200:
                saved.append(user)

    def client(what: Callable[[int], None], pause: float) -> None:
        i = 0
        while not stop.is_set():
            what(i)
            i += 1
            time.sleep(pause)

    threads = [
        threading.Thread(target=client, args=(what, pause))
        for what, pause in [(ask, 0.0)] * 4 + [(hang_up, 0.2), (nonsense, 0.05), (enrol, 0.1)]
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(2)
            restart(server)
        time.sleep(2)
        deadline = time.monotonic() + 60  # a slow machine needs longer for as many answers
        while sum(status == 200 for status, _ in answers) <= 50 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    statuses = Counter(status for status, _ in answers)
    assert statuses[200] > 50
    assert set(statuses) <= {200, 400, 422, 503}, statuses
    assert all(right for _, right in answers)
    wait_for(lambda: served.batcher.load == (0, 0))
    ask(1)
    assert answers[-1] == (200, True)
    names = set(httpx.get(f"{served.base}/v1/users").json()["users"])
    assert set(saved) <= names  # an acknowledged enrolment is stored
    served.close()


@pytest.mark.slow
def test_jobs_versions_and_users_of_one_tenant_are_hidden_from_others(
    limited: Served, keys: Keys
) -> None:
    user = f"{limited.base}/v1/users/only-a"
    store = limited.gateway._tenants._store.for_tenant("a")
    prefix = ControlPrefix(frozen(MODEL, TOKENIZER), store).prefix_from_text("a task")
    store.put([NewVersion(PrefixKey("task", "only-a"), prefix)])
    body = {"texts": ["a text"], "train": {"steps": 1}}
    accepted = httpx.put(user, json=body, headers=keys["a"])
    job = accepted.headers["Location"]
    wait_for(
        lambda: httpx.get(limited.base + job, headers=keys["a"]).json()["status"] == "succeeded"
    )
    for method, path, content in (
        ("GET", job, None),
        ("DELETE", job, None),
        ("GET", job + "/events", None),
        ("GET", "/v1/users/only-a", None),
        ("POST", "/v1/users/only-a/rollback", {"to": 1}),
        ("GET", "/v1/prefixes/task/only-a", None),
        ("PUT", "/v1/prefixes/task/only-a/aliases/mine", {"to": 1}),
        ("POST", "/v1/prefixes/task/only-a/rollback", {"to": 1}),
        ("DELETE", "/v1/users/only-a", None),
    ):
        answer = httpx.request(method, limited.base + path, json=content, headers=keys["b"])
        assert answer.status_code == 404, path
        assert "a text" not in answer.text
    assert httpx.get(f"{limited.base}/v1/jobs", headers=keys["b"]).json()["jobs"] == []
    assert "only-a" not in httpx.get(f"{limited.base}/v1/users", headers=keys["b"]).text
    assert httpx.get(user, headers=keys["a"]).status_code == 200


@pytest.mark.slow
def test_tenants_with_the_same_names_share_a_batch_and_no_prefix(
    limited: Served, keys: Keys, two_tenants: str
) -> None:
    def text_of(tenant: str) -> str:
        answer = ask(limited, keys[tenant], user="ana", max_tokens=12)
        return str(answer.json()["choices"][0]["message"]["content"])

    alone = {tenant: text_of(tenant) for tenant in "ab"}
    assert alone["a"] != alone["b"]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(text_of, "ab" * 8))
    assert together == [alone[tenant] for tenant in "ab" * 8]


@pytest.mark.slow
def test_a_revoked_key_opens_nothing(two_tenants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlprefix.serving.tenants._KEY_CACHE_S", 0.2)
    with PrefixStore(two_tenants, tenant="a") as store:
        header = {"Authorization": f"Bearer {store.create_api_key('brief')}"}
        served = Served(two_tenants)
        try:
            url = f"{served.base}/v1/models"
            assert httpx.get(url, headers=header).status_code == 200
            store.revoke_api_key("brief")
            wait_for(lambda: httpx.get(url, headers=header).status_code == 401)
        finally:
            served.close()


def test_a_server_is_not_ready_while_its_store_is_away(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Tenants) -> None:
        raise StoreError("/secret/prefixes.db is away")

    assert httpx.get(f"{served.base}/ready").status_code == 200
    monkeypatch.setattr(Tenants, "check_health", away)
    answer = httpx.get(f"{served.base}/ready")
    assert answer.status_code == 503
    assert "/secret" not in answer.text
    assert httpx.get(f"{served.base}/health").status_code == 200
