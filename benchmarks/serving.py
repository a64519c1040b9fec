"""Servers under load: users drawn from a Zipf distribution, requests at random times.

Each server is a process of its own; this process sends the requests. Contenders take turns: first
with a fixed number of concurrent requests, for tokens per second; then with Poisson arrivals at
0.7 of the rate that the first contender can serve, for the latency of the first and of each
following text. With `--engine vllm`, to be run where vLLM is installed, requests go through vLLM.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lib.load import (
    NUM_SLOTS,
    PROMPT,
    Load,
    Workload,
    body,
    closed_loop,
    open_loop,
    own_server,
    quantile,
    store_users,
    zipf,
)
from lib.models import load as load_model
from lib.results import arguments, save
from lib.servers import server, vllm_server

PEFT_ADAPTERS = 8


def serve_peft(port: int) -> None:
    """A server as a user of PEFT would write it: one `generate` per request, its adapter set."""
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    from controlprefix.model.loading import load

    loaded = load("smollm2")
    base, tokenizer = loaded.model, loaded.tokenizer
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_SLOTS)
    model: Any = get_peft_model(base, config, adapter_name="0").eval()
    for i in range(1, PEFT_ADAPTERS):
        model.add_adapter(str(i), config)
    lock, app = threading.Lock(), FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/completions")
    def complete(fields: dict[str, Any]) -> Any:
        inputs = tokenizer(fields["prompt"], return_tensors="pt")
        with lock, torch.no_grad():
            model.set_adapter(str(int(fields["user"]) % PEFT_ADAPTERS))
            output = model.generate(**inputs, max_new_tokens=fields["max_tokens"], do_sample=True)
        num_new = output.shape[1] - inputs["input_ids"].shape[1]
        chunk = {"choices": [{"text": "whole"}], "usage": {"completion_tokens": num_new}}
        return PlainTextResponse(f"data: {json.dumps(chunk)}\n\n")

    uvicorn.run(app, port=port, log_level="error")


# --- contenders ---------------------------------------------------------------------------


def workloads(options: argparse.Namespace, url: str, peft_url: str | None) -> dict[str, Workload]:
    """Name -> what is requested."""

    def plain(rng: random.Random) -> tuple[str, dict[str, Any]]:
        return f"{url}/v1/completions", body(options, "smollm2")

    contenders: dict[str, Workload] = {"no prefix": plain}
    for num_users in options.users:
        draw_user = zipf(num_users)

        def user(rng: random.Random, draw: Any = draw_user) -> tuple[str, dict[str, Any]]:
            return f"{url}/v1/completions", body(options, "smollm2", user=str(draw(rng)))

        contenders[f"{num_users:,} users"] = user
    if options.engine == "vllm":

        def longer(rng: random.Random) -> tuple[str, dict[str, Any]]:
            digits = " ".join(
                str(rng.randrange(10)) for _ in range(NUM_SLOTS // 2)
            )  # 2 tokens each
            fields = body(options, "smollm2", prompt=f"{digits} {PROMPT}")
            return f"{url}/v1/completions", fields

        contenders[f"{NUM_SLOTS} more tokens of text"] = longer
    if peft_url is not None:

        def peft(rng: random.Random) -> tuple[str, dict[str, Any]]:
            user = str(rng.randrange(PEFT_ADAPTERS))
            return f"{peft_url}/v1/completions", body(options, "", user=user)

        contenders[PEFT] = peft
    return contenders


PEFT = "PEFT, one generate per request"


def measure(options: argparse.Namespace, contenders: dict[str, Workload]) -> dict[str, Any]:
    """Tokens per second and latencies of all contenders, which take turns."""
    warm_up = argparse.Namespace(**{**vars(options), "seconds": min(3.0, options.seconds)})
    for workload in contenders.values():
        asyncio.run(closed_loop(workload, warm_up, 99))
    loads: dict[str, list[Load]] = {name: [] for name in contenders}
    for i in range(options.rounds):
        shift = i % len(contenders)
        for name in [*list(contenders)[shift:], *list(contenders)[:shift]]:
            load = asyncio.run(closed_loop(contenders[name], options, i))
            loads[name].append(load)
            print(f"{name}: {load.num_tokens / load.seconds:.1f} tokens/s", flush=True)
    speeds = {
        name: [load.num_tokens / load.seconds for load in rounds] for name, rounds in loads.items()
    }
    reference = speeds["no prefix"]
    rate = 0.7 * statistics.median(reference) / options.new_tokens
    open_loads: dict[str, list[Load]] = {name: [] for name in contenders if name != PEFT}
    for i in range(options.rounds):
        for name, rounds in open_loads.items():
            rounds.append(asyncio.run(open_loop(contenders[name], rate, options, 100 + i)))
    results: dict[str, Any] = {"requests per second": round(rate, 2), "contenders": {}}
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        rounds = open_loads.get(name, [])
        figures: dict[str, Any] = {
            "tokens per second": round(statistics.median(values), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "failed": sum(load.num_failed for load in [*loads[name], *rounds]),
        }
        latencies = {
            "first text": sorted(x for load in rounds for x in load.first_s),
            "each token": sorted(x for load in rounds for x in load.gaps_s),
        }
        for title, seconds in latencies.items():
            if seconds:
                figures[f"{title} p50"] = round(quantile(seconds, 0.5), 4)
                figures[f"{title} p99"] = round(quantile(seconds, 0.99), 4)
        results["contenders"][name] = figures
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--users", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--seconds", type=float, default=15.0, help="of a contender in a round")
    parser.add_argument("--concurrency", type=int, default=16, help="concurrent requests")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--store", help="URL of a store that is kept; left out, a temporary one")
    parser.add_argument("--peft-port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peft_port:
        serve_peft(options.peft_port)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = options.store or f"sqlite:///{folder}/users.db"
        store_users(load_model("smollm2"), store, max(options.users))
        peft_url = None
        if options.engine == "vllm":
            vllm_url = stack.enter_context(
                vllm_server(
                    8711,
                    folder / "prefixes",
                    folder / "vllm.log",
                    *("--max-num-seqs", str(options.concurrency)),
                )
            )
            more = ["--engine", "vllm", "--vllm-url", vllm_url]
            more += ["--vllm-prefixes", str(folder / "prefixes")]
        else:
            more = ["--max-sequences", str(options.concurrency)]
            command = [sys.executable, __file__, "--peft-port", "8712"]
            peft_url = stack.enter_context(server(command, 8712, folder / "peft.log"))
        url = stack.enter_context(own_server(8710, store, folder / "server.log", *more))
        results = measure(options, workloads(options, url, peft_url))
    table = Table("contender", "tokens/s", "against no prefix", "first text p50, p99 (s)")
    for name, figures in results["contenders"].items():
        low, high = min(figures["ratios"]), max(figures["ratios"])
        latencies = [figures.get(f"first text {share}", float("nan")) for share in ("p50", "p99")]
        table.add_row(
            name,
            f"{figures['tokens per second']:.0f}",
            f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})",
            ", ".join(f"{value:.2f}" for value in latencies),
        )
    Console(width=130).print(table)
    settings = ("seconds", "rounds", "concurrency", "new_tokens")
    about = {name: getattr(options, name) for name in settings}
    save(options.results, f"serving-{options.engine}", {"options": about, **results})


if __name__ == "__main__":
    main()
