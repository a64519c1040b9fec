"""WordClassifier: which label a text shows, by its words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.evaluation.classifier import check_labelled_texts
from controlprefix.evaluation.metrics import spaced
from controlprefix.prefixes.key import composed

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

_WORD = r"\w+|[^\w\s]"  # punctuation and emoji tell of style too


@dataclass(frozen=True)
class WordClassifier:
    """Logistic regression on words and pairs of words, weighted by TF-IDF.

    Attributes:
        attribute: The attribute whose labels it predicts.
        pipeline: A fitted scikit-learn pipeline of texts with `predict_proba`.
    """

    attribute: str
    pipeline: "Pipeline"

    @classmethod
    def train(cls, attribute: str, texts: Sequence[str], labels: Sequence[str]) -> Self:
        """Train on labelled texts.

        Args:
            attribute: Name of the attribute.
            texts: At least five per label.
            labels: One per text.

        Raises:
            TrainingDataError: If there are fewer than two labels, or fewer than five texts for one.
            MissingDependencyError: If scikit-learn is not installed.
        """
        with requires_extra("eval", "an attribute classifier"):
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline

        check_labelled_texts(attribute, texts, labels)
        pipeline = make_pipeline(
            TfidfVectorizer(
                preprocessor=_in_words,
                token_pattern=_WORD,
                ngram_range=(1, 2),
                sublinear_tf=True,
            ),
            LogisticRegression(C=10, max_iter=2000, class_weight="balanced"),
        )
        return cls(composed(attribute), pipeline.fit(list(texts), list(map(composed, labels))))

    @property
    def labels(self) -> Sequence[str]:
        """The labels, in the order of the columns of `probabilities`."""
        return [str(label) for label in self.pipeline.classes_]

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """The probability of each label per text, `(num_texts, num_labels)`, float32."""
        return torch.as_tensor(self.pipeline.predict_proba(list(texts)), dtype=torch.float32)


def _in_words(text: str) -> str:
    return spaced(text.lower())
