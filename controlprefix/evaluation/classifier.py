"""Judges: which label a text shows, learned from labelled texts that no prefix saw."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from controlprefix.embeddings import DEFAULT, embeddings
from controlprefix.errors import ControlPrefixError, StoreError, TrainingDataError
from controlprefix.request import Example

_HELD_OUT = 0.2
_BINS = 10


@dataclass(frozen=True, eq=False)
class Judge:
    """A linear classifier of sentence embeddings.

    Attributes:
        attribute: Whose labels it tells.
        labels: In the order of the columns of `chances`.
        weights, bias: `(size, labels)` and `(labels,)`, float32.
        accuracy: On texts held out when it was learned.
        calibration_error: There: how far its certainty is from how often it is right, in
            the mean over ten bins of certainty (ECE, Guo et al., 2017).
        embedder: See `controlprefix.embeddings`.
    """

    attribute: str
    labels: tuple[str, ...]
    weights: Tensor
    bias: Tensor
    accuracy: float
    calibration_error: float
    embedder: str = DEFAULT

    @classmethod
    def learn(
        cls,
        attribute: str,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        embedder: str = DEFAULT,
        seed: int = 0,
    ) -> Self:
        """Learn from labelled texts; a fifth is held out to say how good it is.

        Raises:
            TrainingDataError: If there are fewer than two labels, or five texts of one.
            ControlPrefixError: If scikit-learn or sentence-transformers is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ControlPrefixError(
                "judges need scikit-learn: pip install 'controlprefix[eval]'"
            ) from error
        if len(texts) != len(labels) or not all(isinstance(one, str) for one in labels):
            raise TrainingDataError(
                f"{len(texts)} texts and {len(labels)} labels; give a label for each, a text too"
            )
        known = tuple(sorted(set(labels)))
        counts = {label: sum(one == label for one in labels) for label in known}
        if len(known) < 2 or min(counts.values()) < 5:
            raise TrainingDataError(
                f"a judge of {attribute!r} needs two labels and five texts of each; there are: "
                f"{', '.join(f'{count} of {label}' for label, count in counts.items()) or 'none'}"
            )
        embedded = embeddings(texts, embedder).numpy()
        size = max(len(known), round(_HELD_OUT * len(texts)))  # one of each label at least
        seen, unseen, its, theirs = train_test_split(
            embedded, list(labels), test_size=size, stratify=list(labels), random_state=seed
        )
        model = LogisticRegression(C=10, max_iter=2000, class_weight="balanced").fit(seen, its)
        weights = torch.tensor(model.coef_, dtype=torch.float32).T
        bias = torch.tensor(model.intercept_, dtype=torch.float32)
        if len(known) == 2:  # it keeps the difference of the two alone
            weights = torch.cat([torch.zeros_like(weights), weights], dim=1)
            bias = torch.cat([torch.zeros_like(bias), bias])
        chances = torch.softmax(torch.tensor(unseen) @ weights + bias, dim=1)
        right = torch.tensor([known.index(label) for label in theirs])
        return cls(
            attribute,
            known,
            weights,
            bias,
            accuracy=float((chances.argmax(1) == right).float().mean()),
            calibration_error=_calibration_error(chances, right),
            embedder=embedder,
        )

    def chances(self, texts: Sequence[str]) -> Tensor:
        """Of each label for each text, `(texts, labels)`; an empty text is read as a space."""
        read = embeddings([text or " " for text in texts], self.embedder)
        return torch.softmax(read @ self.weights + self.bias, dim=1)

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            StoreError: If that cannot be written.
        """
        about = {
            "attribute": self.attribute,
            "labels": self.labels,
            "embedder": self.embedder,
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
            "weights": self.weights.tolist(),
            "bias": self.bias.tolist(),
        }
        try:
            Path(path).write_text(json.dumps(about) + "\n")
        except OSError as error:
            raise StoreError(f"cannot write the judge to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ControlPrefixError: If it cannot be read.
        """
        try:
            about = json.loads(Path(path).read_text())
            weights, bias = torch.tensor(about.pop("weights")), torch.tensor(about.pop("bias"))
            return cls(**{**about, "labels": tuple(about["labels"])}, weights=weights, bias=bias)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ControlPrefixError(f"cannot read the judge in {path}: {error}") from error


def filled_in(
    examples: Sequence[Example], *, least: float = 0.5, embedder: str = DEFAULT, seed: int = 0
) -> list[Example]:
    """Examples in which the attributes that a row leaves open have their likeliest label.

    For rows from several sources, each labelled with another attribute: labels that are learned
    from rows that have all of them get on better when asked for together. Each attribute's judge
    learns from the rows that say it.

    Args:
        examples: Whose single labels (not mixtures) tell the judges.
        least: Chance that a label must have; where none has, the attribute stays open.
        embedder, seed: See `Judge.learn`.

    Raises:
        TrainingDataError: If an attribute has fewer than two labels, or five rows of one.
        ControlPrefixError: If scikit-learn or sentence-transformers is not installed.
    """
    said: dict[str, list[tuple[str, str]]] = {}
    for row in examples:
        for attribute, label in row.attributes.items():
            if isinstance(label, str):
                said.setdefault(attribute, []).append((row.completion, label))
    added: list[dict[str, str]] = [{} for _ in examples]
    for attribute, known in said.items():
        judge = Judge.learn(attribute, *zip(*known, strict=True), embedder=embedder, seed=seed)
        open_rows = [i for i, row in enumerate(examples) if attribute not in row.attributes]
        if not open_rows:
            continue
        chances = judge.chances([examples[i].completion for i in open_rows])
        for i, chance, best in zip(open_rows, *map(list, chances.max(dim=1)), strict=True):
            if chance >= least:
                added[i][attribute] = judge.labels[int(best)]
    return [
        row.model_copy(update={"attributes": {**row.attributes, **more}})
        for row, more in zip(examples, added, strict=True)
    ]


def _calibration_error(chances: Tensor, right: Tensor) -> float:
    certainty, found = chances.max(dim=1)
    bins = (certainty * _BINS).long().clamp(max=_BINS - 1)
    error = 0.0
    for one in bins.unique():
        inside = bins == one
        gap = (found[inside] == right[inside]).float().mean() - certainty[inside].mean()
        error += float(inside.float().mean() * gap.abs())
    return error
