"""The effect of strengths: kinds of dials, cross-talk between attributes, conflict with a user.

Trained on the `styles` of `attributes.py` (DATA as there). `dials` compares ways to turn one label
up and down on the same prefix; `cross-talk` is what a label adds to the probability of others;
`conflict` asks a user who writes informally to be formal.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from controlprefix import Example, Part, Prefix, Request, TrainingDataError
from controlprefix.completion import PartUsed
from controlprefix.evaluation import calibrate, evaluate
from controlprefix.evaluation.calibration import strength_curve
from controlprefix.evaluation.comparison.measures import TEMPERATURE
from controlprefix.evaluation.harness import base_model_nll
from controlprefix.evaluation.metrics import spearman
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest

from lib import plots
from lib.attribute_methods import ControlPrefixMethod
from lib.attribute_studies import BATCH_SIZE, Study, attributes_of, load_study
from lib.models import add_model_options, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, header, line, table

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
CALIBRATED = (0.0, 0.25, 0.5, 0.75, 1.0)
ADVERBS = {0.25: "a little ", 0.5: "somewhat ", 0.75: "rather ", 2.0: "very ", 4.0: "extremely "}
CONFLICTS = ((1, 0), (1, 1), (1, 2), (1, 4), (0.5, 1), (0.25, 1), (0.1, 1), (0, 1))


def dials(method: ControlPrefixMethod, label: str, options: argparse.Namespace) -> dict[str, Any]:
    """For each kind of dial, the probability of the label at each strength."""
    ((attribute, labels),) = method.study.labels.items()
    other = next(x for x in labels if x != label)
    classifier, cp = method.study.classifiers[attribute], method.cp
    task = cp.get("task", "text")
    prefix, opposite = (cp.get("attribute", f"{attribute}={name}") for name in (label, other))

    def mass(w: float) -> list[Part]:
        """Attention mass times w, as a request's strength does it."""
        return [Part(task), Part(prefix, w)]

    def opposites(w: float) -> list[Part]:
        """Attention mass of both labels, as `{"formal": w, "informal": 1 - w}` requests."""
        return [Part(task), Part(prefix, w), Part(opposite, max(0.0, 1 - w))]

    def values(w: float) -> list[Part]:
        """Values of the slots times w."""
        return [Part(task), Part(combined(prefix, prefix, lambda x, _: x, lambda x, _: w * x))]

    def interpolation(w: float) -> list[Part]:
        """Keys and values interpolated between the other label and this one."""

        def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return w * x + (1 - w) * y

        return [Part(task), Part(combined(prefix, opposite, mean, mean))]

    def guidance(w: float) -> list[ResolvedPart]:
        used = PartUsed(kind="attribute", name=f"{attribute}={label}", version=0, strength=w)
        return [*resolved([Part(task)]), ResolvedPart(used, Part(prefix), in_logit_space=True)]

    batcher = cp.batcher(max_sequences=64)

    def generate(parts: Sequence[ResolvedPart]) -> list[str]:
        requests = [
            Request(
                prompt=str(cp.tokenizer.bos_token),
                raw=True,
                max_new_tokens=options.new_tokens,
                stop=["\n"],
                seed=i,
                temperature=TEMPERATURE,
            )
            for i in range(options.curve_texts)
        ]
        tickets = [batcher.submit(ResolvedRequest(r, tuple(parts))) for r in requests]
        return [ticket.result().text.strip() for ticket in tickets]

    def adverbs(w: float) -> list[str]:
        described = f"{ADVERBS.get(w, '')}{label} " if w else ""
        prompt = f"Write one {described}sentence. Write nothing else."
        return method.generate([{"prompt": prompt, "raw": False}] * options.curve_texts, 0)

    def in_attention(parts: Callable[[float], list[Part]]) -> Callable[[float], list[str]]:
        return lambda w: generate(resolved(parts(w)))

    kinds: dict[str, Callable[[float], list[str]]] = {
        "attention mass": in_attention(mass),
        "weights of opposite labels": in_attention(opposites),
        "scaled values": in_attention(values),
        "interpolated keys and values": in_attention(interpolation),
        "logit guidance": lambda w: generate(guidance(w)),
        "adverbs in an instruction": adverbs,
    }
    curves: dict[str, Any] = {}
    for name, texts_at in kinds.items():
        points = []
        for w in STRENGTHS:
            texts = [text or " " for text in texts_at(w)]
            probability = classifier.probabilities(texts)[:, classifier.labels.index(label)].mean()
            nll = base_model_nll(cp, texts)
            points.append((w, float(probability), nll))
        curves[name] = curve(points)
        print(label, name, curves[name], flush=True)
    batcher.close()
    request = Request(
        prompt=str(cp.tokenizer.bos_token),
        raw=True,
        task="text",
        max_new_tokens=options.new_tokens,
        stop=["\n"],
        temperature=TEMPERATURE,
    )
    samples: dict[str, Any] = {"num_samples": options.curve_texts, "classifier": classifier}
    try:
        calibrate(cp, request, attribute, label, seed=10_000, **samples)
    except TrainingDataError as error:  # the effect is too small
        print(label, error, flush=True)
        return curves
    points = [
        (point.strength, point.probability.mean, point.base_model_nll)
        for point in strength_curve(
            cp,
            request,
            attribute,
            label,
            strengths=CALIBRATED,
            calibrated=True,
            seed=20_000,
            **samples,
        )
    ]
    curves["attention mass, calibrated"] = curve(points)
    return curves


def resolved(parts: Sequence[Part]) -> list[ResolvedPart]:
    """Parts as the resolver returns them; their names do not matter here."""
    return [
        ResolvedPart(
            PartUsed(kind="task", name=f"part{i}", version=0, strength=part.strength), part
        )
        for i, part in enumerate(parts)
    ]


def combined(
    a: Prefix,
    b: Prefix,
    keys: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Prefix:
    """Functions of the keys and of the values of two prefixes, layer by layer."""
    layers = [
        (a.layer("decoder", i), b.layer("decoder", i)) for i in range(len(a.geometry.decoder))
    ]
    return Prefix.from_layers(
        a.geometry, decoder=[(keys(x[0], y[0]), values(x[1], y[1])) for x, y in layers]
    )


def curve(points: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """A curve of probability over strength: its range, and how monotone and linear it is."""
    at = {w: probability for w, probability, _ in points}
    effect = at[1.0] - at[0.0]
    deviations = [abs((p - at[0.0]) / effect - w) for w, p in at.items() if 0 < w < 1 and effect]
    values = {
        "points": [[w, round(p, 3), round(nll, 3)] for w, p, nll in points],
        "spearman": round(spearman([w for w, _, _ in points], [p for _, p, _ in points]), 3),
        "effect": round(effect, 3),
    }
    return {**values, "deviation": round(max(deviations), 3)} if deviations else values


def cross_talk(method: ControlPrefixMethod, options: argparse.Namespace) -> dict[str, Any]:
    """What each label adds to the probability of each label, against the task alone."""
    study = method.study
    classifiers = list(study.classifiers.values())
    results: dict[str, Any] = {}
    rows = study.test_rows[:: max(1, len(study.test_rows) // options.texts)]
    for mixing in ("attention", "logits"):
        examples = [
            Example(
                prompt="",
                raw=True,
                completion=row.completion,
                task="text",
                attributes=attributes_of(row),
                mixing=mixing,
                stop=["\n"],
            )
            for row in rows
        ]
        report = evaluate(
            method.cp,
            examples,
            classifiers,
            strengths=(0.0, 1.0),
            curve_rows=options.texts,
            max_new_tokens=options.new_tokens,
            progress=False,
        )
        results[mixing] = {
            requested: {label: effect.mean for label, effect in effects.items()}
            for requested, effects in report.cross_talk.items()
        }
    results["real texts"] = _in_real_texts(study)
    return results


def _in_real_texts(study: Study) -> dict[str, dict[str, float]]:
    """The same difference between real texts of a label and of the other labels."""
    texts = [row.completion for row in study.test_rows]
    probabilities = {
        f"{classifier.attribute}={label}": column
        for classifier in study.classifiers.values()
        for label, column in zip(classifier.labels, classifier.probabilities(texts).T, strict=True)
    }
    results: dict[str, dict[str, float]] = {}
    for requested in probabilities:
        attribute = requested.partition("=")[0]
        has_label = torch.tensor([row.label == requested for row in study.test_rows])
        has_other = torch.tensor([attribute in attributes_of(row) for row in study.test_rows])
        has_other &= ~has_label
        results[requested] = {
            label: float(column[has_label].mean() - column[has_other].mean())
            for label, column in probabilities.items()
        }
    return results


def conflict(method: ControlPrefixMethod, options: argparse.Namespace) -> dict[str, float]:
    """The probability of formal when a user trained on informal texts is asked for it."""
    examples = [
        Example(prompt="", raw=True, completion=row.completion, task="text", user="informal")
        for row in method.study.rows
        if row.label == "formality=informal"
    ]
    method.cp.train(
        examples,
        learn="user",
        num_slots=8,
        steps=options.user_steps,
        batch_size=8,
        validation=0,
        progress=False,
    )
    classifier = method.study.classifiers["formality"]
    index = classifier.labels.index("formal")
    results = {}
    for user, formal in CONFLICTS:
        request = {
            "task": "text",
            "user": "informal",
            "attributes": {"formality": {"formal": float(formal)}},
            "strengths": {"user": float(user)},
        }
        texts = method.generate([request] * options.texts, 3)
        probability = classifier.probabilities([text or " " for text in texts])[:, index].mean()
        results[f"user {user:g}, formal {formal:g}"] = round(float(probability), 3)
    return results


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Strengths",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} rows. Written by "
        f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
    ]
    if "cross-talk" in results:
        parts += [
            "## Cross-talk",
            "What a label alone, at strength 1, adds to the probability of that label (*own*), and "
            "at most to that of a label of another attribute (*other*), against the task alone "
            "(`controlprefix eval`); for real texts, against those with other labels. Trained "
            "jointly on `styles`.",
            _cross_talk_table(results["cross-talk"]),
        ]
    if "dials" in results:
        parts += [
            "## Dials",
            f"Formality trained alone, in {options['steps'] // 2} steps. Probability of the label "
            f"in {options['curve_texts']} texts at each strength, for kinds of dials on a prefix. "
            "**deviation**: largest distance from a straight line between 0 and 1, as a share of "
            "the effect. **base-model NLL** at strength 1.",
        ]
        columns: list[Column] = [(f"{w:g}", f"{w:g}", 2) for w in STRENGTHS]
        columns += [
            ("spearman", "Spearman", 2),
            ("deviation", "deviation", 2),
            ("nll", "base-model NLL", 2),
        ]
        for label, curves in results["dials"].items():
            rows = {
                name: {
                    **{f"{w:g}": p for w, p, _ in kind["points"]},
                    **{key: kind[key] for key in ("spearman", "deviation") if key in kind},
                    "nll": {w: nll for w, _, nll in kind["points"]}[1.0],
                }
                for name, kind in curves.items()
            }
            parts += [f"### {label}", table("kind", rows, columns)]
        parts.append("![Probability of a label over its strength](strengths.png)")
    if "conflict" in results:
        lines = [line(name, f"{p:.2f}") for name, p in results["conflict"].items()]
        parts += [
            "## Conflict",
            "A user trained on informal texts, with `formality=formal`: the probability of formal "
            "at strengths of both.",
            "\n".join([header("strengths", "formal"), *lines]),
        ]
    return "\n\n".join(parts)


def _cross_talk_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for source, effects in results.items():
        for requested, effect in effects.items():
            attribute = requested.partition("=")[0]
            others = [abs(x) for label, x in effect.items() if label.split("=")[0] != attribute]
            rows.setdefault(requested, {})[f"own, {source}"] = effect[requested]
            rows[requested][f"other, {source}"] = max(others)
    columns: list[Column] = [
        (f"{what}, {source}", f"{what}, {source}", 2)
        for source in results
        for what in ("own", "other")
    ]
    rows["mean"] = {
        key: statistics.fmean(row[key] for row in rows.values()) for key, _, _ in columns
    }
    return table("label", rows, columns)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--user-steps", type=int, default=40)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--texts", type=int, default=48, help="texts per setting")
    parser.add_argument("--curve-texts", type=int, default=96, help="texts per strength of a dial")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("steps", "num_slots", "texts", "curve_texts", "new_tokens")
    file = ResultFile("strengths", options, settings=settings, model=frozen, page=page)
    study = load_study(options.data, "styles", options.steps * BATCH_SIZE, frozen)
    if file.get("cross-talk") is None:
        method = ControlPrefixMethod(study, options)
        method.train()
        file.set("cross-talk", value=cross_talk(method, options))
    rows = [row for row in study.rows if "formality" in attributes_of(row)]
    labels = {"formality": study.labels["formality"]}
    half = argparse.Namespace(**{**vars(options), "steps": options.steps // 2})
    method = ControlPrefixMethod(replace(study, labels=labels, rows=rows), half)
    method.train()
    for label in labels["formality"]:
        if file.get("dials", label) is None:
            file.set("dials", label, value=dials(method, label, options))
    if file.get("conflict") is None:
        file.set("conflict", value=conflict(method, options))
    plots.dials(file.path)


if __name__ == "__main__":
    main()
