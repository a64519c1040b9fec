"""What smaller payloads cost: bytes of a prefix, and nats per token of held-out completions.

Prefixes are trained for a task and its labels, stored in each dtype, and read back.

Run it with `python benchmarks/payloads.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side import record

from controlprefix import ControlPrefix
from controlprefix.interop import read_examples
from controlprefix.prefixes import Kind, StorageDtype

DATA = Path(__file__).parent.parent / "controlprefix" / "cli" / "demo_data"
DTYPES: tuple[StorageDtype, ...] = ("float32", "bfloat16", "float16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    cp = ControlPrefix.from_pretrained("smollm2", store="sqlite://")
    examples = read_examples(DATA / "messages.train.jsonl")
    cp.train(examples, steps=options.steps, num_slots=16, validation=0, seed=0)
    kinds: tuple[Kind, ...] = ("task", "attribute")
    trained = {(kind, name): cp.get(kind, name) for kind in kinds for name in cp.names(kind)}
    held_out = read_examples(DATA / "messages.heldout.jsonl")
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        for (kind, name), prefix in trained.items():
            cp.put(kind, name, prefix, dtype=dtype)
        scores = cp.score(held_out)
        nats = -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)
        (kind, name), *_ = trained
        size = cp.versions(kind, name)[-1].size_bytes
        results[dtype] = {"bytes of 16 slots": size, "nats per token": round(nats, 4)}
    table = Table("payload", "bytes of 16 slots", "nats per token, held out", "against bfloat16")
    for stored_as, one in results.items():
        change = one["nats per token"] - results["bfloat16"]["nats per token"]
        table.add_row(
            stored_as,
            f"{one['bytes of 16 slots']:,}",
            f"{one['nats per token']:.4f}",
            f"{change:+.4f}",
        )
    Console().print(table)
    record("payloads", {"steps": options.steps, "seed": 0, "payloads": results})


if __name__ == "__main__":
    main()
