"""Fetching and assembling a mixed batch, beside one decoding step of that batch.

Prefixes are in memory (warm); the store is asked, as always, for the current versions.
Run it with `python benchmarks/assemble.py`.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from generate import Contender
from shapes import prefix
from side_by_side import Measures, compare, now, report
from torch.profiler import ProfilerActivity, profile

from controlprefix import ControlPrefix, Request
from controlprefix.prefixes.assembly import PrefixBatch


def requests(rows: int) -> list[Request]:
    """Different users, one task, one of three labels."""
    return [
        Request(prompt="x", task="note", attributes={"tone": f"t{i % 3}"}, user=f"user{i}")
        for i in range(rows)
    ]


def assembled(cp: ControlPrefix, rows: int) -> PrefixBatch:
    """What `generate` does before it calls the model."""
    with cp.assembled(requests(rows)) as batch:
        return batch


def once(cp: ControlPrefix, rows: int) -> Measures:
    """Fetch and assembly of one mixed batch."""
    asked = requests(rows)
    began = now()
    with cp.assembled(asked):
        return {"seconds": now() - began}


def step(contender: Contender) -> Measures:
    """One decoding step."""
    return {"seconds": contender.next()["next token seconds"]}


def copies(cp: ControlPrefix, rows: int) -> str:
    """How many bytes torch allocates to assemble, beside the slots' own."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        batch = assembled(cp, rows)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in seen.key_averages())
    own = sum(
        t.untyped_storage().nbytes()
        for blocks in batch.blocks.values()
        for block in blocks
        for t in (*block.keys, *block.values)
    )
    return (
        f"{rows} rows: assembly allocates {allocated / own:.2f} times the bytes of its result "
        f"({own / (1 << 20):.1f} MiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{Path(folder) / 'prefixes.db'}"
        cp = ControlPrefix.from_pretrained("smollm2", store=store)
        cp.put("task", "note", prefix(cp.model, options.num_slots, 0))
        for i in range(3):
            cp.put("attribute", f"tone=t{i}", prefix(cp.model, options.num_slots, 100 + i))
        for i in range(max(options.rows)):
            cp.put("user", f"user{i}", prefix(cp.model, options.num_slots, 200 + i))
        found, notes = [], []
        for rows in options.rows:
            contender = Contender(cp.model, assembled(cp, rows), rows, 24)
            contender.first()
            both = {
                "one decoding step": partial(step, contender),
                "fetch and assembly": partial(once, cp, rows),
            }
            found += compare(f"{rows} rows", both, rounds=options.rounds)
            notes.append(copies(cp, rows))
    notes += [
        f"{one.case}: fetch and assembly take {one.value / one.reference:.1%} of a decoding step"
        for one in found
    ]
    report("assemble", found, reference="one decoding step", notes=notes)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
