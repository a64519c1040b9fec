"""Public data sets of texts with labels or facts, from JSON Lines files, gzipped.

A folder has `<name>.<split>.jsonl.gz` with splits `train`, `dev` and `test`.
"""

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from controlprefix.data import linearize

MAX_CHARACTERS = 240
DATA_SETS = ("formality", "sentiment", "e2e", "webnlg", "scitldr", "asset", "naija")
FILES = {"formality": "formality_pavlick", "sentiment": "sentiment_yelp"}
TASKS = {"formality": "sentence", "sentiment": "review"}
DESCRIPTIONS = {"sentence": "a sentence", "review": "a sentence of a restaurant review"}
FACTS = "Write one or two sentences that say these facts and no others:"
INSTRUCTIONS = {
    "e2e": FACTS,
    "webnlg": FACTS,
    "scitldr": "Summarize this abstract of a paper in one sentence:",
    "asset": "Simplify this sentence:",
    "naija": "Say this in Nigerian Pidgin:",
}
MAX_ABSTRACT_WORDS = 130


@dataclass(frozen=True)
class Row:
    """A text to write: after a prompt, with a label, or both.

    Attributes:
        completion, prompt: The text, and the facts that it states.
        label: Its label of the data set's attribute.
        references: All correct texts.
        is_seen: Whether the label occurs in training rows.
    """

    completion: str
    prompt: str = ""
    label: str | None = None
    references: tuple[str, ...] = ()
    is_seen: bool = True


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        name: Its name.
        task, attribute: Names of the prefixes.
        has_few_labels: Whether methods without attributes train one adapter per label.
        train, dev, test: Rows of each split.
        classifiers: Name -> a classifier of labels, trained on rows that no method gets.
    """

    name: str
    task: str
    attribute: str | None
    has_few_labels: bool
    train: Sequence[Row]
    dev: Sequence[Row] = ()
    test: Sequence[Row] = ()
    classifiers: dict[str, Pipeline] = field(default_factory=dict)

    def instruction(self, row: Row) -> str:
        """What an instructed model is told."""
        if self.has_few_labels:
            return f"Write {DESCRIPTIONS[self.task]} that is {row.label}. Write nothing else."
        return f"{INSTRUCTIONS[self.name]} {row.prompt}"

    def labels(self) -> list[str]:
        """All labels of training rows."""
        return sorted({str(row.label) for row in self.train})


def read_rows(folder: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one file."""
    path = folder / f"{name}.{split}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; give the folder with the data sets")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    """The rows in random order."""
    items = list(rows)
    return random.Random(seed).sample(items, len(items))


def labelled(folder: Path, name: str, attribute: str, split: str) -> list[Row]:
    """Short texts with a label other than neutral."""
    return [
        Row(row["text"], label=row["attrs"][attribute])
        for row in read_rows(folder, name, split)
        if row["attrs"].get(attribute) not in (None, "neutral")
        and len(row["text"]) <= MAX_CHARACTERS
    ]


def word_classifier(rows: Sequence[Row]) -> Pipeline:
    """A linear classifier of labels over words and pairs of words."""
    return _fitted(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), rows)


def character_classifier(rows: Sequence[Row]) -> Pipeline:
    """A linear classifier of labels over 2 to 5 characters inside words."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return _fitted(vectorizer, rows)


def _fitted(vectorizer: TfidfVectorizer, rows: Sequence[Row]) -> Pipeline:
    pipeline = make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=1000))
    return pipeline.fit([row.completion for row in rows], [row.label for row in rows])


@cache
def load(
    folder: Path, name: str, seed: int, num_rows: int, *, all_references: bool = False
) -> DataSet:
    """A data set, of which the first `num_rows` training rows are for the methods.

    The other training rows are for the classifiers. A training row is one of the references of
    its facts, or with `all_references` each of them.
    """
    if name in FILES:
        train, dev, test = (
            shuffled(labelled(folder, FILES[name], name, split), seed)
            for split in ("train", "dev", "test")
        )
        classifiers = {FILES[name]: word_classifier(train[num_rows:])}
        if name == "formality":
            other = labelled(folder, "formality_squinky", "formality", "train")
            classifiers["formality_squinky"] = word_classifier(other)
        return DataSet(name, TASKS[name], name, True, train[:num_rows], dev, test, classifiers)
    rng = random.Random(seed)
    read = {"e2e": _e2e, "webnlg": _webnlg, "scitldr": _scitldr, "asset": _asset, "naija": _naija}[
        name
    ]
    train, dev, test = (
        shuffled(read(folder, split, rng), seed) for split in ("train", "dev", "test")
    )
    if all_references:
        train = shuffled(
            (replace(row, completion=text) for row in train for text in row.references), seed
        )
    attribute = "category" if name == "webnlg" else None
    task = "describe" if name in ("e2e", "webnlg") else name
    return DataSet(name, task, attribute, False, train[:num_rows], dev, test)


def _e2e(folder: Path, split: str, rng: random.Random) -> list[Row]:
    return [
        Row(rng.choice(row["refs"]), row["mr"], None, tuple(row["refs"]))
        for row in read_rows(folder, "e2e", split)
    ]


def _scitldr(folder: Path, split: str, rng: random.Random) -> list[Row]:
    return [
        Row(rng.choice(row["targets"]), row["source"], None, tuple(row["targets"]))
        for row in read_rows(folder, "summarization_scitldr", split)
        if len(row["source"].split()) <= MAX_ABSTRACT_WORDS
    ]


def _asset(folder: Path, split: str, rng: random.Random) -> list[Row]:
    return [
        Row(rng.choice(row["asset_refs"]), row["source"], None, tuple(row["asset_refs"]))
        for row in read_rows(folder, "simplification_asset", split)
        if len(row["source"]) <= MAX_CHARACTERS
    ]


def _naija(folder: Path, split: str, rng: random.Random) -> list[Row]:
    return [
        Row(row["text"], row["english"], None, (row["text"],))
        for row in read_rows(folder, "varieties", split)
        if row["variety"] == "naija" and row["english"]
    ]


def _webnlg(folder: Path, split: str, rng: random.Random) -> list[Row]:
    return [
        Row(
            rng.choice(row["refs"]),
            linearize(row["triples"]),
            row["category"],
            tuple(row["refs"]),
            row["seen_category"],
        )
        for row in read_rows(folder, "webnlg", split)
        if row["size"] <= 3
    ]
