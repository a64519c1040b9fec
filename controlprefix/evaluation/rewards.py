"""Rewards for reinforcement learning: classifiers, and checks of texts.

A reward is any function of requests and texts that gives a number per text, higher is better.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from controlprefix.embeddings import DEFAULT_EMBEDDER
from controlprefix.errors import TrainingDataError, known_names
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.metrics import words_of
from controlprefix.evaluation.word_classifier import WordClassifier
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.request import Request
from controlprefix.training import Reward
from controlprefix.training.policy import rewards_of

_MIN_LOG_PROBABILITY = math.log(0.01)  # so that no single text outweighs the others


class LabelClassifier(Protocol):
    """Anything that gives the labels of an attribute probabilities, as `AttributeClassifier`."""

    @property
    def attribute(self) -> str:
        """The attribute."""

    @property
    def labels(self) -> Sequence[str]:
        """Its labels, in the order of the columns of `probabilities`."""

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """The probability of each label per text, `(num_texts, num_labels)`."""


@dataclass(frozen=True)
class AttributeReward:
    """The log-probability of the requested labels, summed over a request's attributes.

    Several classifiers of an attribute are averaged. In a mixture of labels, the one with the
    largest weight counts. A text's log-probability counts as at least log .01.

    Attributes:
        classifiers: At least one for each attribute that requests name.
    """

    classifiers: Sequence[LabelClassifier]

    @classmethod
    def train(
        cls, examples: Sequence[Example], *, embedder: str = DEFAULT_EMBEDDER, seed: int = 0
    ) -> Self:
        """Train two classifiers for each attribute of examples, over embeddings and over words.

        Their mean is harder to exploit than either alone: see
        docs/results/attributes-aspects-80.md.

        Args:
            examples: At least five of each label. Use other ones than those that prefixes are
                trained on, and others again to measure accuracy.
            embedder, seed: See `AttributeClassifier.train`.

        Raises:
            TrainingDataError: If an attribute has fewer than two labels, or five texts of one.
            MissingDependencyError: If scikit-learn or sentence-transformers is not installed.
        """
        texts: dict[str, list[tuple[str, str]]] = {}
        for row in examples:
            for attribute, label in requested_labels(row).items():
                texts.setdefault(attribute, []).append((row.completion, label))
        classifiers: list[LabelClassifier] = []
        for attribute, pairs in texts.items():
            own_texts, labels = zip(*pairs, strict=True)
            classifiers += [
                AttributeClassifier.train(
                    attribute, own_texts, labels, embedder=embedder, seed=seed
                ),
                WordClassifier.train(attribute, own_texts, labels),
            ]
        return cls(classifiers)

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """The reward of each text, 0 at best.

        Raises:
            TrainingDataError: If there is no classifier of a requested attribute or label.
        """
        labels = [requested_labels(request) for request in requests]
        rewards = [0.0] * len(texts)
        for attribute in dict.fromkeys(name for own in labels for name in own):
            classifiers = [c for c in self.classifiers if c.attribute == attribute]
            if not classifiers:
                names = known_names(attribute, {c.attribute for c in self.classifiers})
                raise TrainingDataError(
                    f"there is no classifier of {attribute!r}; classifiers: {names}"
                )
            rows = [i for i, own in enumerate(labels) if attribute in own]
            for classifier in classifiers:
                table = classifier.probabilities([texts[i] or " " for i in rows])
                for i, probabilities in zip(rows, table.log().tolist(), strict=True):
                    label = labels[i][attribute]
                    if label not in classifier.labels:
                        names = known_names(label, classifier.labels)
                        raise TrainingDataError(
                            f"the classifier of {attribute!r} has no label {label!r}; it has: "
                            f"{names}"
                        )
                    value = probabilities[list(classifier.labels).index(label)]
                    rewards[i] += max(value, _MIN_LOG_PROBABILITY) / len(classifiers)
        return rewards


@dataclass(frozen=True)
class LengthReward:
    """0 inside a range of words; outside, minus the distance to it relative to its end.

    Attributes:
        minimum, maximum: Number of words.
    """

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum:
            raise TrainingDataError(
                f"a length of {self.minimum} to {self.maximum} words; give two numbers from 0 on, "
                "the smaller one first"
            )

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """The reward of each text."""
        counts = [len(words_of(text)) for text in texts]
        return [
            min(0.0, (count - self.minimum) / max(self.minimum, 1))
            + min(0.0, (self.maximum - count) / max(self.maximum, 1))
            for count in counts
        ]


@dataclass(frozen=True)
class PatternReward:
    """1 for a text in which a regular expression is found, else 0.

    Attributes:
        pattern: For Python's `re`.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            message = f"{self.pattern!r} is no regular expression: {error}"
            raise TrainingDataError(message) from error

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """The reward of each text."""
        return [float(re.search(self.pattern, text) is not None) for text in texts]


class JsonReward:
    """1 for a text that is valid JSON, else 0."""

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """The reward of each text."""
        return [float(_is_json(text)) for text in texts]


@dataclass(frozen=True)
class WeightedReward:
    """A weighted sum of rewards.

    Attributes:
        rewards: Rewards and their weights.
    """

    rewards: Sequence[tuple[Reward, float]]

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """The reward of each text.

        Raises:
            TrainingDataError: If a reward gives anything but a finite number for each.
        """
        columns = [
            [weight * value for value in rewards_of(reward, requests, texts)]
            for reward, weight in self.rewards
        ]
        return [sum(values) for values in zip(*columns, strict=True)]


def requested_labels(request: Request) -> Mapping[str, str]:
    """Per attribute the requested label; of a mixture the one with the largest weight.

    An attribute with a strength of 0 or below has none.
    """
    best: dict[str, tuple[str, float]] = {}
    for attribute, label, weight in weighted_labels(request.attributes):
        weight *= request.strengths.get(attribute, 1.0)
        if weight > max(0.0, best[attribute][1] if attribute in best else 0.0):
            best[attribute] = label, weight
    return {attribute: label for attribute, (label, _) in best.items()}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # though Python reads it


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True
