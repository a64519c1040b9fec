"""Figures of texts: how varied they are, what they keep, and how sure a mean is."""

import math
import random
import statistics
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from controlprefix.embeddings import embeddings
from controlprefix.errors import ControlPrefixError

_DRAWS = 1000
_MOST_COMPARED = 64  # texts, in self-BLEU


class Estimate(NamedTuple):
    """A mean, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Of the mean of some values, at least one: what means of values drawn again are like.

    Args:
        values: What was found.
        groups: What each belongs to, such as its prompt: the values of one are not
            independent, so they are drawn together (cluster bootstrap).

    Example:
        >>> estimate([0.5, 0.5])
        Estimate(mean=0.5, low=0.5, high=0.5)
    """
    together: dict[Hashable, list[float]] = {}
    for group, value in zip(groups or range(len(values)), values, strict=True):
        together.setdefault(group, []).append(value)
    sums = [(sum(some), len(some)) for some in together.values()]
    draw = random.Random(0)
    means = []
    for _ in range(_DRAWS):
        drawn = draw.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    low, high = means[round(0.025 * _DRAWS)], means[round(0.975 * _DRAWS) - 1]
    return Estimate(statistics.fmean(values), low, high)


def share(hits: Sequence[bool], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Of how often something is so, with the interval of Wilson (1927), which few hits have too.

    Args:
        hits: At least one.
        groups: As in `estimate`; only different ones count as evidence.

    Example:
        >>> round(share([True, True, True, True]).low, 2)
        0.51
    """
    mean, count = statistics.fmean(hits), len(hits if groups is None else set(groups))
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + (z / count / 2) ** 2)
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))


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

    Of many texts, some are drawn; of fewer than two there is none: NaN.

    Raises:
        ControlPrefixError: If sacrebleu is not installed.
    """
    some = [text for text in texts if text.strip()]
    if len(some) < 2:
        return math.nan
    some = random.Random(0).sample(some, min(len(some), _MOST_COMPARED))
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
