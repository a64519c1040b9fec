"""EvaluationReport: the results of `evaluate`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlprefix.evaluation.metrics import Estimate


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a strength of a label does.

    Attributes:
        strength: Strength of the label alone.
        probability: Mean probability of the label by the classifier.
        base_model_nll: Mean negative log-likelihood of the texts under the model without
            prefixes, nats per token: lower is plainer.
    """

    strength: float
    probability: Estimate
    base_model_nll: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The results of an evaluation. Labels are named `formality=formal`.

    Attributes:
        classifiers: Per attribute, accuracy and calibration error of its classifier.
        attribute_accuracy: Per label, how often the classifier predicts it for texts that were
            requested with it; `attribute_accuracy_without`: for the same requests without
            attributes.
        not_classified: Labels that rows ask for and no result counts: without a classifier
            that knows them, or only in mixtures.
        curves: Per label, what strengths of it alone do.
        monotonicity: Per label, the rank correlation of strength and probability.
        cross_talk: Per label, how much strength 1 against 0 adds to the probability of every
            label.
        base_model_nll: Negative log-likelihood of the texts under the model without prefixes,
            nats per token.
        distinct_1, distinct_2, self_bleu: Diversity of the texts.
        content: Similarity to the rows' own completions (sentence embeddings), and chrF.
        users: Per user with two rows or more, how much nearer (cosine of sentence embeddings)
            texts with the user's prefix are to the user's completions of other rows than texts
            without it.
        num_rows: Rows that were requested.
    """

    classifiers: dict[str, dict[str, float]]
    attribute_accuracy: dict[str, Estimate]
    attribute_accuracy_without: dict[str, Estimate]
    not_classified: tuple[str, ...]
    curves: dict[str, list[CurvePoint]]
    monotonicity: dict[str, float]
    cross_talk: dict[str, dict[str, Estimate]]
    base_model_nll: Estimate
    distinct_1: float
    distinct_2: float
    self_bleu: float
    content: dict[str, Estimate]
    users: dict[str, Estimate]
    num_rows: int

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, its plots as PNG, and `report.html`, which contains all.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
            MissingDependencyError: If matplotlib or jinja2 is not installed.
        """
        from controlprefix.evaluation.page import write_page

        return write_page(Path(folder), self)

    def to_dict(self) -> dict[str, Any]:
        """All results in a form that JSON can hold."""
        return asdict(self)
