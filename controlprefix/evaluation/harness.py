"""The evaluation harness: a store and test rows in, an `EvaluationReport` out."""

import hashlib
import math
import random
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from controlprefix.data import Columns, Rows, as_examples
from controlprefix.embeddings import embed
from controlprefix.engine import ControlPrefix
from controlprefix.engine.arguments import checks_arguments
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.metrics import (
    Estimate,
    bootstrap_mean,
    chrf,
    distinct_n,
    self_bleu,
    similarity,
    spearman,
    wilson_proportion,
    words_of,
)
from controlprefix.evaluation.report import CurvePoint, EvaluationReport, TextQuality, TextSample
from controlprefix.evaluation.text_cache import TextCache
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.prefixes import PrefixKey
from controlprefix.reports import provenance
from controlprefix.request import AnyRequest
from controlprefix.training.held_out import prompt_identity

_NO_TEXT = Estimate(math.nan, math.nan, math.nan)
_NUM_SAMPLES = 3  # texts that a report shows of each label
_MAX_NAMED_ROWS = 1000  # whose prefixes it names
CURVE_STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


@checks_arguments
def evaluate(
    cp: ControlPrefix,
    rows: Rows,
    classifiers: Sequence[AttributeClassifier],
    *,
    columns: Columns | None = None,
    strengths: Sequence[float] = CURVE_STRENGTHS,
    curve_rows: int = 32,
    max_new_tokens: int = 48,
    temperature: float | None = 0.8,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Generate every row's completion, and measure what the prefixes did.

    Rows are requested as they are; the comparisons without attributes, and the curves, are also
    without the attribute space's default labels. Intervals are 95 % and count rows with the
    same prompt as one.

    Args:
        cp: With the prefixes that the rows name.
        rows: Requests with a completion each, in any form (see `controlprefix.data.as_examples`);
            none that was trained on.
        classifiers: One per attribute to measure, trained on other texts than the prefixes.
        columns: Which columns of the rows hold what, if they have other names.
        strengths: The curves' strengths; 0 and 1 are needed for the cross-talk.
        curve_rows: Rows that the curves use, at each strength of each label.
        max_new_tokens, temperature: Settings of every request.
        seed: Seed of the sampling.
        folder: Where texts are kept as they are generated: an interrupted run continues there.
        progress: Show a progress bar.

    Raises:
        TrainingDataError: If there are no rows, or none with a classified attribute.
        StoreError: If the folder cannot be written.
        MissingDependencyError: If a package of the extra `eval` is not installed.
    """
    examples = cp.with_default_labels(as_examples(rows, columns=columns))
    cp = cp.without_defaults()
    row_ids = _rows_by_label(examples, classifiers)
    if not row_ids:
        attributes = ", ".join(repr(classifier.attribute) for classifier in classifiers)
        raise TrainingDataError(
            f"no row has a label of {attributes or 'a classified attribute'}; give examples and "
            "classifiers of the same attributes"
        )
    if curve_rows < 1:
        raise TrainingDataError(f"curve_rows is {curve_rows}; it must be 1 or more")
    if not {0.0, 1.0} <= set(strengths):
        raise TrainingDataError("strengths must contain 0 and 1, which the others compare with")
    texts = TextCache(cp, folder, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    prompts = [prompt_identity(row) or i for i, row in enumerate(examples)]
    plain = resolvable(cp, (_without(row, row.attributes) for row in examples))
    with_user = [i for ids in _rows_by_user(examples).values() for i in ids]
    others = resolvable(cp, (_without(examples[i], ["user"]) for i in with_user))
    without_user = dict(zip(with_user, others, strict=True))
    curve_ids = random.Random(seed).sample(range(len(examples)), min(curve_rows, len(examples)))
    curve_requests = {
        (key, strength): resolvable(cp, (_with_label(plain[i], key, strength) for i in curve_ids))
        for key in row_ids
        for strength in strengths
    }
    all_curve_rows = [row for requests in curve_requests.values() for row in requests]
    texts.generate([*examples, *plain, *without_user.values(), *all_curve_rows], progress=progress)

    by_attribute = {classifier.attribute: classifier for classifier in classifiers}
    curve_texts = {key: texts.texts(requests) for key, requests in curve_requests.items()}
    curve_prompts = [prompts[i] for i in curve_ids]
    generated, generated_plain = texts.texts(examples), texts.texts(plain)
    curves = _curves(cp, by_attribute, curve_texts, curve_prompts)
    references = [row.completion for row in examples]
    return EvaluationReport(
        classifiers={
            name: {
                "accuracy": classifier.accuracy,
                "calibration_error": classifier.calibration_error,
            }
            for name, classifier in by_attribute.items()
        },
        attribute_accuracy=_accuracy(by_attribute, row_ids, generated, prompts),
        attribute_accuracy_without=_accuracy(by_attribute, row_ids, generated_plain, prompts),
        attribute_accuracy_references=_accuracy(by_attribute, row_ids, references, prompts),
        not_classified=_not_classified(examples, row_ids),
        curves=curves,
        monotonicity={
            name: spearman(
                [point.strength for point in points], [point.probability.mean for point in points]
            )
            for name, points in curves.items()
        },
        cross_talk=_cross_talk(classifiers, row_ids, curve_texts, curve_prompts),
        quality=_quality(cp, generated, prompts),
        quality_without=_quality(cp, generated_plain, prompts),
        quality_references=_quality(cp, references, prompts),
        content={
            "similarity": bootstrap_mean(similarity(generated, references), prompts),
            "chrF": bootstrap_mean(chrf(generated, references), prompts),
        },
        users=_user_similarity(
            examples,
            generated,
            {i: texts.texts([row])[0] for i, row in without_user.items()},
            prompts,
        ),
        num_rows=len(examples),
        samples=tuple(
            TextSample(
                key.name,
                tuple(
                    (
                        examples[i].texts[-1],
                        generated[i],
                        generated_plain[i],
                        references[i],
                    )
                    for i in ids[:_NUM_SAMPLES]
                ),
            )
            for key, ids in row_ids.items()
        ),
        about=about_prefixes(cp, examples),
    )


def resolvable(cp: ControlPrefix, rows: Iterable[AnyRequest]) -> list[AnyRequest]:
    """Rows made of others by leaving prefixes out, `when` too if no gated one is left."""
    result = []
    for row in rows:
        if row.when == "relevant":
            try:
                cp.resolve(row)
            except RequestError:
                row = row.model_copy(update={"when": "always"})
        result.append(row)
    return result


def about_prefixes(cp: ControlPrefix, rows: Sequence[Example]) -> dict[str, Any]:
    """What results of rows were made with.

    Args:
        cp: With the prefixes that the rows name.
        rows: The rows.
    """
    # Rows that name the same prefixes are looked up once.
    distinct = {repr(row.named_parts): row for row in rows[:_MAX_NAMED_ROWS]}
    used = {
        f"{part.used.kind} {part.used.name} version {part.used.version}"
        for resolved in map(cp.resolve, distinct.values())
        for part in resolved.parts
    }
    frozen = cp.frozen_model
    return provenance(
        model=f"{frozen.geometry.model_name} in {str(frozen.dtype).removeprefix('torch.')}",
        weights=frozen.fingerprint[:12],
        data=describe_rows(rows),
        store=cp.store.display_name,
        tenant=cp.store.tenant,
        prefixes=sorted(used),
    )


def describe_rows(rows: Sequence[Example]) -> str:
    """The number of rows, and the beginning of a hash of them."""
    data = hashlib.sha256(repr([row.model_dump() for row in rows]).encode()).hexdigest()
    return f"{len(rows)} rows, {data[:12]}"


def _quality(cp: ControlPrefix, texts: Sequence[str], prompts: Sequence[Hashable]) -> TextQuality:
    nlls = base_model_nlls(cp, texts)
    nll = bootstrap_mean([*nlls.values()], [prompts[i] for i in nlls]) if nlls else _NO_TEXT
    return TextQuality(
        nll,
        distinct_n(texts, 1),
        distinct_n(texts, 2),
        self_bleu(texts),
        statistics.fmean(len(words_of(text)) for text in texts),
    )


def base_model_nlls(cp: ControlPrefix, texts: Sequence[str]) -> dict[int, float]:
    """Nats per token of texts under the model without prefixes.

    Returns:
        By the number of a text, without the empty ones.
    """
    written = {
        i: Example(prompt="", raw=True, completion=text)
        for i, text in enumerate(texts)
        if text.strip()
    }
    scores = cp.without_defaults().score([*written.values()]) if written else []
    return {
        i: -score.log_likelihood / max(1, score.num_tokens)
        for i, score in zip(written, scores, strict=True)
    }


def base_model_nll(cp: ControlPrefix, texts: Sequence[str]) -> float:
    """The mean of `base_model_nlls`; NaN if all texts are empty."""
    nlls = base_model_nlls(cp, texts)
    return statistics.fmean(nlls.values()) if nlls else math.nan


def _rows_by_label(
    rows: Sequence[Example], classifiers: Sequence[AttributeClassifier]
) -> dict[PrefixKey, list[int]]:
    """The rows that ask for each classified label, and for it alone."""
    row_ids: dict[PrefixKey, list[int]] = {}
    for classifier in classifiers:
        for label in classifier.labels:
            key = PrefixKey.for_label(classifier.attribute, label)
            ids = [
                i for i, row in enumerate(rows) if _single_label(row, classifier.attribute) == label
            ]
            if ids:
                row_ids[key] = ids
    return row_ids


def _accuracy(
    classifiers: Mapping[str, AttributeClassifier],
    row_ids: Mapping[PrefixKey, list[int]],
    texts: Sequence[str],
    prompts: Sequence[Hashable],
) -> dict[str, Estimate]:
    """Per label, how often the classifier predicts it for the texts of its rows."""
    accuracy = {}
    for key, ids in row_ids.items():
        classifier = classifiers[key.attribute]
        predicted = classifier.probabilities([texts[i] for i in ids]).argmax(dim=1)
        hits = (predicted == classifier.labels.index(key.label)).tolist()
        accuracy[key.name] = wilson_proportion(hits, [prompts[i] for i in ids])
    return accuracy


def _curves(
    cp: ControlPrefix,
    classifiers: Mapping[str, AttributeClassifier],
    texts: Mapping[tuple[PrefixKey, float], Sequence[str]],
    prompts: Sequence[Hashable],
) -> dict[str, list[CurvePoint]]:
    """Per label, what each strength of it alone does."""
    curves: dict[str, list[CurvePoint]] = {}
    for key, strength in sorted(texts, key=lambda item: item[1]):
        classifier = classifiers[key.attribute]
        column = classifier.labels.index(key.label)
        curve_texts = texts[key, strength]
        probabilities = classifier.probabilities(curve_texts)[:, column].tolist()
        nll = base_model_nll(cp, curve_texts)
        point = CurvePoint(strength, bootstrap_mean(probabilities, prompts), nll)
        curves.setdefault(key.name, []).append(point)
    return curves


def _cross_talk(
    classifiers: Sequence[AttributeClassifier],
    keys: Collection[PrefixKey],
    texts: Mapping[tuple[PrefixKey, float], Sequence[str]],
    prompts: Sequence[Hashable],
) -> dict[str, dict[str, Estimate]]:
    """Per label, how much strength 1 against 0 adds to the probability of every label."""
    return {
        key.name: {
            PrefixKey.for_label(classifier.attribute, label).name: bootstrap_mean(
                difference.tolist(), prompts
            )
            for classifier in classifiers
            for label, difference in zip(
                classifier.labels,
                (
                    classifier.probabilities(texts[key, 1.0])
                    - classifier.probabilities(texts[key, 0.0])
                ).T,
                strict=True,
            )
        }
        for key in keys
    }


def _user_similarity(
    rows: Sequence[Example],
    texts: Sequence[str],
    texts_without: Mapping[int, str],
    prompts: Sequence[Hashable],
) -> dict[str, Estimate]:
    """How much nearer a user's prefix brings texts to what they wrote, in other rows."""
    similarities = {}
    for user, ids in _rows_by_user(rows).items():
        written = embed([rows[i].completion for i in ids])
        with_user = embed([texts[i] or " " for i in ids])
        without_user = embed([texts_without[i] or " " for i in ids])
        cosines = (with_user - without_user) @ written.T
        others = (cosines.sum(dim=1) - cosines.diagonal()) / (len(ids) - 1)
        similarities[user] = bootstrap_mean(others.tolist(), [prompts[i] for i in ids])
    return similarities


def _not_classified(rows: Sequence[Example], classified: Collection[PrefixKey]) -> tuple[str, ...]:
    names = {
        label.key.name
        for row in rows
        for label in weighted_labels(row.attributes)
        if label.key not in classified
    }
    return tuple(sorted(names))


def _single_label(row: Example, attribute: str) -> str | None:
    """The label of an attribute that a row asks for, if it is exactly one."""
    weights = {
        label.label: label.weight * row.strengths.get(attribute, 1.0)
        for label in weighted_labels(row.attributes)
        if label.attribute == attribute and label.weight
    }
    ((label, weight), *others) = weights.items() or ((None, 0.0),)
    return label if weight > 0 and not others else None


def _with_label(row: Example, key: PrefixKey, strength: float) -> Example:
    """A row that asks for one label alone."""
    return row.model_copy(update={"attributes": {key.attribute: {key.label: float(strength)}}})


def _without(row: Example, parts: Collection[str]) -> Example:
    """A row without some of its attributes or its user."""
    fields = {
        "attributes": {name: v for name, v in row.attributes.items() if name not in parts},
        "user": None if "user" in parts else row.user,
        "strengths": {name: v for name, v in row.strengths.items() if name not in parts},
    }
    return row.model_copy(update=fields)


def _rows_by_user(rows: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each user with two or more."""
    row_ids: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.user is not None:
            row_ids.setdefault(row.user, []).append(i)
    return {user: ids for user, ids in sorted(row_ids.items()) if len(ids) > 1}
