"""Sets of attributes with training rows, classifiers and a reward, each from rows of its own."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from sklearn.pipeline import Pipeline

from controlprefix import Example
from controlprefix.evaluation import AttributeClassifier
from controlprefix.evaluation.harness import base_model_nll
from controlprefix.evaluation.rewards import AttributeReward
from controlprefix.model import FrozenModel

from lib.datasets import Row, character_classifier, labelled, shuffled, word_classifier
from lib.models import engine

Combination = Mapping[str, str]  # attribute -> label

STUDIES: dict[str, dict[str, str]] = {  # study -> attribute -> file
    "aspects": dict.fromkeys(
        ("sentiment", "topic", "toxicity"), "aspects_sentiment_topic_toxicity"
    ),
    "styles": {
        "formality": "formality_pavlick",
        "sentiment": "sentiment_yelp",
        "politeness": "politeness_stanford",
    },
}
IN_WORDS = {
    "world": "about world politics",
    "sports": "about sports",
    "business": "about business",
    "sci/tech": "about science and technology",
    "nontoxic": "decent, without insults",
    "toxic": "rude and insulting",
}
BATCH_SIZE = 8
MAX_CLASSIFIER_ROWS = 4000  # of an attribute, and as many of the reward
NUM_TEST_ROWS = 128


@dataclass(frozen=True)
class Study:
    """A set of attributes and its rows.

    Attributes:
        name: Its name.
        frozen: The model.
        labels: Attribute -> its labels.
        rows: Training rows, each with one label such as `topic=sports`.
        word_classifiers, character_classifiers, classifiers: Per attribute, over words, over
            characters, and over sentence embeddings.
        test_rows: Rows of the test splits, like `rows`.
        reward_rows: Rows that train the classifiers of a reward, like `rows`.
    """

    name: str
    frozen: FrozenModel
    labels: dict[str, list[str]]
    rows: list[Row]
    word_classifiers: dict[str, Pipeline]
    character_classifiers: dict[str, Pipeline]
    classifiers: dict[str, AttributeClassifier]
    test_rows: list[Row]
    reward_rows: list[Row]

    @cached_property
    def reward(self) -> AttributeReward:
        """Classifiers over embeddings and words, of rows that nothing else gets."""
        rows = [
            Example(prompt="", raw=True, completion=row.completion, attributes=attributes_of(row))
            for row in self.reward_rows
        ]
        return AttributeReward.train(rows)

    @cached_property
    def base_model_nll(self) -> float:
        """Nats per token of the test rows under the plain model."""
        texts = [row.completion for row in self.test_rows]
        return base_model_nll(engine(self.frozen), texts)

    def combinations(self) -> list[Combination]:
        """Every combination of one label per attribute."""
        return [
            dict(zip(self.labels, labels, strict=True))
            for labels in itertools.product(*self.labels.values())
        ]


@cache
def load_study(folder: Path, name: str, num_rows: int, frozen: FrozenModel) -> Study:
    """A study with `num_rows` training rows in all.

    One half of the other rows trains the classifiers, and the rest those of the reward.
    """
    labels: dict[str, list[str]] = {}
    rows: list[Row] = []
    test_rows: list[Row] = []
    reward_rows: list[Row] = []
    word_classifiers, character_classifiers, classifiers = {}, {}, {}
    share = num_rows // len(STUDIES[name])
    for attribute, file in STUDIES[name].items():
        train = shuffled(labelled(folder, file, attribute, "train"), 0)
        test = shuffled(labelled(folder, file, attribute, "test"), 0)[:NUM_TEST_ROWS]
        labels[attribute] = sorted({str(row.label) for row in train})
        rows += [replace(row, label=f"{attribute}={row.label}") for row in train[:share]]
        test_rows += [replace(row, label=f"{attribute}={row.label}") for row in test]
        rest = train[share:]
        num_classifier_rows = min(MAX_CLASSIFIER_ROWS, len(rest) // 2)
        others = rest[:num_classifier_rows]
        rest = rest[num_classifier_rows:] + shuffled(labelled(folder, file, attribute, "dev"), 0)
        reward_rows += [
            replace(row, label=f"{attribute}={row.label}") for row in rest[:MAX_CLASSIFIER_ROWS]
        ]
        word_classifiers[attribute] = word_classifier(others)
        character_classifiers[attribute] = character_classifier(others)
        classifiers[attribute] = AttributeClassifier.train(
            attribute, [row.completion for row in others], [str(row.label) for row in others]
        )
    rows = shuffled(rows, 0)
    return Study(
        name,
        frozen,
        labels,
        rows,
        word_classifiers,
        character_classifiers,
        classifiers,
        test_rows,
        reward_rows,
    )


def parts_of(combination: Combination) -> list[str]:
    """Names such as `topic=sports`."""
    return [f"{attribute}={label}" for attribute, label in combination.items()]


def attributes_of(row: Row) -> dict[str, str]:
    """The attribute and label of a training row."""
    attribute, _, label = str(row.label).partition("=")
    return {attribute: label}
