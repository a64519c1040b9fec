"""What `controlprefix capacity` computes, against a server that runs.

A store of users, and one server process. First its tokens per second are measured, with as many
concurrent requests as it runs; from them the rate of requests that the computation gives one
process. Then requests arrive at random times at shares of that rate: the waiting queue must stay
short at the whole of it. Memory and the size of the store are compared with the computed ones.
"""

import argparse
import asyncio
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlprefix import capacity

from lib.load import (
    NUM_SLOTS,
    PROMPT,
    body,
    closed_loop,
    open_loop,
    quantile,
    server_command,
    store_users,
    zipf,
)
from lib.models import add_model_options, folder_of, load_from
from lib.results import arguments, describe, save
from lib.servers import Process, free_port
from lib.tables import header, line

SHARES = (0.5, 1.0, 1.5)  # 1.5 is a little more than what a process can do


def computed(
    options: argparse.Namespace, speed: float, requests_per_second: float
) -> capacity.Capacity:
    """What the library computes for one process of this speed."""
    frozen = load_from(options)
    return capacity.capacity(
        capacity.Workload.for_model(
            frozen,
            users=options.users,
            num_slots=NUM_SLOTS,
            storage_format="bfloat16",
            requests_per_second=requests_per_second,
            prompt_tokens=len(frozen.tokenizer(PROMPT)["input_ids"]),
            new_tokens=options.new_tokens,
            tokens_per_second=speed,
            max_sequences=options.concurrency,
        )
    )


def peak_bytes(process: Process) -> int:
    """The most memory that a running process has had."""
    assert process.running is not None
    lines = Path(f"/proc/{process.running.pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024


def under_load(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The speed with all sequences busy, and latencies at shares of the computed rate."""
    draw = zipf(options.users)

    def workload(rng: random.Random) -> tuple[str, dict[str, Any]]:
        return f"{url}/v1/completions", body(options, "m", user=str(draw(rng)))

    asyncio.run(closed_loop(workload, argparse.Namespace(**vars(options) | {"seconds": 2}), 99))
    full = asyncio.run(closed_loop(workload, options, 0))
    speed = full.num_tokens / full.seconds
    rate = 1.0
    while computed(options, speed, rate).num_processes > 1:
        rate *= 0.99
    while computed(options, speed, rate * 1.01).num_processes == 1:
        rate *= 1.01
    results: dict[str, Any] = {"tokens per second": speed, "requests per second": rate, "load": {}}
    for share in options.shares:
        load = asyncio.run(open_loop(workload, share * rate, options, 1))
        first = sorted(load.first_s)
        results["load"][str(share)] = {
            "requests": len(first),
            "failed": load.num_failed,
            "tokens per second": load.num_tokens / load.seconds,
            "first text p50": quantile(first, 0.5),
            "first text p99": quantile(first, 0.99),
        }
        print(share, results["load"][str(share)], flush=True)
    return results


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        line(
            f"{float(share):.1f}",
            f"{float(share) * results['requests per second']:.2f}",
            str(figures["requests"]),
            str(figures["failed"]),
            f"{figures['tokens per second']:.0f}",
            f"{figures['first text p50']:.2f}, {figures['first text p99']:.2f}",
        )
        for share, figures in results["load"].items()
    ]
    sizes = [
        line(name, f"{own / 1e6:,.0f}", f"{results['measured'][name] / 1e6:,.0f}")
        for name, own in results["computed"].items()
    ]
    options = results["options"]
    return "\n\n".join(
        [
            "# Computed capacity against a server",
            f"{results['model']}; {options['users']:,} users of {NUM_SLOTS} slots, prompts of "
            f"{len(PROMPT.split())} words, {options['new_tokens']} new tokens, "
            f"{options['concurrency']} sequences, one process and SQLite; the requests come from "
            f"the same machine ({results['machine']['threads']} threads). Written by "
            f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
            f"With every sequence busy it writes {results['tokens per second']:.0f} tokens per "
            f"second, for which `capacity` gives one process {results['requests per second']:.2f} "
            "requests per second. At shares of that rate, with random arrivals:",
            "\n".join(
                [
                    header("share", "requests/s", "requests", "failed", "tokens/s",
                           "first text: p50, p99 (s)"),
                    *rows,
                ]
            ),
            "\n".join([header("", "computed, MB", "measured, MB"), *sizes]),
        ]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--concurrency", type=int, default=16, help="sequences of the server")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, path = folder_of(options, folder / "m"), folder / "users.db"
        store_users(load_from(options), f"sqlite:///{path}", options.users)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        more = ("--model", model, "--served-model-name", "m", "--no-request-log")
        command = server_command(port, f"sqlite:///{path}", *more)
        command += ["--max-sequences", str(options.concurrency)]
        process = Process(command, folder / "log", f"{url}/ready")
        try:
            process.start()
            results = under_load(url, options)
            measured = {"memory": peak_bytes(process), "store": path.stat().st_size}
        finally:
            process.stop()
    own = computed(options, results["tokens per second"], results["requests per second"])
    settings = ("users", "seconds", "concurrency", "new_tokens")
    about = {
        "model": describe(load_from(options)),
        "options": {name: getattr(options, name) for name in settings},
    }
    sizes = {"memory": own.process_bytes, "store": own.store_bytes}
    save(
        options.results, "capacity", {**about, **results, "computed": sizes, "measured": measured},
        page,
    )  # fmt: skip


if __name__ == "__main__":
    main()
