"""The effect of smaller storage dtypes: bytes of a prefix, and NLL of held-out completions.

Prefixes are trained for a task and its labels, stored in each dtype, and read back.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from controlprefix.data import as_examples
from controlprefix.prefixes import Kind, StorageDtype

from lib.models import add_model_options, engine, load_from
from lib.results import ROOT, arguments, describe, save

DATA = ROOT / "controlprefix" / "cli" / "demo_data"
DTYPES: tuple[StorageDtype, ...] = ("float32", "bfloat16", "float16", "int8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    cp = engine(frozen)
    examples = as_examples(DATA / "messages.train.jsonl")
    cp.train(examples, steps=options.steps, num_slots=16, validation=0, seed=0, progress=False)
    kinds: tuple[Kind, ...] = ("task", "attribute")
    prefixes = {(kind, name): cp.get(kind, name) for kind in kinds for name in cp.names(kind)}
    held_out = list(as_examples(DATA / "messages.heldout.jsonl"))
    dtypes: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        for (kind, name), prefix in prefixes.items():
            cp.put(kind, name, prefix, dtype=dtype)
        scores = cp.score(held_out)
        nll = -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)
        size = cp.version_info("task", cp.names("task")[0]).size_bytes
        dtypes[dtype] = {"bytes of 16 slots": size, "nats per token": round(nll, 4)}
    table = Table("dtype", "bytes of 16 slots", "nats per token, held out")
    for name, figures in dtypes.items():
        table.add_row(name, f"{figures['bytes of 16 slots']:,}", f"{figures['nats per token']:.4f}")
    Console().print(table)
    settings = {"model": describe(frozen), "steps": options.steps, "seed": 0}
    save(options.results, "storage-dtypes", {**settings, "dtypes": dtypes})


if __name__ == "__main__":
    main()
