"""One tenant doing its worst, and what another tenant's requests take meanwhile.

A server in a process of its own; one key sends what is expensive, over and over, and another asks
for four tokens now and then. Times of the latter are compared with those while nobody else asks.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from controlprefix.store import PrefixStore

from lib.models import add_model_options, folder_of, load_from
from lib.results import arguments, describe, save
from lib.servers import free_port, server
from lib.tables import header, line

PAUSE_S = 0.3
ABANDONED_AFTER_S = 3.0
WRONG_BODY = b'{"messages": [' + b'{"x": 1234567},' * 65_000 + b"1]}"  # made once
WORDS = "the harbour board heard two reports on the old crane and the new square "


def served(model: str, store: str, log: Path, *options: str) -> AbstractContextManager[str]:
    """A server for API keys on a free port; yields its URL."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "controlprefix.cli", "serve", "--model", model, "--store", store),
        *("--port", str(port), "--no-request-log", "--max-sequences", "16"),
        *("--served-model-name", "m", *options),
    ]
    return server(command, port, log, path="/ready")


Client = httpx.AsyncClient
Attack = Callable[[Client, int], Awaitable[None]]  # one piece of it; a number for names


async def abandoned_prompts(client: Client, number: int, *, num_words: int) -> None:
    """Sixteen long prompts, given up after some seconds."""
    prompts = [f"{number} {i} {WORDS * (num_words // 14)}" for i in range(16)]
    body = {"model": "m", "prompt": prompts, "max_tokens": 16}
    with contextlib.suppress(httpx.TimeoutException):
        await client.post("/v1/completions", json=body, timeout=ABANDONED_AFTER_S)


async def many_choices(client: Client, number: int) -> None:
    """Sixteen choices of a prompt."""
    body = {
        "model": "m",
        "prompt": f"{number} {WORDS}",
        "max_tokens": 64,
        "n": 16,
        "temperature": 1,
    }
    await client.post("/v1/completions", json=body)


async def enrolments(client: Client, number: int) -> None:
    """An enrolment that trains."""
    texts = [f"{WORDS} {i}" for i in range(32)]
    await client.put(f"/v1/users/u{number}", json={"texts": texts, "refine": True})


async def wrong_bodies(client: Client, number: int) -> None:
    """A megabyte of JSON that is no request."""
    headers = {"Content-Type": "application/json"}
    await client.post("/v1/chat/completions", content=WRONG_BODY, headers=headers)


@asynccontextmanager
async def under(attack: Attack | None, client: Client, copies: int) -> AsyncIterator[None]:
    """While inside, so many copies of an attack are repeated."""
    numbers = iter(range(1 << 30))

    async def repeat() -> None:
        while attack is not None:
            with contextlib.suppress(httpx.HTTPError):
                await attack(client, next(numbers))
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(repeat()) for _ in range(copies)]
    try:
        if attack is not None:
            await asyncio.sleep(1.0)  # it is under way
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def times_of(client: Client, seconds: float) -> dict[str, Any]:
    """Seconds of four-token requests and of `/ready`, one after another."""
    requests: list[float] = []
    ready: list[float] = []
    num_failed = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not requests:
        start = time.perf_counter()
        body = {"model": "m", "prompt": "Good morning,", "max_tokens": 4, "temperature": 0}
        answer = await client.post("/v1/completions", json=body)
        num_failed += not answer.is_success
        requests.append(time.perf_counter() - start)
        start = time.perf_counter()
        await client.get("/ready")
        ready.append(time.perf_counter() - start)
        await asyncio.sleep(PAUSE_S)
    return {
        "requests": len(requests),
        "failed": num_failed,
        "median": statistics.median(requests),
        "worst": max(requests),
        "ready worst": max(ready),
    }


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    alone = results["measured"]["nobody else"]
    rows = [
        line(
            name,
            str(values["requests"]),
            str(values["failed"]),
            f"{values['median']:.2f} ({values['median'] / alone['median']:.1f})",
            f"{values['worst']:.2f} ({values['worst'] / alone['median']:.1f})",
            f"{values['ready worst']:.2f}",
        )
        for name, values in results["measured"].items()
    ]
    titles = ("one tenant sends", "requests", "failed", "median, s", "worst, s", "/ready, worst, s")
    return "\n\n".join(
        [
            "# One tenant beside another",
            f"{results['model']}; {results['seconds']} s per row, {results['machine']['threads']} "
            f"threads. Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            "What another tenant's request for four tokens takes meanwhile; in brackets, in units "
            "of the median while nobody else asks.",
            "\n".join([header(*titles), *rows]),
        ]
    )


def all_attacks(prompt_words: int) -> dict[str, tuple[Attack | None, int]]:
    """By name what one tenant does, and how many times at once."""

    async def long_prompts(client: Client, number: int) -> None:
        await abandoned_prompts(client, number, num_words=prompt_words)

    return {
        "nobody else": (None, 0),
        f"3 × 16 prompts of {prompt_words:,} words, abandoned": (long_prompts, 3),
        "20 requests with n=16": (many_choices, 20),
        "4 enrolments that train": (enrolments, 4),
        "4 × 1 MB of wrong JSON": (wrong_bodies, 4),
    }


async def measured(
    url: str,
    keys: Mapping[str, str],
    attacks: Mapping[str, tuple[Attack | None, int]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The row of the table for each of these attacks."""
    results = {}
    limits = httpx.Limits(max_connections=None)
    clients = [
        httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600, limits=limits
        )
        for key in keys.values()
    ]
    attacker, other = clients
    for name, (attack, copies) in attacks.items():
        await times_of(other, 0)
        async with under(attack, attacker, copies):
            results[name] = await times_of(other, options.seconds)
        if results[name]["failed"] == results[name]["requests"]:
            raise SystemExit(f"no request was answered: {name}")
        await asyncio.sleep(options.rest)  # the server finishes what it had
    for client in clients:
        await client.aclose()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.add_argument("--seconds", type=float, default=30, help="per row")
    parser.add_argument("--rest", type=float, default=10, help="seconds between rows")
    parser.add_argument("--prompt-words", type=int, default=5000)
    parser.add_argument(
        "--rows-per-tenant",
        type=int,
        default=4,
        help="--max-sequences-per-tenant of a second server",
    )
    options = parser.parse_args(argv)
    frozen = load_from(options)
    with tempfile.TemporaryDirectory() as folder:
        model, store = folder_of(options, Path(folder) / "m"), f"sqlite:///{folder}/prefixes.db"
        keys = {}
        for tenant in ("a", "b"):
            with PrefixStore(store, tenant=tenant) as own:
                keys[tenant] = own.create_api_key("web")
        attacks = all_attacks(options.prompt_words)
        with served(model, store, Path(folder) / "log") as url:
            results = asyncio.run(measured(url, keys, attacks, options))
        limit = ("--max-sequences-per-tenant", str(options.rows_per_tenant))
        again = {
            f"{name}, of which {options.rows_per_tenant} run": attack
            for name, attack in attacks.items()
            if attack[0] is many_choices
        }
        with served(model, store, Path(folder) / "log", *limit) as url:
            results |= asyncio.run(measured(url, keys, again, options))
    about = {"model": describe(frozen), "seconds": options.seconds}
    save(options.results, "tenants", {**about, "measured": results}, page)


if __name__ == "__main__":
    main()
