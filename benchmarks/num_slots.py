"""How many slots: prefixes trained at each length, and a long one shortened by attention.

A task prefix alone, on the formality sentences of `comparison.py` (DATA as there).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlprefix import ControlPrefix, Example
from controlprefix.model.attention_matching import matched
from controlprefix.model.slot_attention import QueryText, observe
from controlprefix.prefixes import PrefixKey
from controlprefix.training import ParameterizationName

from lib import plots
from lib.datasets import Row, load
from lib.models import add_model_options, engine, load_from
from lib.results import arguments, describe, save
from lib.tables import Column, table

PARAMETERIZATIONS: tuple[ParameterizationName, ...] = ("direct", "shared")
KEEP = 0.95


def as_examples(rows: Sequence[Row]) -> list[Example]:
    return [Example(prompt="", raw=True, completion=r.completion, task="sentence") for r in rows]


def nll(cp: ControlPrefix, examples: Sequence[Example]) -> float:
    """Nats per token of the completions."""
    scores = cp.score(examples)
    total = -sum(s.log_likelihood for s in scores)
    return round(total / sum(s.num_tokens for s in scores), 4)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows: dict[str, dict[str, float]] = {}
    for name, points in results["curves"].items():
        for num_slots, value in points:
            rows.setdefault(str(num_slots), {})[name] = value
    rows = dict(sorted(rows.items(), key=lambda item: int(item[0])))
    columns: list[Column] = [(name, name, 3) for name in results["curves"]]
    return "\n\n".join(
        [
            "# Quality by number of slots",
            f"Nats per token of {results['rows']} held-out sentences; {results['model']}, "
            f"{results['steps']} steps of 8 rows. *trained*: at each length, in two "
            "parameterizations. *shortened*: trained at the largest (`shared`), then only the "
            "slots kept, per head, that receive the most attention, without further training. "
            f"`shorten(keep={KEEP})` chose {results['chosen']} slots. Written by "
            f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
            "![NLL over the number of slots](num-slots.png)",
            table("slots", rows, columns),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--num-slots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=96, help="held-out rows")
    parser.add_argument("--learning-rate", type=float, help="left out, the library's default")
    options = parser.parse_args(argv)
    frozen = load_from(options)
    data = load(options.data, "formality", 0, options.steps * 8)
    held_out = as_examples(data.test[: options.rows])
    curves: dict[str, list[tuple[int, float]]] = {}
    rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    for name in PARAMETERIZATIONS:
        for num_slots in sorted(options.num_slots):
            cp = engine(frozen)
            cp.train(
                as_examples(data.train),
                learn="task",
                num_slots=num_slots,
                parameterization=name,
                steps=options.steps,
                validation=0,
                progress=False,
                **rate,
            )
            curves.setdefault(f"trained, {name}", []).append((num_slots, nll(cp, held_out)))
    # The last prefix is the longest. Slots are matched to their attention on dev rows.
    dev = as_examples(data.dev[: options.rows])
    report = cp.shorten("task", "sentence", dev, keep=KEEP)
    longest = cp.get("task", "sentence", version=1)
    rows = cp._trainer._rows_naming(PrefixKey("task", "sentence"), dev)
    query_texts = [QueryText(row.prompt, row.targets, row.frozen_parts) for row in rows]
    attention = observe(cp.frozen_model, longest, query_texts)
    for num_slots, _ in report.curve:
        if num_slots:
            cp.put("task", "sentence", matched(longest, attention, num_slots))
            curves.setdefault("shortened", []).append((num_slots, nll(cp, held_out)))
    results = {
        "model": describe(frozen),
        "steps": options.steps,
        "rows": options.rows,
        "curves": curves,
        "masses": report.masses,
        "chosen": report.num_slots,
    }
    path = save(options.results, "num-slots", results, page=page)
    plots.curves(
        path.with_suffix(".png"), curves, xlabel="slots", ylabel="held-out nats per token", log=True
    )


if __name__ == "__main__":
    main()
