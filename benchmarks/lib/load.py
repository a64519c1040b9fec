"""Requests under load: users drawn from a Zipf distribution, at random times or at once."""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from controlprefix import Prefix
from controlprefix.model import FrozenModel
from controlprefix.prefixes import PrefixKey
from controlprefix.store import NewVersion

from lib.models import engine
from lib.servers import server

NUM_SLOTS = 16
PROMPT = "The weather report for tomorrow, as it was read on the radio this evening, said that "
ZIPF_EXPONENT = 1.1

# Draws a request: its URL and its body.
Workload = Callable[[random.Random], tuple[str, dict[str, Any]]]


@dataclass
class Load:
    """The outcome of the requests sent to one contender in one round.

    Attributes:
        seconds: Duration of the round.
        num_tokens, num_failed: Generated tokens, and requests that failed.
        first_s, gaps_s: Per request, seconds to the first text; seconds between texts.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    num_failed: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def zipf(num_users: int) -> Callable[[random.Random], int]:
    """A function that draws a user from 0 to `num_users` - 1, the first most often."""
    weights = [1 / (i + 1) ** ZIPF_EXPONENT for i in range(num_users)]
    cumulative = list(itertools.accumulate(weights))
    return lambda rng: rng.choices(range(num_users), cum_weights=cumulative)[0]


def body(options: argparse.Namespace, model: str, **fields: Any) -> dict[str, Any]:
    """The body of a streamed completion request."""
    return {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": options.new_tokens,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


async def send(client: httpx.AsyncClient, url: str, fields: dict[str, Any], load: Load) -> None:
    """Send one request, and add its outcome to the load."""
    start = last = time.perf_counter()
    times: list[float] = []
    try:
        async with client.stream("POST", url, json=fields) as response:
            if response.status_code != 200:
                load.num_failed += 1
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("usage"):
                    load.num_tokens += chunk["usage"]["completion_tokens"]
                if any(choice.get("text") for choice in chunk.get("choices", ())):
                    last = time.perf_counter()
                    times.append(last)
    except httpx.HTTPError:
        load.num_failed += 1
        return
    if times:
        load.first_s.append(times[0] - start)
        if len(times) > 1:
            load.gaps_s.append((last - times[0]) / (len(times) - 1))


def http_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))


async def closed_loop(workload: Workload, options: argparse.Namespace, seed: int) -> Load:
    """Keep a fixed number of requests running for some seconds, then let them finish."""
    load, rng = Load(), random.Random(seed)
    end = time.perf_counter() + options.seconds

    async def worker(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < end:
            await send(client, *workload(rng), load)

    async with http_client() as client:
        start = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(options.concurrency)))
        load.seconds = time.perf_counter() - start
    return load


async def open_loop(
    workload: Workload, rate: float, options: argparse.Namespace, seed: int
) -> Load:
    """Send requests at random times (Poisson), whether or not earlier ones are done."""
    load, rng = Load(), random.Random(seed)
    start = time.perf_counter()
    tasks = []
    async with http_client() as client:
        while time.perf_counter() < start + options.seconds:
            tasks.append(asyncio.create_task(send(client, *workload(rng), load)))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - start
    return load


def own_server(
    port: int, store: str, log: Path, *options: str
) -> contextlib.AbstractContextManager[str]:
    """`controlprefix serve`."""
    return server(server_command(port, store, *options), port, log)


def server_command(port: int, store: str, *options: str) -> list[str]:
    """The command line of `controlprefix serve` for the default tenant."""
    command = [sys.executable, "-m", "controlprefix.cli", "serve", "--tenant", "default"]
    return [*command, "--store", store, "--port", str(port), "--max-waiting", "4096", *options]


def store_users(frozen: FrozenModel, store: str, num_users: int) -> None:
    """Store random prefixes of users 0 to `num_users` - 1, a hundred at a time."""
    cp = engine(frozen, store)
    for first in range(len(cp.names("user")), num_users, 100):
        cp.store.put(
            [
                NewVersion(
                    PrefixKey("user", str(i)),
                    Prefix.random(cp.geometry, num_slots=NUM_SLOTS, seed=i),
                    dtype="bfloat16",
                )
                for i in range(first, min(first + 100, num_users))
            ]
        )
    cp.store.close()


def quantile(values: Sequence[float], share: float) -> float:
    """The value at a share of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))]
