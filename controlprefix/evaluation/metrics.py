"""Metrics of texts (diversity, similarity), and estimates with confidence intervals."""

import math
import random
import re
import statistics
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from controlprefix._io import requires_extra
from controlprefix.embeddings import embed

_NUM_RESAMPLES = 1000
_MAX_SELF_BLEU_TEXTS = 64


# The factor of the standard error in a 95 % interval of Student's t, for 1 degree of freedom on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval, without limits where one value says nothing."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there were enough values for one."""
        return math.isfinite(self.high - self.low)

    def text(self, number_format: str = ".2f") -> str:
        """The mean and the interval.

        Args:
            number_format: A format of Python, such as `.0%`.

        Example:
            >>> Estimate(0.5, 0.25, 0.75).text()
            '0.50 (0.25 to 0.75)'
            >>> Estimate(0.5, -math.inf, math.inf).text()
            '0.50 (too few for an interval)'
        """
        mean, low, high = (format(value, number_format) for value in self)
        return (
            f"{mean} ({low} to {high})"
            if self.has_interval
            else f"{mean} (too few for an interval)"
        )


def bootstrap_mean(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values with a 95 % bootstrap interval, or of Student's t for fewer than ten.

    A bootstrap of few values is too narrow, and of one value it has no width.

    Args:
        values: At least one.
        groups: What each value belongs to, such as its prompt. Values of one group are not
            independent, so whole groups are resampled (cluster bootstrap) and counted.

    Example:
        >>> bootstrap_mean([0.5, 0.5])
        Estimate(mean=0.5, low=0.5, high=0.5)
    """
    clusters: dict[Hashable, list[float]] = {}
    for group, value in zip(groups or range(len(values)), values, strict=True):
        clusters.setdefault(group, []).append(value)
    sums = [(sum(cluster), len(cluster)) for cluster in clusters.values()]
    if len(sums) <= len(_T) + 1:
        return _student_interval(statistics.fmean(values), sums)
    rng = random.Random(0)
    means = []
    for _ in range(_NUM_RESAMPLES):
        sample = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in sample) / sum(count for _, count in sample))
    means.sort()
    low, high = means[round(0.025 * _NUM_RESAMPLES)], means[round(0.975 * _NUM_RESAMPLES) - 1]
    return Estimate(statistics.fmean(values), low, high)


def _student_interval(mean: float, sums: Sequence[tuple[float, int]]) -> Estimate:
    """A mean of groups, each given as the sum and the number of its values."""
    count = len(sums)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    squares = sum((total - mean * size) ** 2 for total, size in sums)
    error = math.sqrt(count / (count - 1) * squares) / sum(size for _, size in sums)
    return Estimate(mean, mean - _T[count - 2] * error, mean + _T[count - 2] * error)


def wilson_proportion(hits: Sequence[bool], groups: Sequence[Hashable] | None = None) -> Estimate:
    """A proportion with its Wilson interval (Wilson, 1927), which is valid for few hits too.

    Args:
        hits: At least one.
        groups: As in `bootstrap_mean`; the number of groups counts as the sample size.

    Example:
        >>> round(wilson_proportion([True, True, True, True]).low, 2)
        0.51
    """
    # scipy's `proportion_ci` takes whole counts only, which a mean over groups need not be.
    mean, size = statistics.fmean(hits), len(hits if groups is None else set(groups))
    z = statistics.NormalDist().inv_cdf(0.975)
    scale = 1 + z * z / size
    center = (mean + z * z / (2 * size)) / scale
    half_width = z / scale * math.sqrt(mean * (1 - mean) / size + (z / size / 2) ** 2)
    return Estimate(mean, max(0.0, center - half_width), min(1.0, center + half_width))


# Thai to Khmer without their own spaces, kana, and Chinese characters.
_WITHOUT_SPACES = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])"
)


def spaced(text: str) -> str:
    """A text with spaces around the characters of scripts that write none between words.

    So their characters count as words.

    Example:
        >>> spaced("a 中国菜 b").split()
        ['a', '中', '国', '菜', 'b']
    """
    return _WITHOUT_SPACES.sub(r" \1 ", text)


def words_of(text: str) -> list[str]:
    """The words of a text as they are counted: what stands between blanks of `spaced`."""
    return spaced(text).split()


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of distinct n-grams of words among all (Li et al., 2016, distinct-n).

    Example:
        >>> distinct_n(["a b a b"], 1), distinct_n(["a b a b"], 2)
        (0.5, 0.6666666666666666)
    """
    words = [words_of(text) for text in texts]
    ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against the others, 0 to 100: lower is more diverse.

    Of many texts, a sample is used; of fewer than two, the result is NaN.

    Raises:
        MissingDependencyError: If sacrebleu is not installed.

    Reference:
        Zhu et al., "Texygen", 2018, https://arxiv.org/abs/1802.01886.
    """
    sample = [spaced(text) for text in texts if text.strip()]
    if len(sample) < 2:
        return math.nan
    sample = random.Random(0).sample(sample, min(len(sample), _MAX_SELF_BLEU_TEXTS))
    bleu = _sacrebleu_metrics().BLEU(effective_order=True)
    return statistics.fmean(
        bleu.sentence_score(text, [*sample[:i], *sample[i + 1 :]]).score
        for i, text in enumerate(sample)
    )


def chrf(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF of each text against its reference, 0 to 100 (Popović, 2015).

    Raises:
        MissingDependencyError: If sacrebleu is not installed.
    """
    metric = _sacrebleu_metrics().CHRF()
    pairs = zip(texts, references, strict=True)
    return [metric.sentence_score(text, [reference]).score for text, reference in pairs]


def similarity(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Cosine of the sentence embeddings of each text and its reference.

    Raises:
        MissingDependencyError: If sentence-transformers is not installed.
    """
    left, right = embed([text or " " for text in texts]), embed(references)
    cosines: list[float] = (left * right).sum(dim=1).tolist()
    return cosines


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if all of `y` are equal.

    Raises:
        MissingDependencyError: If scipy is not installed.

    Example:
        >>> round(spearman([1, 2, 3], [10, 20, 90]), 6)
        1.0
    """
    with requires_extra("eval", "a rank correlation"):
        from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if len(set(y)) > 1 else 0.0


def _sacrebleu_metrics() -> Any:
    with requires_extra("eval", "BLEU or chrF"):
        import sacrebleu.metrics

    return sacrebleu.metrics
