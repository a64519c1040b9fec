"""One tenant never costs another: pools, connections, bodies, hosts, keys."""

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest

from controlprefix import ControlPrefix, RequestError, StoreError, UnknownNameError
from controlprefix.prefixes import PrefixKey
from controlprefix.serving import ServerLimits
from controlprefix.serving.work_pools import WorkPools
from controlprefix.store import PrefixStore
from controlprefix.users import user_trainer, user_training

from servers import CHAT, Keys, Served, ask, fill, wait_for


@pytest.mark.slow
def test_what_another_process_forgets_leaves_this_ones_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlprefix.serving.app._FORGET_INTERVAL_S", 0.02)
    url = f"sqlite:///{tmp_path}/prefixes.db"
    fill(url, "a", 2.0)
    served = Served(url, open_tenant="a")
    files: list[tuple[str, PrefixKey]] = []
    failures = [StoreError("the folder is read-only")]

    def forget(*removed: Any, removed_at: datetime | None = None) -> None:
        assert removed_at is None or removed_at <= datetime.now(UTC)
        if failures:
            raise failures.pop()
        files.append(removed)

    monkeypatch.setattr(served.batcher, "forget", forget)
    try:
        ask = {"model": "tiny/email", "messages": [{"role": "user", "content": "x"}], "user": "ana"}
        assert httpx.post(f"{served.base}{CHAT}", json={**ask, "max_tokens": 2}).is_success
        cache = served.gateway._tenants._caches.prefixes
        ana, email = ("a", PrefixKey("user", "ana")), ("a", PrefixKey("task", "email"))
        assert {ana, email} == set(cache.cached_keys())
        with PrefixStore(url, tenant="b") as other:
            with contextlib.suppress(UnknownNameError):
                other.forget(ana[1])
        with PrefixStore(url, tenant="a") as other:
            other.forget(ana[1])
        wait_for(lambda: ana not in cache.cached_keys())
        assert cache.cached_keys() == [email]
        wait_for(lambda: files == [ana])  # at the second try
        assert httpx.delete(f"{served.base}/v1/prefixes/task/email").is_success
        assert cache.cached_keys() == []
    finally:
        served.close()


@pytest.mark.slow
def test_work_with_the_model_of_one_tenant_keeps_no_other_waiting(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    begun: list[str] = []

    def enroll(self: ControlPrefix, user: str, **_: Any) -> int:
        begun.append(user)
        if user.startswith("slow"):
            release.wait(30)
        return 1

    monkeypatch.setattr(ControlPrefix, "enroll", enroll)

    def put(tenant: str, user: str) -> int:
        url = f"{limited.base}/v1/users/{user}"
        return httpx.put(url, json={"texts": ["x"]}, headers=keys[tenant], timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        slow = [pool.submit(put, "a", f"slow{i}") for i in range(10)]
        wait_for(lambda: len(begun) == 1)
        wait_for(lambda: sum(future.done() for future in slow) == 6)  # four may wait
        assert {future.result() for future in slow if future.done()} == {503}
        assert put("b", "quick") == 200
        assert httpx.get(limited.base + "/ready").status_code == 200
        assert ask(limited, keys["a"]).status_code == 200
        assert len(begun) == 2
        release.set()
        assert sorted(future.result() for future in slow) == [200] * 4 + [503] * 6


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "most"), [(3, 3), (None, 7)])
def test_a_tenant_has_no_more_rows_than_allowed(
    two_tenants: str, keys: Keys, limit: int | None, most: int
) -> None:
    served = Served(
        two_tenants, limits=ServerLimits(max_sequences=8, max_sequences_per_tenant=limit)
    )
    rows: list[int] = []
    step = served.batcher._step

    def counted() -> None:
        step()
        rows.append(served.batcher.load[0])

    served.batcher._step = counted
    try:
        answer = ask(served, keys["a"], n=10, temperature=1)
        assert len(answer.json()["choices"]) == 10
        assert max(rows) == most
    finally:
        served.close()


@pytest.mark.slow
def test_choices_are_accepted_all_or_none(two_tenants: str, keys: Keys) -> None:
    limits = ServerLimits(max_sequences=4, max_waiting=8, max_sequences_per_tenant=3)
    served = Served(two_tenants, limits=limits)
    submitted: list[Any] = []
    submit, release = served.batcher.submit, threading.Event()
    step = served.batcher._step

    def noting(resolved: Any, **options: Any) -> Any:
        submitted.append(resolved.tenant)
        return submit(resolved, **options)

    def held() -> None:
        release.wait(30)
        step()

    served.batcher.submit, served.batcher._step = noting, held
    try:
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(ask, served, keys["a"], n=6, temperature=1)
            wait_for(lambda: len(submitted) == 6)
            refused = ask(served, keys["a"], n=5, temperature=1)  # 10 may run and wait
            assert refused.status_code == 503
            assert "6 choices of this tenant are under way, and with 5 more" in refused.text
            assert submitted == ["a"] * 6
            other = pool.submit(ask, served, keys["b"])
            release.set()
            assert len(running.result().json()["choices"]) == 6
            assert other.result().status_code == 200
        assert ask(served, keys["a"], n=10, temperature=1).status_code == 200
        assert not served.gateway._under_way
        release.clear()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 4}
        options = {"headers": keys["a"], "json": {**body, "stream": True}, "timeout": 1}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.base + CHAT, **options)  # type: ignore[arg-type]
        release.set()
        wait_for(lambda: not served.gateway._under_way)  # a client that leaves frees them
    finally:
        release.set()
        served.close()


def test_several_choices_are_resolved_once(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    resolve = ControlPrefix.resolve

    def counting(self: ControlPrefix, request: Any) -> Any:
        calls.append(request)
        return resolve(self, request)

    monkeypatch.setattr(ControlPrefix, "resolve", counting)
    fields = {"n": 3, "seed": 1, "temperature": 1.5, "user": "ana", "max_tokens": 8}
    answer = ask(limited, keys["a"], **fields).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(calls) == 1
    assert len(set(texts)) == 3
    alone = ask(limited, keys["a"], **{**fields, "n": 1, "seed": 2}).json()
    assert alone["choices"][0]["message"]["content"] == texts[1]
    whole = httpx.post(
        limited.base + "/v1/completions",
        json={"model": "tiny", "prompt": ["hi", "hello there"], "max_tokens": 4, "temperature": 0},
        headers=keys["a"],
    ).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]


@pytest.mark.slow
def test_idle_and_slow_connections_end_and_keep_nobody_out(limited: Served, keys: Keys) -> None:
    address = ("127.0.0.1", int(limited.base.rpartition(":")[2]))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
    auth = f"Authorization: {keys['a']['Authorization']}\r\n"
    starts = [b"", b"POST / HT", (head + auth + "\r\n{").encode()]
    connections = [socket.create_connection(address) for _ in range(60)]
    try:
        for i, connection in enumerate(connections):
            connection.sendall(starts[i % 3])
        assert ask(limited, keys["b"]).status_code == 200
        answers = []
        for connection in connections:
            connection.settimeout(10)
            try:
                answers.append(connection.recv(4096))
            except ConnectionResetError:
                answers.append(b"")
        assert all(not answer or answer.startswith(b"HTTP/1.1 4") for answer in answers)
        assert any(b" 408 " in answer for answer in answers)
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.slow
def test_a_half_sent_body_does_not_keep_the_server_from_ending(two_tenants: str) -> None:
    limits = ServerLimits(body_timeout_s=1.0, header_timeout_s=1.0, timeout_s=5.0)
    served = Served(two_tenants, open_tenant="a", limits=limits)
    address = ("127.0.0.1", int(served.base.rpartition(":")[2]))
    with socket.create_connection(address) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{".encode()
        )
        time.sleep(0.2)
        start = time.monotonic()
        served.close()
        assert time.monotonic() - start < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:80", 200),
        ("10.1.2.3", 200),
        ("ours.example", 200),
        ("OURS.example:443", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_a_server_without_keys_knows_its_names(two_tenants: str, host: str, status: int) -> None:
    served = Served(two_tenants, open_tenant="a", allowed_hosts=["ours.example"])
    try:
        response = httpx.get(f"{served.base}/v1/models", headers={"Host": host})
        assert response.status_code == status
    finally:
        served.close()


@pytest.mark.slow
def test_an_abandoned_prompt_is_not_prefilled_to_its_end(limited: Served, keys: Keys) -> None:
    """Requests of one tenant that are given up, and a short one of another behind them."""
    forward = limited.batcher._forward
    lengths: list[int] = []

    def slowly(batch: Any, **inputs: Any) -> Any:
        lengths.append(inputs["input_ids"].numel())
        time.sleep(0.05)
        return forward(batch, **inputs)

    limited.batcher._forward = slowly
    limited.batcher._prefills._max_tokens = 64  # so that these prompts take many steps
    long = {"model": "tiny", "prompt": ["x" * 200] * 8, "max_tokens": 4}

    async def abandon() -> None:
        async with httpx.AsyncClient(headers=keys["a"]) as client:
            task = asyncio.create_task(client.post(f"{limited.base}/v1/completions", json=long))
            await asyncio.to_thread(wait_for, lambda: bool(lengths))
            task.cancel()

    try:
        asyncio.run(abandon())
        assert limited.batcher.load[0] > 0
        assert ask(limited, keys["b"]).status_code == 200
        wait_for(lambda: limited.batcher.load == (0, 0))
        assert sum(lengths) < 8 * 200
    finally:
        limited.batcher._forward = forward
        limited.batcher._prefills._max_tokens = 512


def raw_connection(limited: Served) -> socket.socket:
    port = int(limited.base.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=30)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut(two_tenants: str) -> None:
    limits = ServerLimits(body_timeout_s=0.5, header_timeout_s=60.0, max_connections=20)
    served = Served(two_tenants, limits=limits)
    try:
        with raw_connection(served) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            client.sendall(request)
            wait_for(lambda: bool(served.server.server_state.connections))
            with contextlib.suppress(OSError):
                client.sendall(request * 399)
            wait_for(lambda: not served.server.server_state.connections)
    finally:
        served.close()


def test_new_connections_close_the_oldest_idle_ones(limited: Served, keys: Keys) -> None:
    """And a client that keeps connecting does not cut one that is about to send its request."""
    with contextlib.ExitStack() as stack:
        valid, most = [], 0
        for _ in range(60):
            stack.enter_context(raw_connection(limited))
            most = max(most, len(limited.server.server_state.connections))
            client = stack.enter_context(raw_connection(limited))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            valid.append(client.recv(64).startswith(b"HTTP/1.1 200"))
        assert all(valid)
        assert most <= limited.gateway.limits.max_connections + 1


@pytest.mark.slow
def test_an_active_connection_is_not_closed_between_requests(two_tenants: str) -> None:
    served = Served(two_tenants, limits=ServerLimits(header_timeout_s=1.0))
    try:
        with httpx.Client(base_url=served.base) as client:
            first = client.get("/health").extensions["network_stream"]
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                response = client.get("/health")
                assert response.extensions["network_stream"] is first
                time.sleep(0.1)
    finally:
        served.close()


@pytest.mark.slow
@pytest.mark.parametrize("refine", [True, False])
def test_an_enrolment_that_takes_too_long_is_stopped(two_tenants: str, refine: bool) -> None:
    served = Served(two_tenants, open_tenant="a", limits=ServerLimits(timeout_s=1.0))
    try:
        body = {"texts": [f"text {i} " * 40 for i in range(200)], "refine": refine}
        slow = httpx.put(f"{served.base}/v1/users/slow", json=body, timeout=60)
        assert slow.status_code == 504
        pool = served.gateway.work_pools._enrolments
        wait_for(lambda: not pool._counts)  # it ends at its next step
        assert httpx.get(f"{served.base}/v1/users/slow").status_code == 404
        quick = {"texts": ["a text"]}
        assert httpx.put(
            f"{served.base}/v1/users/quick-{refine}", json=quick, timeout=60
        ).is_success
    finally:
        served.close()


@pytest.mark.slow
def test_a_user_who_is_forgotten_while_enrolled_stays_forgotten(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = f"{limited.base}/v1/users/race"
    body = {"texts": ["a text"], "keep_texts": True}
    assert httpx.put(at, json=body, headers=keys["a"]).is_success
    usable = user_training.usable_texts

    def slowly(*arguments: Any) -> list[str]:
        assert httpx.delete(at, headers=keys["a"]).is_success
        return usable(*arguments)

    monkeypatch.setattr(user_trainer, "usable_texts", slowly)
    answer = httpx.put(at, json=body, headers=keys["a"], timeout=60)
    assert answer.status_code == 409
    assert "forgotten meanwhile" in answer.json()["error"]["message"]
    assert httpx.get(at, headers=keys["a"]).status_code == 404
    monkeypatch.undo()
    enroll = WorkPools.run_enrolment

    async def later(self: WorkPools, *arguments: Any, **options: Any) -> Any:
        await anyio.to_thread.run_sync(partial(httpx.delete, at, headers=keys["a"]))
        return await enroll(self, *arguments, **options)

    assert httpx.put(at, json=body, headers=keys["a"]).is_success
    monkeypatch.setattr(WorkPools, "run_enrolment", later)  # as if it had waited for its turn
    assert httpx.put(at, json=body, headers=keys["a"], timeout=60).status_code == 409
    assert httpx.get(at, headers=keys["a"]).status_code == 404


@pytest.mark.slow
def test_maintenance_while_a_user_is_enrolled_removes_nothing(
    limited: Served, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = f"{limited.base}/v1/users/kept"
    for text in ("one", "two", "three"):
        assert httpx.put(at, json={"texts": [text]}, headers=keys["a"]).is_success
    usable = user_training.usable_texts

    def slowly(*arguments: Any) -> list[str]:
        assert limited.gateway._tenants._store.for_tenant("a").prune(keep=1) == 2
        return usable(*arguments)

    monkeypatch.setattr(user_trainer, "usable_texts", slowly)
    answer = httpx.put(at, json={"texts": ["four"]}, headers=keys["a"], timeout=60)
    assert answer.json()["version"] == 4


def test_jobs_that_cannot_succeed_are_refused(limited: Served, keys: Keys) -> None:
    at = f"{limited.base}/v1/users/zoe"
    for body, status in (
        ({"texts": [""], "train": {}}, 400),
        ({"texts": ["a"], "decoder": "none", "train": {}}, 404),
    ):
        assert httpx.put(at, json=body, headers=keys["a"]).status_code == status


def test_limits_are_above_zero() -> None:
    assert ServerLimits(requests_per_minute=0).requests_per_minute == 0
    for options in ({"max_sequences": 0}, {"max_waiting": -1}, {"timeout_s": -1.0}):
        with pytest.raises(RequestError, match="must be a number above 0"):
            ServerLimits(**options)


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 0.0, -1.0])
def test_limits_are_numbers_above_0(timeout_s: float) -> None:
    with pytest.raises(RequestError, match="timeout_s is .*; it must be a number above 0"):
        ServerLimits(timeout_s=timeout_s)
