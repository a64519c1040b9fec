"""Courses: strengths that change along a generation, as points joined by straight lines."""

import math
from bisect import bisect_right
from collections.abc import Sequence

_LAST = 1 << 30
MOST = 1e6  # of a strength: beyond, nothing else is attended to anyway

Course = tuple[tuple[int, float], ...]


def at(course: Sequence[tuple[int, float]], token: int) -> float:
    """The multiplier for a new token; before the first point and after the last, as there.

    Args:
        course: `(token, multiplier)`, in order; none at all is 1 everywhere.
        token: Counted from 0, the first new one.

    Example:
        >>> [at(((2, 1.0), (4, 0.0)), token) for token in range(6)]
        [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if not course:
        return 1.0
    after = bisect_right([point[0] for point in course], token)
    if after in (0, len(course)):
        return course[max(0, after - 1)][1]
    (left, low), (right, high) = course[after - 1], course[after]
    return low + (high - low) * (token - left) / (right - left)


def check(course: Sequence[tuple[int, float]]) -> None:
    """Refuse what is no course.

    Raises:
        ValueError: If it has no points, or they are out of order or out of range.
    """
    if not course:
        raise ValueError("has no points; give (token, multiplier) pairs")
    tokens = [token for token, _ in course]
    if tokens != sorted(set(tokens)) or tokens[0] < 0 or tokens[-1] > _LAST:
        raise ValueError(f"has points that do not rise from token 0 or more, up to {_LAST}")
    for _, multiplier in course:
        if not (math.isfinite(multiplier) and 0 <= multiplier <= MOST):
            raise ValueError(
                f"has the multiplier {multiplier}; it must be a finite number >= 0, up to {MOST:g}"
            )
