"""Texts of each task, to read: what the model writes when instructed, and under a prefix.

A task prefix, with labels where a data set has them, is trained on each data set; the texts are
those of the first test rows in random order, none chosen. Texts after a prompt are greedy, others
are sampled at temperature 0.8. DATA is the folder of `comparison.py`, with simplification_asset.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import example, held_out

from controlprefix.evaluation.comparison.measures import distinct_requests, texts_of
from controlprefix.evaluation.comparison.methods import (
    ComparisonSetup,
    ControlPrefixMethod,
    Instruction,
    Method,
    prompt_text,
)
from controlprefix.model import FrozenModel

from lib.datasets import DATA_SETS, Row, load
from lib.models import add_model_options, load_from
from lib.results import ResultFile, arguments

LEARNING_RATE = 5e-4
TITLES = {
    "formality": "A label: formality",
    "sentiment": "A label: the sentiment of a review",
    "e2e": "Facts about a restaurant (E2E)",
    "webnlg": "Triples (WebNLG), with their category as a label",
    "scitldr": "The summary of an abstract (SciTLDR)",
    "asset": "A simpler sentence (ASSET)",
    "naija": "Nigerian Pidgin",
}


def texts_of_task(options: argparse.Namespace, frozen: FrozenModel, name: str) -> dict[str, Any]:
    """Rows of a data set with the texts of each method, and the instruction."""
    data = load(options.data, name, options.seed, options.training_rows)
    labels = data.labels() if data.has_few_labels else [None]
    per_label = -(-options.rows // len(labels))
    test: list[Row] = []
    for label in labels:
        test += [row for row in data.test if label in (None, row.label)][:per_label]
    instruction = data.instruction(Row("", label="{labels}")).strip()
    examples = [example(data, row) for row in data.train]
    setup = ComparisonSetup(
        frozen,
        examples,
        held_out(data, data.dev, 1),
        held_out(data, test, len(test)),
        instruction=instruction,
        steps=options.steps,
        num_slots=options.num_slots,
        max_new_tokens=options.new_tokens,
    )
    requests = distinct_requests(setup.test)
    methods: dict[str, Method] = {
        "instruction": Instruction(setup),
        "prefix": ControlPrefixMethod(setup),
    }
    written = {}
    for method_name, method in methods.items():
        method.train(rate=LEARNING_RATE, seed=options.seed)
        written[method_name] = texts_of(method, requests, options.seed)
        method.close()
    rows = [
        {
            "prompt": prompt_text(request),
            "label": setup.label(request),
            "person": request.completion if request.prompt else None,
            "texts": {method_name: own[i] for method_name, own in written.items()},
        }
        for i, request in enumerate(requests)
    ]
    return {"instruction": instruction, "rows": rows}


def page(results: dict[str, Any]) -> str:
    """The texts as Markdown."""
    options = results["options"]
    lines = [
        "# Texts of each task",
        "",
        f"What a model of {results['model']} writes when it is instructed, and under a prefix of "
        f"{options['num_slots']} slots after {options['steps']} steps of 8 of up to "
        f"{options['training_rows']} rows. The first test rows in random order; none was chosen. "
        f"Written by `{results['command']}` at commit {results['commit']}, {results['date']}.",
    ]
    for name, task in results["tasks"].items():
        lines += ["", f"## {TITLES[name]}", "", f"The instruction: {_inline(task['instruction'])}"]
        for row in task["rows"]:
            label = f" ({row['label']})" if row["label"] is not None else ""
            lines += ["", f"**{_inline(row['prompt']) or 'No prompt'}**{label}", ""]
            if row["person"]:
                lines.append(f"- a person: {_inline(row['person'])}")
            lines += [f"- {method}: {_inline(text)}" for method, text in row["texts"].items()]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """A text as it is, in one line of Markdown."""
    text = " ".join(text.split())
    for mark in "\\`*_<[]#|$~":
        text = text.replace(mark, f"\\{mark}")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--training-rows", type=int, default=480)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    file = ResultFile(
        "gallery",
        options,
        settings=("steps", "num_slots", "training_rows", "rows", "new_tokens", "seed"),
        model=frozen,
        page=page,
    )
    for name in options.data_sets:
        if file.get("tasks", name) is None:
            file.set("tasks", name, value=texts_of_task(options, frozen, name))


if __name__ == "__main__":
    main()
