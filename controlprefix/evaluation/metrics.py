"""Figures of texts: how varied they are, what they keep, and how sure a mean is."""

import random
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from controlprefix.embeddings import embeddings
from controlprefix.errors import ControlPrefixError

_DRAWS = 1000
_MOST_COMPARED = 64  # texts, in self-BLEU


class Estimate(NamedTuple):
    """A mean, and the bounds that hold 95 % of means of rows drawn again (bootstrap)."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Of the mean of some values, at least one.

    Example:
        >>> estimate([1.0, 1.0])
        Estimate(mean=1.0, low=1.0, high=1.0)
    """
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(_DRAWS))
    low, high = means[round(0.025 * _DRAWS)], means[round(0.975 * _DRAWS) - 1]
    return Estimate(statistics.fmean(values), low, high)


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different sequences of n words among all (Li et al., 2016).

    Example:
        >>> distinct(["a b a b"], 1), distinct(["a b a b"], 2)
        (0.5, 0.6666666666666666)
    """
    words = [text.split() for text in texts]
    found = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against the others, 0 to 100: lower is more varied (Zhu et al., 2018).

    Raises:
        ControlPrefixError: If sacrebleu is not installed.
    """
    some = [text for text in texts if text.strip()][:_MOST_COMPARED]
    if len(some) < 2:
        return 0.0
    bleu = _sacrebleu().BLEU(effective_order=True)
    return statistics.fmean(
        bleu.sentence_score(text, [*some[:i], *some[i + 1 :]]).score for i, text in enumerate(some)
    )


def chrf(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF of each text against its reference, 0 to 100 (Popović, 2015).

    Raises:
        ControlPrefixError: If sacrebleu is not installed.
    """
    measure = _sacrebleu().CHRF()
    pairs = zip(texts, references, strict=True)
    return [measure.sentence_score(text, [reference]).score for text, reference in pairs]


def similarity(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Cosine of each text's sentence embedding and its reference's."""
    left, right = embeddings([text or " " for text in texts]), embeddings(references)
    cosines: list[float] = (left * right).sum(dim=1).tolist()
    return cosines


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; values that are equal share their rank.

    Example:
        >>> spearman([1, 2, 3], [10, 20, 90])
        1.0
    """
    return statistics.correlation(_ranks(x), _ranks(y)) if len(set(y)) > 1 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [statistics.fmean(i for i, one in enumerate(ordered) if one == v) for v in values]


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ModuleNotFoundError as error:
        raise ControlPrefixError(
            "BLEU and chrF need sacrebleu: pip install 'controlprefix[eval]'"
        ) from error
    return sacrebleu.metrics
