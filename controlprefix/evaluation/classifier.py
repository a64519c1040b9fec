"""AttributeClassifier: which label a text shows, trained on texts that no prefix was trained on."""

import json
import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from controlprefix._io import atomic_path, requires_extra
from controlprefix.attributes.ordinal import is_ordinal
from controlprefix.data import Rows, as_examples
from controlprefix.embeddings import DEFAULT_EMBEDDER, embed, require_trusted
from controlprefix.engine.arguments import checks_arguments
from controlprefix.errors import (
    ControlPrefixError,
    RequestError,
    StoreError,
    TrainingDataError,
)
from controlprefix.example import Example
from controlprefix.prefixes.key import composed
from controlprefix.training.held_out import normalized

_HELD_OUT_FRACTION = 0.2
_MIN_TEXTS_PER_LABEL = 5
_NUM_BINS = 10
_log = logging.getLogger("controlprefix")


@dataclass(frozen=True, eq=False)
class AttributeClassifier:
    """Logistic regression on sentence embeddings.

    Attributes:
        attribute: The attribute whose labels it predicts.
        labels: In the order of the columns of `probabilities`.
        weights, bias: `(embedding_size, num_labels)` and `(num_labels,)`, float32.
        accuracy: On held-out texts.
        calibration_error: Expected calibration error on held-out texts, with ten bins (Guo et
            al., 2017, https://arxiv.org/abs/1706.04599).
        embedder: See `controlprefix.embeddings`.
    """

    attribute: str
    labels: tuple[str, ...]
    weights: Tensor
    bias: Tensor
    accuracy: float
    calibration_error: float
    embedder: str = DEFAULT_EMBEDDER

    def __post_init__(self) -> None:
        # In the form in which requests have them.
        object.__setattr__(self, "attribute", composed(self.attribute))
        object.__setattr__(self, "labels", tuple(map(composed, self.labels)))
        num_labels = len(self.labels)
        fits = self.weights.ndim == 2 and self.weights.shape[1] == num_labels > 1
        if not fits or self.bias.shape != (num_labels,):
            raise ControlPrefixError(
                f"a classifier of {self.attribute!r} has {num_labels} labels, weights of shape "
                f"{tuple(self.weights.shape)} and a bias of shape {tuple(self.bias.shape)}; train "
                "it again"
            )
        if not (self.weights.isfinite().all() and self.bias.isfinite().all()):
            raise ControlPrefixError(
                f"a classifier of {self.attribute!r} has weights that are no numbers; train it "
                "again"
            )

    @classmethod
    def train(
        cls,
        attribute: str,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        embedder: str = DEFAULT_EMBEDDER,
        seed: int = 0,
    ) -> Self:
        """Train on labelled texts; a fifth is held out to measure accuracy.

        Args:
            attribute: Name of the attribute.
            texts: At least five per label.
            labels: One per text.
            embedder: A sentence-transformers model, by name or folder.
            seed: Seed of the split.

        Raises:
            TrainingDataError: If there are fewer than two labels, or fewer than five texts for one.
            MissingDependencyError: If scikit-learn or sentence-transformers is not installed.
        """
        with requires_extra("eval", "an attribute classifier"):
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import train_test_split

        names = check_labelled_texts(attribute, texts, labels)
        embeddings = embed(texts, embedder).numpy()
        identities = _identities(texts, labels)
        first = {identity: i for i, identity in reversed(list(enumerate(identities)))}
        rows = sorted(first.values())
        num_held_out = max(len(names), round(_HELD_OUT_FRACTION * len(rows)))
        _, held_out = train_test_split(
            rows,
            test_size=num_held_out,
            stratify=[labels[i] for i in rows],
            random_state=seed,
        )
        tested = {identities[i] for i in held_out}
        trained = [i for i, identity in enumerate(identities) if identity not in tested]
        train_x, test_x = embeddings[trained], embeddings[held_out]
        train_y, test_y = [labels[i] for i in trained], [labels[i] for i in held_out]
        model = LogisticRegression(C=10, max_iter=2000, class_weight="balanced")
        model.fit(train_x, train_y)
        weights = torch.tensor(model.coef_, dtype=torch.float32).T
        bias = torch.tensor(model.intercept_, dtype=torch.float32)
        if len(names) == 2:  # scikit-learn keeps only the difference of two labels
            weights = torch.cat([torch.zeros_like(weights), weights], dim=1)
            bias = torch.cat([torch.zeros_like(bias), bias])
        probabilities = torch.softmax(torch.tensor(test_x) @ weights + bias, dim=1)
        expected = torch.tensor([names.index(label) for label in test_y])
        return cls(
            attribute,
            names,
            weights,
            bias,
            accuracy=float((probabilities.argmax(1) == expected).float().mean()),
            calibration_error=_calibration_error(probabilities, expected),
            embedder=embedder,
        )

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """The probability of each label per text, `(num_texts, num_labels)`.

        An empty text counts as a space.

        Raises:
            MissingDependencyError: If sentence-transformers is not installed.
        """
        embeddings = embed([text or " " for text in texts], self.embedder)
        return torch.softmax(embeddings @ self.weights + self.bias, dim=1)

    def save(self, path: str | Path) -> None:
        """Write the classifier as JSON.

        Raises:
            StoreError: If the file cannot be written.
        """
        fields = {
            "attribute": self.attribute,
            "labels": self.labels,
            "embedder": self.embedder,
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
            "weights": self.weights.tolist(),
            "bias": self.bias.tolist(),
        }
        try:
            with atomic_path(Path(path)) as unfinished:
                unfinished.write_text(json.dumps(fields) + "\n")
        except OSError as error:
            raise StoreError(f"cannot write the classifier to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ControlPrefixError: If it cannot be read.
        """
        try:
            fields = json.loads(Path(path).read_text())
            fields["labels"] = tuple(fields["labels"])
            require_trusted(fields["embedder"], f"the classifier in {path}")
            weights, bias = torch.tensor(fields.pop("weights")), torch.tensor(fields.pop("bias"))
            return cls(**fields, weights=weights, bias=bias)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ControlPrefixError(f"cannot read the classifier in {path}: {error}") from error


def _identities(texts: Sequence[str], labels: Sequence[str]) -> list[Hashable]:
    """What copies of a text have in common, which are held out together.

    Each row is on its own where a label has too few different texts.
    """
    identities = [normalized(text) for text in texts]
    first: dict[str, str] = {}
    for identity, label in zip(identities, labels, strict=True):
        first.setdefault(identity, label)
    counts = Counter(first.values())
    is_enough = counts.keys() == set(labels) and min(counts.values()) >= _MIN_TEXTS_PER_LABEL
    return list(identities if is_enough else range(len(texts)))


def check_labelled_texts(
    attribute: str, texts: Sequence[str], labels: Sequence[str]
) -> tuple[str, ...]:
    """The different labels of texts, sorted, if a classifier can be trained on them.

    Raises:
        TrainingDataError: If there are fewer than two labels, or fewer than five texts for one.
    """
    if len(texts) != len(labels) or not all(isinstance(label, str) for label in labels):
        raise TrainingDataError(
            f"{len(texts)} texts and {len(labels)} labels; give one label (str) per text"
        )
    counts = Counter(labels)
    names = tuple(sorted(counts))
    if len(names) < 2 or min(counts.values()) < _MIN_TEXTS_PER_LABEL:
        listed = ", ".join(f"{counts[name]} of {name}" for name in names)
        raise TrainingDataError(
            f"a classifier of {attribute!r} needs two labels and {_MIN_TEXTS_PER_LABEL} "
            f"texts of each; there are: {listed or 'none'}"
        )
    return names


@checks_arguments
def pseudo_label(
    examples: Rows,
    *,
    min_probability: float = 0.5,
    embedder: str = DEFAULT_EMBEDDER,
    seed: int = 0,
) -> list[Example]:
    """Fill in the attributes that rows leave open with their most likely label.

    For rows from several sources, each labelled with another attribute: labels trained on rows
    that have all attributes combine better. A classifier per attribute is trained on the rows
    that have it.

    Args:
        examples: Rows in any form; their single labels, not mixtures, train the classifiers.
        min_probability: Probability that a label must have; otherwise the attribute stays open.
            So does an attribute whose classifier is not better on held-out rows than the most
            frequent label, and one whose labels are numbers.
        embedder, seed: See `AttributeClassifier.train`.

    Raises:
        TrainingDataError: If an attribute that rows leave open has fewer than two labels, or five
            rows of one.
        RequestError: If `min_probability` is not between 0 and 1.
        MissingDependencyError: If scikit-learn or sentence-transformers is not installed.

    Reference:
        Lee, "Pseudo-Label", 2013.
    """
    if not 0 <= min_probability <= 1:
        raise RequestError(f"min_probability is {min_probability}; it must be between 0 and 1")
    rows = as_examples(examples)
    labelled: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for attribute, label in row.attributes.items():
            if isinstance(label, str):
                labelled.setdefault(attribute, []).append((row.completion, label))
    added: list[dict[str, str]] = [{} for _ in rows]
    for attribute, pairs in labelled.items():
        texts, labels = zip(*pairs, strict=True)
        open_rows = [i for i, row in enumerate(rows) if attribute not in row.attributes]
        if not open_rows or is_ordinal(labels):
            continue
        classifier = AttributeClassifier.train(
            attribute, texts, labels, embedder=embedder, seed=seed
        )
        most_frequent = max(Counter(labels).values()) / len(labels)
        if classifier.accuracy <= most_frequent:
            _log.warning(
                "%s stays open: its classifier is right on %.2f of held-out rows, the most "
                "frequent label on %.2f",
                attribute,
                classifier.accuracy,
                most_frequent,
            )
            continue
        probabilities = classifier.probabilities([rows[i].completion for i in open_rows])
        for i, row_probabilities in zip(open_rows, probabilities, strict=True):
            best = int(row_probabilities.argmax())
            if row_probabilities[best] >= min_probability:
                added[i][attribute] = classifier.labels[best]
    return [
        row.model_copy(update={"attributes": {**row.attributes, **labels}})
        for row, labels in zip(rows, added, strict=True)
    ]


def _calibration_error(probabilities: Tensor, expected: Tensor) -> float:
    confidence, predicted = probabilities.max(dim=1)
    bins = (confidence * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    error = 0.0
    for index in bins.unique():
        inside = bins == index
        accuracy = (predicted[inside] == expected[inside]).float().mean()
        gap = accuracy - confidence[inside].mean()
        error += float(inside.float().mean() * gap.abs())
    return error
