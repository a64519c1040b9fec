"""Fetching and assembling a mixed batch, against one decode step of that batch.

Prefixes are in memory (warm); the store is asked for the current versions, as always.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from decoding import Decoder
from torch.profiler import ProfilerActivity, profile

from controlprefix import ControlPrefix, PrefixBatch, Request

from lib.interleaved import Measures, compare, timed
from lib.models import add_model_options, engine, load_from, random_prefix
from lib.results import arguments, save_comparisons


def assembled(cp: ControlPrefix, rows: int) -> PrefixBatch:
    """What `generate` does before it calls the model, for users with one task and three labels."""
    requests = [
        Request(prompt="x", task="note", attributes={"tone": f"t{i % 3}"}, user=f"user{i}")
        for i in range(rows)
    ]
    with cp.assembled(requests) as batch:
        return batch


def decode_step(decoder: Decoder) -> Measures:
    """One decode step."""
    return {"seconds": decoder.next()["next token seconds"]}


def allocated(cp: ControlPrefix, rows: int) -> str:
    """Bytes that torch allocates to assemble, as a multiple of the batch's size."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = assembled(cp, rows)
    num_bytes = sum(max(e.self_cpu_memory_usage, 0) for e in profiler.key_averages())
    size = sum(
        tensor.untyped_storage().nbytes()
        for blocks in batch.blocks.values()
        for block in blocks
        for tensor in (*block.keys, *block.values)
    )
    return (
        f"{rows} rows: assembly allocates {num_bytes / size:.2f} times the size of its result "
        f"({size / (1 << 20):.1f} MiB)"
    )


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=30)
    add_model_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-slots", type=int, default=16)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    with tempfile.TemporaryDirectory() as folder:
        cp = engine(frozen, f"sqlite:///{Path(folder) / 'prefixes.db'}")
        cp.put("task", "note", random_prefix(cp.model, options.num_slots, 0))
        for i in range(3):
            cp.put("attribute", f"tone=t{i}", random_prefix(cp.model, options.num_slots, 100 + i))
        for i in range(max(options.rows)):
            cp.put("user", f"user{i}", random_prefix(cp.model, options.num_slots, 200 + i))
        comparisons, notes = [], []
        for rows in options.rows:
            decoder = Decoder(cp.model, assembled(cp, rows), rows, 24)
            decoder.first()
            pair: dict[str, Callable[[], Measures]] = {
                "one decode step": partial(decode_step, decoder),
                "fetch and assembly": timed(partial(assembled, cp, rows)),
            }
            comparisons += compare(f"{rows} rows", pair, rounds=options.rounds)
            notes.append(allocated(cp, rows))
        cp.store.close()
    notes += [
        f"{row.case}: fetch and assembly take {row.value / row.reference:.1%} of a decode step"
        for row in comparisons
    ]
    save_comparisons(
        options.results,
        "assembly",
        comparisons,
        reference="one decode step",
        model=frozen,
        notes=notes,
    )


if __name__ == "__main__":
    main()
