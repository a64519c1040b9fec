"""Intervals in words, for readers who do not read intervals."""

from typing import Protocol

_FEW_ROWS = 50


class Interval(Protocol):
    """A mean and its 95 % confidence interval."""

    @property
    def mean(self) -> float:
        """The mean."""

    @property
    def low(self) -> float:
        """The lower end."""

    @property
    def high(self) -> float:
        """The upper end."""


def few_rows_note(num_rows: int) -> str:
    """A warning if there are too few rows to tell small differences; else empty.

    Example:
        >>> few_rows_note(12)
        '12 rows are too few to tell small differences.'
        >>> few_rows_note(500)
        ''
    """
    if num_rows >= _FEW_ROWS:
        return ""
    rows = "1 row is" if num_rows == 1 else f"{num_rows} rows are"
    return f"{rows} too few to tell small differences."


def comparison_in_words(value: Interval, reference: Interval) -> str:
    """Whether a value is above or below a reference, or too uncertain to tell.

    Example:
        >>> from controlprefix.evaluation.metrics import Estimate
        >>> comparison_in_words(Estimate(0.9, 0.8, 0.95), Estimate(0.5, 0.3, 0.7))
        'more often'
        >>> comparison_in_words(Estimate(0.6, 0.3, 0.8), Estimate(0.5, 0.3, 0.7))
        'cannot tell'
    """
    if value.low > reference.high:
        return "more often"
    return "less often" if value.high < reference.low else "cannot tell"
