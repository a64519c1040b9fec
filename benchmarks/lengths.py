"""How many slots: learned at each length, and learned long, then shortened by attention.

Texts are those of `quality.py`'s formality, for a task prefix alone. Run it with
`python benchmarks/lengths.py DATA`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from quality import Row, load_data, model, tokenizer
from side_by_side import record

from controlprefix import ControlPrefix, Example
from controlprefix.store import PrefixKey
from controlprefix.training.slot_attention import most_attended, slot_masses

SLOTS = (1, 2, 4, 8, 16, 32)
KEEP = 0.95


def examples(rows: list[Row]) -> list[Example]:
    return [Example(prompt="", raw=True, completion=r.completion, task="sentence") for r in rows]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    by_length: dict[int, dict[str, float]] = {}
    for name, points in results["curves"].items():
        for slots, nats in points:
            by_length.setdefault(slots, {})[name] = nats
    names = list(results["curves"])
    rows = [
        f"| {slots} | {' | '.join(f'{one[n]:.3f}' if n in one else '' for n in names)} |"
        for slots, one in sorted(by_length.items())
    ]
    return "\n\n".join(
        [
            "# How many slots",
            f"Nats a token of {results['rows']} held-out sentences; SmolLM2-135M in bfloat16, "
            f"{results['steps']} steps of 8. *Learned* at each length, in two parameterizations; "
            "*shortened*: learned with 32 slots (`shared`), then in each head only those kept that "
            "receive the most attention, without any more learning. "
            f"`shorten(keep={KEEP})` chose {results['chosen']} slots. Written by "
            f"`{results['command']}` with `lengths.json` beside it.",
            "![](lengths.png)",
            "\n".join(
                [f"| slots | {' | '.join(names)} |", "| --- |" + " --- |" * len(names), *rows]
            ),
        ]
    )


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        shown = [(slots, nats) for slots, nats in points if slots]
        axes.plot(*zip(*shown, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="slots", ylabel="held-out nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=96, help="held out")
    options = parser.parse_args()
    data = load_data(options.folder, "formality", 0, options.steps * 8)
    held_out = examples(list(data.test[: options.rows]))
    curves: dict[str, list[tuple[int, float]]] = {}
    how = {"steps": options.steps, "validation": 0, "progress": False}
    for name in ("direct", "shared"):
        for slots in SLOTS:
            cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
            cp.train(
                examples(list(data.train)),
                learn="task",
                num_slots=slots,
                parameterization=name,
                **how,
            )
            scores = cp.score(held_out)
            nats = -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)
            curves.setdefault(f"learned, {name}", []).append((slots, round(nats, 4)))
            print(name, slots, round(nats, 4), flush=True)
    # The last one has 32 slots. Slots are chosen by their attention on dev rows.
    looked_at = examples(list(data.dev[: options.rows]))
    report = cp.shorten("task", "sentence", looked_at, keep=KEEP)
    whole = cp.get("task", "sentence", version=1)
    rows = cp._trainer._rows_naming(PrefixKey("task", "sentence"), looked_at)
    masses = slot_masses(cp.frozen_model, rows, whole)
    for slots, _ in report.curve:
        if not slots:
            continue
        cp.put("task", "sentence", most_attended(whole, masses, slots))
        scores = cp.score(held_out)
        nats = -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)
        curves.setdefault("shortened", []).append((slots, round(nats, 4)))
    path = record(
        "lengths",
        {
            "steps": options.steps,
            "rows": options.rows,
            "curves": curves,
            "masses": report.masses,
            "chosen": report.num_slots,
        },
    )
    draw(curves, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(json.loads(path.read_text())) + "\n")


if __name__ == "__main__":
    main()
