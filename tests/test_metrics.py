"""Figures of texts, and their intervals."""

import math
import random

import pytest

from controlprefix.evaluation.metrics import (
    bootstrap_mean,
    distinct_n,
    self_bleu,
    spearman,
    wilson_proportion,
)


def test_figures_of_texts() -> None:
    assert distinct_n(["a b c", "a b d"], 2) == 0.75
    assert distinct_n([""], 1) == 0.0
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(100)
    assert self_bleu(["one two three four", "five six seven eight"]) < 5
    assert self_bleu(["水上餐厅提供中国菜"] * 2) == pytest.approx(100)
    assert distinct_n(["中国菜中国"], 1) == 0.6
    assert spearman([0, 1, 2, 3], [1, 1, 2, 2]) == pytest.approx(0.894, abs=1e-3)
    result = bootstrap_mean([0.0, 1.0] * 50)
    assert result.mean == 0.5
    assert 0.38 < result.low < 0.45
    assert 0.55 < result.high < 0.62
    twice = bootstrap_mean([0.0, 1.0] * 50, [i % 10 for i in range(100)])  # each prompt ten times
    assert (twice.mean, twice.low < 0.3, twice.high > 0.7) == (0.5, True, True)
    assert wilson_proportion([True] * 5) == pytest.approx((1.0, 0.566, 1.0), abs=1e-3)
    assert wilson_proportion([True, False] * 5, list("ab") * 5) == wilson_proportion([True, False])
    assert math.isnan(self_bleu(["one text", " "]))


def test_few_values_have_wide_intervals() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    alone = bootstrap_mean([0.3])
    assert (alone.mean, alone.low, alone.high) == (0.3, -math.inf, math.inf)
    assert alone.text() == "0.30 (too few for an interval)"
    assert bootstrap_mean([0.3, 0.7], ["same", "same"]).high == math.inf
    values = [0.1, 0.5, 0.2, 0.9]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval()
    assert bootstrap_mean(values)[1:] == pytest.approx(tuple(expected), abs=1e-3)
    twice = bootstrap_mean(
        [*values, *values], [*range(4), *range(4)]
    )  # each value as a group of two
    assert twice == pytest.approx(bootstrap_mean(values))
    draw = random.Random(0)
    for count in (2, 5, 9):
        hits = sum(
            estimate.low <= 0 <= estimate.high
            for estimate in (
                bootstrap_mean([draw.gauss(0, 1) for _ in range(count)]) for _ in range(400)
            )
        )
        assert 0.91 < hits / 400 < 0.99, count
