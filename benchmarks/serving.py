"""A server under load: requests come when they come, from users drawn by Zipf's law.

Servers run in processes of their own; this one sends. Contenders take turns, round by round:
first as fast as they can (so many requests at a time), for tokens a second; then requests at
random moments, seven tenths of what the server without prefixes can take, for the time to the
first token and between tokens. With `--engine vllm`, run where vLLM is installed
(`make test-vllm` makes that), the contenders go through vLLM.

Run it with `python benchmarks/serving.py`; it makes a store of as many users as `--users` says.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from side_by_side import record

from controlprefix import ControlPrefix, Prefix
from controlprefix.model.loading import packaged_model
from controlprefix.store import NewVersion, PrefixKey

SLOTS = 16
PROMPT = "The weather report for tomorrow, as it was read on the radio this evening, said that "
SKEW = 1.1  # of Zipf's law
START_S = 300


@dataclass
class Load:
    """What came of the requests sent to one contender in one round.

    Attributes:
        firsts, gaps: Seconds to the first text, and between pieces, of each request.
    """

    seconds: float = 0.0
    tokens: int = 0
    failed: int = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


Ask = Callable[[random.Random], tuple[str, dict[str, Any]]]  # a URL, and what to send there


def zipf(count: int) -> Callable[[random.Random], int]:
    """Draws users 0 to `count` - 1, the first most often."""
    weights = [1 / (i + 1) ** SKEW for i in range(count)]
    total = list(_running_sums(weights))
    return lambda rng: rng.choices(range(count), cum_weights=total)[0]


def _running_sums(values: Sequence[float]) -> Iterator[float]:
    total = 0.0
    for value in values:
        total += value
        yield total


def body(options: argparse.Namespace, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": options.new_tokens,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def one(client: httpx.AsyncClient, url: str, what: dict[str, Any], load: Load) -> None:
    began = last = time.perf_counter()
    pieces: list[float] = []
    try:
        async with client.stream("POST", url, json=what) as answer:
            if answer.status_code != 200:
                load.failed += 1
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("usage"):
                    load.tokens += chunk["usage"]["completion_tokens"]
                if any(choice.get("text") for choice in chunk.get("choices", ())):
                    now = time.perf_counter()
                    pieces.append(now - last)
                    last = now
    except httpx.HTTPError:
        load.failed += 1
        return
    if pieces:
        load.firsts.append(pieces[0])
        if len(pieces) > 1:
            load.gaps.append((last - began - pieces[0]) / (len(pieces) - 1))


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))


async def saturated(ask: Ask, options: argparse.Namespace, seed: int) -> Load:
    """So many requests at a time, until the time is over; then those that run are finished."""
    load, rng = Load(), random.Random(seed)
    until = time.perf_counter() + options.seconds

    async def worker(http: httpx.AsyncClient) -> None:
        while time.perf_counter() < until:
            await one(http, *ask(rng), load)

    async with client() as http:
        began = time.perf_counter()
        await asyncio.gather(*(worker(http) for _ in range(options.at_once)))
        load.seconds = time.perf_counter() - began
    return load


async def open_loop(ask: Ask, rate: float, options: argparse.Namespace, seed: int) -> Load:
    """Requests at random moments (Poisson), whether or not those before are done."""
    load, rng = Load(), random.Random(seed)
    began = time.perf_counter()
    tasks = []
    async with client() as http:
        while time.perf_counter() < began + options.seconds:
            tasks.append(asyncio.create_task(one(http, *ask(rng), load)))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - began
    return load


# --- servers ------------------------------------------------------------------------------


@contextlib.contextmanager
def process(command: Sequence[str], url: str, log: Path, **more: str) -> Iterator[str]:
    """A server, from when it answers `/health` to the end of the block."""
    with log.open("w") as output:
        running = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **more}
        )
        try:
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if running.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{command[2]} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            running.terminate()
            running.wait()


def gateway(port: int, store: str, log: Path, *more: str) -> contextlib.AbstractContextManager[str]:
    command = [sys.executable, "-m", "controlprefix.cli", "serve", "--tenant", "default"]
    command += ["--store", store, "--port", str(port), "--max-waiting", "4096", *more]
    return process(command, f"http://127.0.0.1:{port}", log)


def vllm(port: int, folder: Path, log: Path, rows: int) -> contextlib.AbstractContextManager[str]:
    transfer = {
        "kv_connector": "ControlPrefixConnector",
        "kv_connector_module_path": "controlprefix.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(folder)},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(packaged_model("smollm2")), "--served-model-name", "smollm2"]
    command += ["--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", str(rows)]
    command += ["--block-size", "32", "--kv-transfer-config", json.dumps(transfer)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return process(command, f"http://127.0.0.1:{port}", log, **settings)


def peft_server(port: int) -> None:
    """What one would write with PEFT: `generate` for a request at a time, its adapter set."""
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    from controlprefix.model.loading import load

    found, tokenizer = load("smollm2")
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=SLOTS)
    model = get_peft_model(found, config, adapter_name="0").eval()
    for i in range(1, 8):
        model.add_adapter(str(i), config)
    lock, app = threading.Lock(), FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/completions")
    def complete(asked: dict[str, Any]) -> Any:
        from fastapi.responses import PlainTextResponse

        ids = tokenizer(asked["prompt"], return_tensors="pt")
        with lock, torch.no_grad():
            model.set_adapter(str(int(asked["user"]) % 8))
            out = model.generate(**ids, max_new_tokens=asked["max_tokens"], do_sample=True)
        new = out.shape[1] - ids["input_ids"].shape[1]
        text = {"choices": [{"text": "whole"}], "usage": {"completion_tokens": new}}
        return PlainTextResponse(f"data: {json.dumps(text)}\n\n")

    uvicorn.run(app, port=port, log_level="error")


def make_users(store: str, count: int) -> None:
    """Random prefixes, a hundred at a time."""
    cp = ControlPrefix.from_pretrained("smollm2", store=store)
    begun = len(cp.names("user"))
    for first in range(begun, count, 100):
        cp.store.put(
            [
                NewVersion(
                    PrefixKey("user", str(i)),
                    Prefix.random(cp.geometry, num_slots=SLOTS, seed=i),
                    {},
                    None,
                    "bfloat16",
                )
                for i in range(first, min(first + 100, count))
            ]
        )
    cp.store.close()


# --- contenders ---------------------------------------------------------------------------


def contenders(
    options: argparse.Namespace, url: str, other: str | None
) -> dict[str, tuple[Ask, bool]]:
    """Name -> what to ask, and whether it is asked at random moments too."""

    def plain(rng: random.Random) -> tuple[str, dict[str, Any]]:
        return f"{url}/v1/completions", body(options, "smollm2")

    found: dict[str, tuple[Ask, bool]] = {"no prefix": (plain, True)}
    for count in options.users:
        drawn = zipf(count)

        def user(rng: random.Random, draw: Any = drawn) -> tuple[str, dict[str, Any]]:
            return f"{url}/v1/completions", body(options, "smollm2", user=str(draw(rng)))

        found[f"{count:,} users"] = (user, True)
    if options.engine == "vllm":

        def longer(rng: random.Random) -> tuple[str, dict[str, Any]]:
            words = " ".join(str(rng.randrange(10)) for _ in range(SLOTS // 2))  # 2 tokens each
            return f"{url}/v1/completions", body(options, "smollm2", prompt=f"{words} {PROMPT}")

        found[f"{SLOTS} more tokens of text"] = (longer, True)
    if other is not None:

        def peft(rng: random.Random) -> tuple[str, dict[str, Any]]:
            return f"{other}/v1/completions", body(options, "", user=str(rng.randrange(8)))

        found["PEFT, one generate a request"] = (peft, False)
    return found


def run(options: argparse.Namespace, asks: dict[str, tuple[Ask, bool]]) -> dict[str, Any]:
    rounds: dict[str, list[Load]] = {name: [] for name in asks}
    for ask, _ in asks.values():  # warm up, outside what is measured
        asyncio.run(saturated(ask, argparse.Namespace(**{**vars(options), "seconds": 3}), 99))
    for i in range(options.rounds):
        names = list(asks)[i % len(asks) :] + list(asks)[: i % len(asks)]
        for name in names:
            rounds[name].append(asyncio.run(saturated(asks[name][0], options, i)))
            print(name, round(rounds[name][-1].tokens / rounds[name][-1].seconds, 1), flush=True)
    first = next(iter(asks))
    speeds = {n: [load.tokens / load.seconds for load in loads] for n, loads in rounds.items()}
    rate = 0.7 * statistics.median(speeds[first]) / options.new_tokens
    opened: dict[str, list[Load]] = {name: [] for name, (_, both) in asks.items() if both}
    for i in range(options.rounds):
        for name in opened:
            opened[name].append(asyncio.run(open_loop(asks[name][0], rate, options, 100 + i)))
    found: dict[str, Any] = {"rate": round(rate, 2), "contenders": {}}
    for name, loads in rounds.items():
        ratios = [a / b for a, b in zip(speeds[name], speeds[first], strict=True)]
        figures: dict[str, Any] = {
            "tokens a second": round(statistics.median(speeds[name]), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(one, 3) for one in ratios],
            "failed": sum(load.failed for load in [*loads, *opened.get(name, [])]),
        }
        if name in opened:
            firsts = sorted(x for load in opened[name] for x in load.firsts)
            gaps = sorted(x for load in opened[name] for x in load.gaps)
            for title, values in (("first text", firsts), ("each token", gaps)):
                figures[f"{title} p50"] = round(at_share(values, 0.5), 4)
                figures[f"{title} p99"] = round(at_share(values, 0.99), 4)
        found["contenders"][name] = figures
    return found


def at_share(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--users", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--seconds", type=float, default=15.0, help="of a contender in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=16, help="requests, as fast as it can")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--store", help="kept for the next time; left out, made for this one")
    parser.add_argument("--peft-server", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft_server:
        peft_server(options.peft_server)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = options.store or f"sqlite:///{folder}/users.db"
        make_users(store, max(options.users))
        other = None
        if options.engine == "vllm":
            served = stack.enter_context(
                vllm(8711, folder / "prefixes", folder / "vllm.log", options.at_once)
            )
            more = ["--engine", "vllm", "--vllm-url", served]
            more += ["--vllm-prefixes", str(folder / "prefixes")]
        else:
            more = ["--max-sequences", str(options.at_once)]
            command = [sys.executable, __file__, "--peft-server", "8712"]
            other = stack.enter_context(
                process(command, "http://127.0.0.1:8712", folder / "peft.log")
            )
        url = stack.enter_context(gateway(8710, store, folder / "gateway.log", *more))
        found = run(options, contenders(options, url, other))
    table = Table("contender", "tokens/s", "against no prefix", "first text p50, p99", "token p50")
    for name, one in found["contenders"].items():
        spread = f"{one['ratio']:.2f} ({min(one['ratios']):.2f} to {max(one['ratios']):.2f})"
        table.add_row(
            name,
            f"{one['tokens a second']:.0f}",
            spread,
            f"{one.get('first text p50', float('nan')):.2f}, {one.get('first text p99', 0):.2f}",
            f"{one.get('each token p50', float('nan')):.3f}",
        )
    Console(width=130).print(table)
    name = "serving" if options.engine == "transformers" else "serving_vllm"
    kept = ("seconds", "rounds", "at_once", "new_tokens")
    record(name, {"options": {key: getattr(options, key) for key in kept}, **found})


if __name__ == "__main__":
    main()
