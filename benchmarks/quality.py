"""Quality of trained prefixes against other methods: equal rows, order and steps.

DATA is a folder with the files formality_pavlick, formality_squinky, sentiment_yelp, e2e and
webnlg (see lib/datasets.py). Where labels are few (formality, sentiment), methods without
attributes train an adapter per label, in as many steps together; elsewhere one for all rows. PEFT
methods use the best of three learning rates on formality's dev split, this library its default.
Attribute classifiers are trained on rows that no method gets. Measurements that the result file
has are not repeated.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from rich.console import Console

from controlprefix.model import FrozenModel
from controlprefix.training import TrainingSettings

from lib import peft_training
from lib.datasets import DATA_SETS, DataSet, Row, load
from lib.methods import ControlPrefixMethod, FewShot, Instruction, Method, PeftMethod
from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, header, line, mean_and_spread

OWN_METHODS: dict[str, dict[str, Any]] = {
    "controlprefix, task only": {"labels": False},
    "controlprefix, direct": {"parameterization": "direct"},
    "controlprefix, shared": {},
    "controlprefix, shared, contrast": {"contrast": 0.3},  # of 0, 0.3, 0.6 on formality's dev split
}
PROMPT_METHODS: dict[str, type[Method]] = {
    "plain": Method,
    "instruction": Instruction,
    "few-shot": FewShot,
}
OWN_RATES = (2.5e-4, 5e-4, 1e-3)
COLUMNS: tuple[Column, ...] = (
    ("nll", "NLL", 3),
    ("nll, unseen", "NLL, unseen", 3),
    ("nll, other label", "NLL, other label", 3),
    ("accuracy, formality_pavlick", "accuracy", 2),
    ("accuracy, formality_squinky", "accuracy (squinky)", 2),
    ("accuracy, sentiment_yelp", "accuracy", 2),
    ("BLEU", "BLEU", 1),
    ("chrF", "chrF", 1),
    ("BLEU, unseen", "BLEU, unseen", 1),
    ("chrF, unseen", "chrF, unseen", 1),
    ("base-model nll", "base-model NLL", 2),
    ("parameters", "trained values", 0),
    ("stored", "stored values", 0),
)


def methods(
    frozen: FrozenModel, data: DataSet, options: argparse.Namespace, rates: Mapping[str, float]
) -> dict[str, Callable[[], Method]]:
    """Name -> a function that makes the method, with a store of its own."""

    def maker(method: Callable[..., Method], **settings: Any) -> Callable[[], Method]:
        return lambda: method(engine(frozen), data, options, **settings)

    makers = {name: maker(method) for name, method in PROMPT_METHODS.items()}
    for name, settings in OWN_METHODS.items():
        applies = {"labels": data.attribute is not None, "contrast": data.has_few_labels}
        if all(applies.get(setting, True) for setting in settings):
            makers[name] = maker(ControlPrefixMethod, **settings)
    for name in peft_training.METHODS:
        makers[name] = maker(PeftMethod, name=name, learning_rate=rates[name])
    return makers


def measure(
    method: Method, data: DataSet, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Train one method on one data set, and compute all its figures."""
    rows = data.test[: options.rows]
    method.train(seed, options.steps)
    figures: dict[str, float] = {"nll": method.nll(rows, [row.label for row in rows])}
    if method.num_parameters:
        figures |= {"parameters": method.num_parameters, "stored": method.num_stored}
    if data.has_few_labels:
        labels = data.labels()
        other = dict(zip(labels, labels[1:] + labels[:1], strict=True))
        figures["nll, other label"] = method.nll(rows, [other[str(row.label)] for row in rows])
        requested = [label for label in labels for _ in range(options.texts)]
        prompts = [Row(str(i), label=label) for i, label in enumerate(requested)]
        texts = method.write(prompts, requested)
        for name, classifier in data.classifiers.items():
            predictions = classifier.predict([text or " " for text in texts])
            hits = [a == b for a, b in zip(predictions, requested, strict=True)]
            figures[f"accuracy, {name}"] = statistics.mean(hits)
    else:
        texts = []
        for suffix, is_seen in (("", True), (", unseen", False)):
            group = [row for row in rows if row.is_seen == is_seen]
            if not group:
                continue
            if not is_seen:
                figures["nll, unseen"] = method.nll(group, [row.label for row in group])
            group = group[: options.texts]
            outputs = method.write(group, [row.label for row in group])
            most = max(len(row.references) for row in group)
            references = [
                [(*row.references, *[""] * most)[i] for row in group] for i in range(most)
            ]
            figures[f"BLEU{suffix}"] = sacrebleu.corpus_bleu(outputs, references).score
            figures[f"chrF{suffix}"] = sacrebleu.corpus_chrf(outputs, references).score
            texts += outputs
    plain = Method(method.cp, data, options)
    if non_empty := [Row(text) for text in texts if text]:
        figures["base-model nll"] = plain.nll(non_empty, [None] * len(non_empty))
    figures["words"] = statistics.mean(len(text.split()) for text in texts)
    return figures


def choose_rates(
    frozen: FrozenModel, options: argparse.Namespace, file: ResultFile
) -> dict[str, float]:
    """The learning rate of each PEFT method with the lowest dev NLL on formality."""
    data = load(options.data, "formality", 0, options.steps * options.batch_size)
    rows = data.dev[: options.rows]
    best = {}
    for name, settings in peft_training.METHODS.items():
        for rate in settings["rates"]:
            if file.get("rates", name, str(rate)) is None:
                method = PeftMethod(engine(frozen), data, options, name=name, learning_rate=rate)
                method.train(0, options.steps)
                nll = method.nll(rows, [row.label for row in rows])
                file.set("rates", name, str(rate), value=round(nll, 4))
        losses = file.get("rates", name)
        best[name] = float(min(losses, key=losses.get))
    return best


def try_own_rates(frozen: FrozenModel, options: argparse.Namespace, file: ResultFile) -> None:
    """The dev NLL of this library at each learning rate."""
    for name in ("formality", "sentiment", "e2e"):
        data = load(options.data, name, 0, options.steps * options.batch_size)
        rows = data.dev[: options.rows]
        for rate in OWN_RATES:
            method = ControlPrefixMethod(engine(frozen), data, options, learning_rate=rate)
            method.train(0, options.steps)
            nll = method.nll(rows, [row.label for row in rows])
            file.set("own rates", name, str(rate), value=round(nll, 4))


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Quality against other methods",
        f"{results['model']}; {options['steps']} steps of {options['batch_size']} rows, "
        f"{options['num_slots']} slots, {options['rows']} test rows, {options['texts']} texts per "
        "label (or in all). Means over seeds, with the standard deviation. Written by "
        f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
        "**NLL**: nats per token of held-out texts under the right label; **NLL, other label**: "
        "under the wrong one, where higher is better. **accuracy**: attribute accuracy, how often "
        "a linear TF-IDF classifier, trained on rows that no method gets, finds the requested "
        "label. **base-model NLL**: nats per token of the generated texts under the plain model. "
        "**trained values**, **stored values**: for all labels together; the network of `shared` "
        "is not stored. Time and memory of a step are in `speed.md`.",
    ]
    for name, runs in results.get("data", {}).items():
        columns = [
            c
            for c in COLUMNS
            if any(c[0] in run for seeds in runs.values() for run in seeds.values())
        ]
        lines = [header("method", *(title for _, title, _ in columns), "seeds")]
        for method, seeds in runs.items():
            cells = [
                mean_and_spread([run[key] for run in seeds.values() if key in run], digits)
                for key, _, digits in columns
            ]
            lines.append(line(method, *cells, str(len(seeds))))
        parts += [f"## {name}", "\n".join(lines)]
    if "own rates" in results:
        parts += [
            "## The learning rate of this library",
            "Nats per token on dev splits with `shared`; the default is "
            f"{TrainingSettings().peak_learning_rate} everywhere.",
            _rates_table(results["own rates"]),
        ]
    if "rates" in results:
        parts += [
            "## Learning rates of PEFT",
            "Nats per token on formality's dev split; the lowest decided for all data sets.",
            _rates_table(results["rates"]),
        ]
    return "\n\n".join(parts) + "\n"


def _rates_table(rates: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        line(name, ", ".join(f"{loss:.3f} at {rate}" for rate, loss in losses.items()))
        for name, losses in rates.items()
    ]
    return "\n".join([header("", "NLL at learning rate"), *lines])


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--methods", nargs="+", help="left out: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=96, help="test rows")
    parser.add_argument("--texts", type=int, default=96, help="generated per label, or in all")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--own-rates", action="store_true", help="compare this library's rates")
    options = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("steps", "batch_size", "num_slots", "rows", "texts", "new_tokens")
    file = ResultFile("quality", options, settings=settings, model=frozen, page=page)
    if options.own_rates:
        try_own_rates(frozen, options, file)
        return
    rates = choose_rates(frozen, options, file)
    for seed in options.seeds:
        for name in options.data_sets:
            data = load(options.data, name, seed, options.steps * options.batch_size)
            for method, make in methods(frozen, data, options, rates).items():
                if options.methods and method not in options.methods:
                    continue
                if file.get("data", name, method, str(seed)) is None:
                    torch.manual_seed(seed)
                    figures = measure(make(), data, seed, options)
                    rounded = {key: round(value, 4) for key, value in figures.items()}
                    Console(width=200).print(f"{name}, {method}, seed {seed}: {rounded}")
                    file.set("data", name, method, str(seed), value=rounded)


if __name__ == "__main__":
    main()
