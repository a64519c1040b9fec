"""Stock vLLM against transformers, token for token. `make test-vllm` runs these."""

import base64
import concurrent.futures
import importlib
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import openai
import uvicorn

from controlprefix import (
    ContextLengthError,
    ControlPrefix,
    EngineError,
    Prefix,
    Request,
    RequestError,
    UnknownNameError,
)
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model import mass_in_keys
from controlprefix.prefixes import PrefixKey
from controlprefix.serving import Server, create_app
from controlprefix.store import PrefixCache
from controlprefix.vllm import connector
from controlprefix.vllm.connector import ControlPrefixConnector
from controlprefix.vllm.placement import Placement
from controlprefix.vllm.runner import VllmRunner

from models import build
from vllm_server import CHAT, engine, metric, requests, served, texts_of


def placed(runner: VllmRunner, resolved: ResolvedRequest[Request]) -> Placement:
    """A request's placement, with its file written."""
    placement = runner._place(resolved)
    runner._write_slots(placement)
    return placement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def cp(folder: Path) -> ControlPrefix:
    return engine(folder)


@pytest.fixture(scope="module")
def url(folder: Path, cp: ControlPrefix) -> Iterator[str]:
    """Prompts are read 64 tokens a step, so they are cut in the midst of a prefix."""
    options = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    key = folder / "key"
    key.write_text(base64.b64encode(bytes(range(32))).decode())
    with served(
        folder / "model",
        folder / "prefixes",
        *options,
        log=folder / "log",
        key_file=str(key),
    ) as result:
        yield result


@pytest.fixture
def runner(cp: ControlPrefix, url: str, folder: Path) -> Iterator[VllmRunner]:
    result = cp.vllm_runner(url, folder / "prefixes", key_file=folder / "key")
    yield result
    result.close()


def test_every_token_is_that_of_the_transformers_engine(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    request = requests()
    expected = [item.text for item in cp.generate(request)]
    assert len(set(expected)) > len(expected) / 2  # the prefixes matter
    for _ in range(3):  # later ones find blocks in vLLM's cache
        assert texts_of(cp, runner, request) == expected


def test_blocks_of_a_task_are_shared_and_those_of_users_are_not(
    cp: ControlPrefix, runner: VllmRunner, url: str
) -> None:
    cp.put("user", "eve", Prefix.random(cp.geometry, num_slots=20, scale=1.0, seed=99))
    request_list = [
        Request(prompt="tell me a story ", task="poem", user=user, max_new_tokens=8)
        for user in ("bo", "bo", "eve")
    ]
    expected = [item.text for item in cp.generate(request_list)]
    assert expected[0] != expected[2]
    hits = []
    for request, text in zip(request_list, expected, strict=True):
        before = metric(url, "vllm:prefix_cache_hits_total")
        assert runner.submit(cp.resolve(request)).result().text == text
        hits.append(metric(url, "vllm:prefix_cache_hits_total") - before)
    assert hits[1] >= 64  # all of bo's blocks
    assert hits[2] == 32  # of eve's 60 slots, the task's one full block


def test_without_the_salt_one_user_would_get_what_is_anothers(
    cp: ControlPrefix, runner: VllmRunner, url: str
) -> None:
    """What `placement` is for: the same placeholders and no salt leak, in vLLM as it is."""
    prompt = CHAT("leak")["input_ids"]

    def ask(user: str, **more: Any) -> str:
        placement = placed(runner, cp.resolve(Request(prompt="leak", user=user)))
        body = {
            "model": "tiny",
            "prompt": [7] * placement.num_slots + prompt,
            "max_tokens": 16,
            "temperature": 0,
            "kv_transfer_params": {
                "controlprefix": {"file": placement.file_name, "num_slots": placement.num_slots}
            },
            **more,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        return str(answer["choices"][0]["text"])

    cp.put("user", "eve", Prefix.random(cp.geometry, num_slots=32, scale=1.0, seed=98))
    custom = ask("eve", cache_salt="eve")
    assert ask("cleo", cache_salt="cleo") != custom
    assert ask("cleo") != custom
    assert ask("eve") != custom  # it has cleo's block


def test_log_probabilities_are_those_of_the_transformers_engine(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    batcher = cp.batcher()
    request = Request(prompt="how likely", task="email", user="bo", max_new_tokens=8)
    ours, through_vllm = (
        item.submit(cp.resolve(request), top_log_probs=3) for item in (batcher, runner)
    )
    ours.result()
    through_vllm.result()
    assert [item.token for item in through_vllm.tokens] == [item.token for item in ours.tokens]
    for item, other in zip(ours.tokens, through_vllm.tokens, strict=True):
        assert other.log_prob == pytest.approx(item.log_prob, abs=1e-3)
        assert [token for token, _ in other.top] == [token for token, _ in item.top]
    batcher.close()


def test_samples_with_a_seed_are_the_same_alone_and_in_a_batch(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    request = Request(prompt="draw", user="bo", temperature=1.5, seed=7, max_new_tokens=24)
    alone = runner.submit(cp.resolve(request)).result().text
    others = [runner.submit(cp.resolve(other)) for other in requests(temperature=1.0)]
    assert runner.submit(cp.resolve(request)).result().text == alone
    for other in others:
        other.result()
    assert runner.submit(cp.resolve(request.model_copy(update={"seed": 8}))).result().text != alone


def test_stop_texts_and_streams_are_cut_as_here(cp: ControlPrefix, runner: VllmRunner) -> None:
    request = Request(prompt="tell me a story ", user="ana", max_new_tokens=24)
    whole = cp.generate(request)
    stop = whole.text[5:7]
    cut = request.model_copy(update={"stop": (stop,)})
    ticket = runner.submit(cp.resolve(cut))
    pieces = list(ticket)
    assert "".join(pieces) == ticket.result().text == cp.generate(cut).text
    assert ticket.result().finish_reason == "stop"
    assert ticket.result().num_tokens == cp.generate(cut).num_tokens
    assert ticket.result().num_prompt_tokens == whole.num_prompt_tokens


def test_a_missing_or_damaged_prefix_ends_its_own_request_alone(
    cp: ControlPrefix, runner: VllmRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_list = requests()
    expected = [other.text for other in cp.generate(request_list)]
    lost = Prefix.random(cp.geometry, num_slots=24, seed=97)
    cp.put("user", "lost", lost)
    request = Request(prompt="lost", user="lost", max_new_tokens=8)
    path = runner._folder.file(placed(runner, cp.resolve(request)).file_name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_is_lost", lambda placement: False)
        others = [runner.submit(cp.resolve(other)) for other in request_list]
        bad = runner.submit(cp.resolve(request))
        others += [runner.submit(cp.resolve(other)) for other in request_list]
        with pytest.raises(EngineError):
            bad.result()
        assert [other.result().text for other in others] == expected * 2
    assert runner.submit(cp.resolve(request)).result().text == cp.generate(request).text
    assert len(path.read_bytes()) == len(whole)  # written anew


def test_the_slots_of_a_user_forgotten_meanwhile_are_not_written_again(
    cp: ControlPrefix, runner: VllmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cp.put("user", "goes", Prefix.random(cp.geometry, num_slots=24, seed=95))
    request = Request(prompt="lost", user="goes", max_new_tokens=8)
    path = runner._folder.file(placed(runner, cp.resolve(request)).file_name)
    path.write_bytes(path.read_bytes()[:-7])

    def forgotten(_: Any) -> bool:
        runner.forget("default", PrefixKey("user", "goes"))
        return True

    monkeypatch.setattr(runner, "_is_lost", forgotten)
    with pytest.raises(UnknownNameError, match="was forgotten"):
        runner.submit(cp.resolve(request)).result()
    assert not path.exists()

    def forgotten_before(_: Any) -> bool:  # a removal from before the user was enrolled again
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        runner.forget("default", PrefixKey("user", "goes"), removed_at=long_ago)
        return True

    path = runner._folder.file(placed(runner, cp.resolve(request)).file_name)
    path.write_bytes(path.read_bytes()[:-7])
    monkeypatch.setattr(runner, "_is_lost", forgotten_before)
    assert runner.submit(cp.resolve(request)).result().text == cp.generate(request).text
    assert path.exists()


def test_a_forgotten_users_slots_leave_the_folder_and_workers(
    cp: ControlPrefix, runner: VllmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for user in ("gone", "stays"):
        cp.put("user", user, Prefix.random(cp.geometry, num_slots=4, seed=96))
        files[user] = placed(runner, cp.resolve(Request(prompt="x", user=user))).file_name
    worker: Any = object.__new__(ControlPrefixConnector)
    worker._folder, worker._cache, worker._checked_at = runner._folder, PrefixCache(1 << 20), 0.0
    for name in files.values():
        assert worker._read(name).num_slots == 4
    cp.forget_user("gone")
    runner.forget("default", PrefixKey("user", "gone"))
    assert not runner._folder.file(files["gone"]).exists()
    monkeypatch.setattr(connector, "_CHECK_INTERVAL_S", 0.0)
    worker._drop_removed()
    assert worker._cache.cached_keys() == [files["stays"]]


@pytest.mark.parametrize(
    "told",
    [
        {"file": "0" * 64, "num_slots": 4},
        {"file": "../../etc/passwd", "num_slots": 4},
        {"file": "0" * 64, "num_slots": 10_000},
        {"file": "0" * 64, "num_slots": -1},
        {"file": 7},
        "nonsense",
        [],
    ],
)
def test_nonsense_ends_its_own_request_and_not_the_server(
    told: object, url: str, runner: VllmRunner, cp: ControlPrefix
) -> None:
    body = {"model": "tiny", "prompt": [7] * 20, "max_tokens": 4}
    request_list = {**body, "kv_transfer_params": {"controlprefix": told}}
    answer = httpx.post(f"{url}/v1/completions", json=request_list, timeout=60)
    assert answer.status_code == 500
    request = Request(prompt="well?", user="bo", max_new_tokens=4)
    assert runner.submit(cp.resolve(request)).result().text == cp.generate(request).text


def test_cancelled_requests_are_dropped(cp: ControlPrefix, runner: VllmRunner, url: str) -> None:
    ticket = runner.submit(cp.resolve(Request(prompt="long", user="dan", max_new_tokens=150)))
    next(iter(ticket))
    ticket.cancel()
    until = time.monotonic() + 20
    while metric(url, "vllm:num_requests_running") > 0:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert runner.load == (0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"attributes": {"tone": {"warm": 0.5}}},  # keys of random models cannot hold it
        {"attributes": {"tone": {"warm": -1.0}}},
        {"attributes": {"tone": "warm"}, "mixing": "logits"},
        {"user": "bo", "schedules": {"user": [(0, 1.0), (4, 0.0)]}},
        {"repetition_penalty": 1.2},
        {"num_beams": 2},
    ],
)
def test_unsupported_settings_are_refused_by_name(
    fields: Any, cp: ControlPrefix, runner: VllmRunner
) -> None:
    with pytest.raises(RequestError, match="server|this engine"):
        runner.submit(cp.resolve(Request(prompt="no", max_new_tokens=4, **fields)))


def test_a_fractional_strength_is_what_the_keys_hold(
    cp: ControlPrefix, runner: VllmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mass_in_keys, "_MAX_SHARE", 100.0)  # a random model's hold nothing well
    cp.put("user", "half", runner._masses.scaled(cp.get("user", "ana"), 0.5))
    how: dict[str, Any] = {"prompt": "tell me a story ", "max_new_tokens": 24}
    request = Request(**how, user="ana", strengths={"user": 0.5})
    expected = cp.generate(Request(**how, user="half")).text
    assert texts_of(cp, runner, [request, request]) == [expected, expected]
    assert expected != cp.generate(Request(**how, user="ana")).text


def test_the_benchmark_of_strengths_runs_for_one_round(
    cp: ControlPrefix, runner: VllmRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("vllm_strengths")
    strengths = (1.0, 2.0)  # exact there
    results = benchmark.measured(cp, runner, ["ana"], strengths, num_prompts=2, top=20)
    figures = results["ana"]
    assert list(figures) == ["1.0", "2.0"]
    assert all(abs(row["largest"]) < 1e-3 for row in figures.values())
    assert figures["2.0"]["strength 1"] > 1e-5
    written = {"options": {"dtype": "float32", "prompts": 2}, "divergences": results}
    about = {"command": "x", "commit": "y", "date": "z"}
    assert "| ana | 2.0 |" in benchmark.page({**written, **about})


def test_slots_count_against_the_context_there(cp: ControlPrefix, runner: VllmRunner) -> None:
    fits = Request(prompt="a" * 150, raw=True, user="dan", max_new_tokens=256 - 150 - 45)
    assert runner.submit(cp.resolve(fits)).result().num_tokens == cp.generate(fits).num_tokens
    with pytest.raises(ContextLengthError, match="beside 45 slots"):
        runner.submit(cp.resolve(fits.model_copy(update={"max_new_tokens": 256 - 150 - 44})))


def test_a_limit_that_was_left_out_fits_beside_the_slots(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    request = Request(prompt="a" * 150, raw=True, user="dan", logit_bias={1: -100})
    assert runner.submit(cp.resolve(request)).result().num_tokens == 256 - 150 - 45


def test_json_keeps_to_its_schema_there_with_the_rows_prefix(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    # Without blanks, which a random model would write without end.
    schema = {"enum": ["yes", "no", "perhaps"]}
    requests = [
        Request(prompt="hello", user=user, max_new_tokens=60, json_schema=schema)
        for user in ("bo", "dan")
    ]
    tickets = [runner.submit(cp.resolve(request)) for request in requests]
    for ticket in tickets:
        assert json.loads(ticket.result().text) in schema["enum"]


@pytest.fixture
def gateway_url(cp: ControlPrefix, url: str, folder: Path) -> Iterator[str]:
    """The URL of a gateway in front of that server."""
    gateway = Server(
        cp.frozen_model,
        f"sqlite:///{folder}/store.db",
        name="tiny",
        open_tenant="default",
        runner=cp.vllm_runner(url, folder / "prefixes", key_file=folder / "key"),
    )
    server = uvicorn.Server(uvicorn.Config(create_app(gateway), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_the_gateway_serves_openais_client_and_takes_no_orders_from_it(
    cp: ControlPrefix, gateway_url: str, runner: VllmRunner
) -> None:
    client = openai.OpenAI(base_url=f"{gateway_url}/v1", api_key="none", max_retries=0)
    expected = cp.generate(Request(prompt="hello", user="bo", task="email", max_new_tokens=12))

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model="tiny/email",
            user="bo",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            temperature=0,
            **more,
        )

    answer = ask()
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens  # slots are no tokens
    other = placed(runner, cp.resolve(Request(prompt="x", user="cleo")))
    orders = {
        "kv_transfer_params": {"controlprefix": {"file": other.file_name, "num_slots": 32}},
        "cache_salt": other.salt,
        "prompt_token_ids": [1, 2, 3],
        "vllm_xargs": {"kv_transfer_params": "x"},
    }
    for name, value in orders.items():
        with pytest.raises(openai.BadRequestError, match=name):
            ask(extra_body={name: value})
    pieces = [c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices]
    assert "".join(pieces) == expected.text
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [item.choices[0].message.content for item in pool.map(lambda _: ask(), range(8))]
    assert texts == [expected.text] * 8
    assert httpx.get(f"{gateway_url}/ready").status_code == 200


def test_a_label_of_no_weight_is_absent_in_any_mixing(
    cp: ControlPrefix, runner: VllmRunner
) -> None:
    absent = {"attributes": {"tone": {"warm": 0.0}}, "mixing": "logits"}
    request = Request(prompt="tell me a story ", user="bo", max_new_tokens=8, **absent)
    assert runner.submit(cp.resolve(request)).result().text == cp.generate(request).text


def test_another_model_or_folder_is_noticed(
    cp: ControlPrefix, url: str, folder: Path, tmp_path: Path
) -> None:
    other = ControlPrefix.from_pretrained(
        build("llama", head_dim=32, seed=5), tokenizer=CHAT, store="sqlite://"
    )
    with pytest.raises(EngineError, match="another model"):
        other.vllm_runner(url, folder / "prefixes", key_file=folder / "key")
    for place in (folder / "prefixes", tmp_path):  # without the key, and another one
        with pytest.raises(EngineError, match="the same folder, with the same key"):
            cp.vllm_runner(url, place)
    with pytest.raises(EngineError, match="no vLLM answers"):
        other.vllm_runner("http://127.0.0.1:9", tmp_path)
