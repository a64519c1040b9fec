"""Several attributes at once, against other methods.

Two sets of attributes, trained on rows that have one label each and requested in every
combination: `aspects` (sentiment of film reviews, topic of news, toxicity) and `styles` (formality,
sentiment of restaurant reviews, politeness). All methods get the same rows in as many steps. Texts
start from an empty prompt. Three attribute classifiers per attribute, over words, characters and
sentence embeddings, are trained on rows that no method and no reward gets. A method's coefficient
is chosen on other samples than those reported. DATA is a folder with the files of both sets (see
lib/attribute_studies.py). repeng is skipped unless it is installed:
`pip install --no-deps repeng==0.4.0`.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from controlprefix import ControlPrefix
from controlprefix.evaluation.harness import base_model_nll
from controlprefix.evaluation.metrics import distinct_n

from lib.attribute_baselines import Method, RealTexts
from lib.attribute_methods import (
    BOTH,
    METHODS,
    REINFORCED,
    SELF_TRAINED,
    ControlPrefixMethod,
    trained,
)
from lib.attribute_studies import BATCH_SIZE, STUDIES, Combination, Study, load_study
from lib.models import add_model_options, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, table

COLUMNS: tuple[Column, ...] = (
    ("accuracy, mean", "accuracy", 3),
    ("accuracy (characters), mean", "accuracy (characters)", 3),
    ("accuracy (embeddings), mean", "accuracy (embeddings)", 3),
    ("all correct", "all correct", 3),
    ("alone, mean", "alone", 3),
    ("base-model nll", "base-model NLL", 2),
    ("distinct-2", "distinct-2", 2),
    ("words", "words", 1),
    ("coefficient", "coefficient", 2),
)


def classify(
    study: Study, texts: Sequence[tuple[Combination, str]], cp: ControlPrefix
) -> dict[str, float]:
    """Attribute accuracy by each classifier, base-model NLL and diversity of requested texts."""
    figures: dict[str, float] = {}
    outputs = [text or " " for _, text in texts]
    hits_by_attribute: dict[str, list[bool]] = {}
    for attribute in study.labels:
        requested = [combination.get(attribute) for combination, _ in texts]
        indices = [i for i, label in enumerate(requested) if label]
        if not indices:
            continue
        by_words = list(study.word_classifiers[attribute].predict(outputs))
        hits_by_attribute[attribute] = [bool(by_words[i] == requested[i]) for i in indices]
        figures[f"accuracy, {attribute}"] = statistics.fmean(hits_by_attribute[attribute])
        by_characters = study.character_classifiers[attribute].predict(outputs)
        hits = [bool(by_characters[i] == requested[i]) for i in indices]
        figures[f"accuracy (characters), {attribute}"] = statistics.fmean(hits)
        classifier = study.classifiers[attribute]
        best = classifier.probabilities(outputs).argmax(dim=1).tolist()
        hits = [classifier.labels[best[i]] == requested[i] for i in indices]
        figures[f"accuracy (embeddings), {attribute}"] = statistics.fmean(hits)
    for name in ("accuracy", "accuracy (characters)", "accuracy (embeddings)"):
        values = [value for key, value in figures.items() if key.startswith(f"{name}, ")]
        figures[f"{name}, mean"] = statistics.fmean(values)
    if all(combination.keys() == study.labels.keys() for combination, _ in texts):
        rows = zip(*hits_by_attribute.values(), strict=True)
        figures["all correct"] = statistics.fmean(map(all, rows))
    figures["base-model nll"] = base_model_nll(cp, outputs)
    figures["distinct-2"] = distinct_n(outputs, 2)
    figures["words"] = statistics.fmean(len(text.split()) for text in outputs)
    return figures


def sample(
    method: Method, combinations: Sequence[Combination], count: int, seed: int
) -> list[tuple[Combination, str]]:
    """`count` texts per combination."""
    return [
        (combination, text)
        for i, combination in enumerate(combinations)
        for text in method.write(combination, count, (seed + 10 * method.seed) * 100 + i)
    ]


def choose_coefficient(method: Method, study: Study, options: argparse.Namespace) -> float:
    """The coefficient of highest accuracy among those whose base-model NLL is within the limit.

    The limit is that of real texts, or of the method's `nll_limit`.
    """
    count, combinations = max(2, options.texts // 4), study.combinations()
    trials = {}
    for coefficient in method.coefficients:
        method.coefficient = coefficient
        texts = sample(method, combinations, count, seed=1)
        trials[coefficient] = classify(study, texts, method.cp)
    limit = study.base_model_nll
    if method.nll_limit is not None:
        texts = sample(METHODS[method.nll_limit](study, options), combinations, count, seed=1)
        limit = classify(study, texts, method.cp)["base-model nll"]
    plain = [c for c, figures in trials.items() if figures["base-model nll"] <= limit]
    plainest = min(trials, key=lambda c: trials[c]["base-model nll"])
    return max(plain or [plainest], key=lambda c: trials[c]["accuracy, mean"])


def measure(method: Method, study: Study, options: argparse.Namespace) -> dict[str, float]:
    """All figures of a trained method."""
    figures = {}
    if method.coefficients:
        method.coefficient = choose_coefficient(method, study, options)
        figures["coefficient"] = method.coefficient
    if isinstance(method, RealTexts):
        texts = method.texts(len(study.combinations()) * options.texts)
    else:
        texts = sample(method, study.combinations(), options.texts, seed=0)
    for combination, text in texts[:: options.texts]:
        Console(width=200, highlight=False, markup=False).print(combination, repr(text))
    figures = {**classify(study, texts, method.cp), **figures}
    if isinstance(method, ControlPrefixMethod):  # each label without the others
        alone = [{a: label} for a, labels in study.labels.items() for label in labels]
        texts = sample(method, alone, options.texts, seed=2)
        figures["alone, mean"] = classify(study, texts, method.cp)["accuracy, mean"]
    return {name: round(value, 4) for name, value in figures.items()}


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Several attributes at once",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} rows in all (methods that "
        f"train labels separately share them), {options['num_slots']} slots per prefix, "
        f"{options['texts']} texts per combination of at most {options['new_tokens']} tokens. "
        f"Seed {options.get('seed', 0)}. Written by `{results['command']}` at commit "
        f"{results['commit']}, {results['date']}.",
        "**accuracy**: attribute accuracy, how often a linear classifier over words finds the "
        "requested label, averaged over attributes; **all correct**: of all attributes at once; "
        "**alone**: labels requested without others. **base-model NLL**: nats per token under the "
        "plain model, lower is plainer. **coefficient**: chosen for accuracy on other samples, "
        "among those with a base-model NLL no higher than that of real texts.",
    ]
    if "reward_steps" in options:
        parts.append(
            f"**reinforced**: {options['reward_steps']} further steps of {options['requests']} "
            f"requests with every label, {options['samples']} samples each, rewarded by "
            "`AttributeReward` of other rows again; weights "
            f"{options['kl']} of the KL divergence, {options['diversity']} of diversity."
        )
    if "pool" in options:
        weight = options.get("pool_diversity", 0)
        chosen = f" and that have new pairs of words (weight {weight})" if weight else ""
        parts.append(
            f"**self-trained**: {options['self_steps']} further steps on the {options['keep']} of "
            f"{options['pool']} texts of each combination, written with logits for and against at "
            f"strength 2, that these classifiers prefer{chosen}, and as many training rows."
        )
    parts += results.get("notes", ())
    for name, study in results["studies"].items():
        classifiers = "; ".join(
            f"{attribute} {accuracy:.2f}" for attribute, accuracy in study["classifiers"].items()
        )
        parts += [
            f"## {name}: {', '.join(STUDIES[name])}",
            f"Real texts have a base-model NLL of {study['base-model nll']:.2f}. The classifiers "
            f"over embeddings are right on held-out rows in: {classifiers}.",
            table("method", study.get("methods", {}), COLUMNS),
            table(
                "method",
                study.get("methods", {}),
                [(f"accuracy, {attribute}", attribute, 2) for attribute in STUDIES[name]],
            ),
        ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--name", help="of the result files, to keep those of other options")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of training and of samples")
    reward = parser.add_argument_group("reinforcement learning")
    reward.add_argument("--reward-steps", type=int, default=40)
    reward.add_argument("--requests", type=int, default=8, help="per step")
    reward.add_argument("--samples", type=int, default=4, help="per request")
    reward.add_argument("--diversity", type=float, default=1.0, help="weight")
    reward.add_argument("--kl", type=float, default=0.05, help="weight")
    reward.add_argument("--demonstrated", type=float, default=0.0, help="share of requests")
    own = parser.add_argument_group("self-training on the best of sampled texts")
    own.add_argument("--pool", type=int, default=32, help="texts per combination")
    own.add_argument("--keep", type=int, default=8, help="of them")
    own.add_argument("--pool-diversity", type=float, default=0.0, help="weight, when chosen")
    own.add_argument("--self-steps", type=int, default=60)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="texts per combination")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    settings: tuple[str, ...] = ("steps", "num_slots", "texts", "new_tokens")
    if {SELF_TRAINED, BOTH} & set(options.methods):
        settings += ("pool", "keep", "pool_diversity", "self_steps")
    if {REINFORCED, BOTH} & set(options.methods):
        settings += ("reward_steps", "requests", "samples", "diversity", "kl", "demonstrated")
    settings += ("seed",) if options.seed else ()
    part = [] if options.studies == list(STUDIES) else options.studies
    device = [] if options.device == "cpu" else [options.device]
    seed = [f"seed-{options.seed}"] if options.seed else []
    name = options.name or "-".join(["attributes", *part, *seed, *device])
    file = ResultFile(name, options, settings=settings, model=frozen, page=page)
    for name in options.studies:
        study = load_study(options.data, name, options.steps * BATCH_SIZE, frozen)
        accuracies = {a: round(c.accuracy, 4) for a, c in study.classifiers.items()}
        methods = file.get("studies", name, "methods") or {}
        about = {"classifiers": accuracies, "base-model nll": round(study.base_model_nll, 4)}
        file.set("studies", name, value={**about, "methods": methods})
        earlier: dict[str, Method] = {}
        for method in options.methods:
            if method == "repeng" and not find_spec("repeng"):
                continue
            if file.get("studies", name, "methods", method) is None:
                figures = measure(trained(method, study, options, earlier), study, options)
                print(name, method, figures, flush=True)
                file.set("studies", name, "methods", method, value=figures)


if __name__ == "__main__":
    main()
