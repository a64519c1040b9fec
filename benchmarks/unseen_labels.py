"""Labels that were not trained, requested by name.

`topics`: a topic is left out of training on the `aspects` of `attributes.py`, then requested.
`categories`: the unseen categories of WebNLG, as nats per token of the reference. DATA as for
`attributes.py` and `comparison.py`.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlprefix import Example
from controlprefix.model import FrozenModel

from lib import datasets
from lib.attribute_methods import ControlPrefixMethod
from lib.attribute_studies import BATCH_SIZE, IN_WORDS, attributes_of, load_study
from lib.datasets import Row
from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, header, line, table

PROMPTS = ["Write a sentence.", "Write something.", "Say something.", "What is new?"] * 6


def topic(frozen: FrozenModel, label: str, options: argparse.Namespace) -> dict[str, float]:
    """Attribute accuracy of a topic that was left out, by what replaces it."""
    study = load_study(options.data, "aspects", options.steps * BATCH_SIZE, frozen)
    classifier = study.classifiers["topic"]
    rows = [r for r in study.rows if attributes_of(r).get("topic") not in (None, label)]
    method = ControlPrefixMethod(replace(study, labels={"topic": []}, rows=rows), options)
    method.train()
    requests: dict[str, dict[str, Any]] = {
        "task only": {},
        "nearest labels": {"attributes": {"topic": label}, "unseen": "nearest"},
        "its text": {"attributes": {"topic": label}, "unseen": "text"},
        "distilled": {"attributes": {"topic": "distilled"}},
    }
    accuracies = {}
    for name, fields in requests.items():
        if name == "distilled":  # last, since it is a label that could be the nearest one
            method.cp.distill(
                f"Write a sentence {IN_WORDS[label]}.",
                PROMPTS,
                attribute="topic",
                label="distilled",
                num_slots=options.num_slots,
                steps=options.distill_steps,
                max_new_tokens=options.new_tokens,
                progress=False,
            )
        texts = method.generate([{"task": "text", **fields}] * options.texts, 4)
        best = classifier.probabilities([text or " " for text in texts]).argmax(dim=1).tolist()
        hits = [classifier.labels[i] == label for i in best]
        accuracies[name] = round(statistics.fmean(hits), 3)
    return accuracies


def categories(frozen: FrozenModel, options: argparse.Namespace) -> dict[str, float]:
    """Nats per token of texts about unseen categories, by what replaces their prefix."""
    data = datasets.load(options.data, "webnlg", 0, options.steps * BATCH_SIZE)
    cp = engine(frozen)
    rows = [
        Example(
            prompt=row.prompt,
            completion=row.completion,
            task="describe",
            attributes={"category": str(row.label)},
        )
        for row in data.train
    ]
    cp.train(rows, num_slots=options.num_slots, steps=options.steps, validation=0, progress=False)
    trained = data.labels()
    replacements: dict[str, Callable[[Row], dict[str, Any]]] = {
        "task only": lambda _: {},
        "nearest labels": lambda r: {"attributes": {"category": r.label}, "unseen": "nearest"},
        "its text": lambda r: {"attributes": {"category": r.label}, "unseen": "text"},
        "a random label": lambda r: {
            "attributes": {"category": trained[len(r.completion) % len(trained)]}
        },
    }
    results = {}
    unseen = [row for row in data.test if not row.is_seen][: options.rows]
    for name, fields in replacements.items():
        examples = [
            Example(prompt=r.prompt, completion=r.completion, task="describe", **fields(r))
            for r in unseen
        ]
        scores = cp.score(examples)
        total = -sum(score.log_likelihood for score in scores)
        results[name] = round(total / sum(score.num_tokens for score in scores), 4)
    return results


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Unseen labels",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} rows. Written by "
        f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
    ]
    if "topics" in results:
        rows: dict[str, dict[str, float]] = {}
        for label, accuracies in results["topics"].items():
            for name, accuracy in accuracies.items():
                rows.setdefault(name, {})[label] = accuracy
        for values in rows.values():
            values["mean"] = statistics.fmean(values.values())
        columns: list[Column] = [(x, x, 2) for x in (*results["topics"], "mean")]
        parts += [
            "A topic is left out of training and then requested: attribute accuracy.",
            table("in its place", rows, columns),
        ]
    if "categories" in results:
        lines = [line(name, f"{nll:.3f}") for name, nll in results["categories"].items()]
        parts += [
            "WebNLG's unseen categories: nats per token of the reference.",
            "\n".join([header("in its place", "NLL"), *lines]),
        ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--topics", nargs="+", default=["business", "sci/tech"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--distill-steps", type=int, default=30)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--texts", type=int, default=48, help="texts per setting")
    parser.add_argument("--rows", type=int, default=96, help="test rows")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("steps", "num_slots", "texts", "rows", "new_tokens")
    file = ResultFile("unseen-labels", options, settings=settings, model=frozen, page=page)
    for label in options.topics:
        if file.get("topics", label) is None:
            file.set("topics", label, value=topic(frozen, label, options))
    if file.get("categories") is None:
        file.set("categories", value=categories(frozen, options))


if __name__ == "__main__":
    main()
