"""Piecewise-linear strength schedules over generated tokens (the request field `schedules`)."""

import math
from bisect import bisect_right
from collections.abc import Sequence

_MAX_TOKEN = 1 << 30
MAX_STRENGTH = 1e6  # above this, attention on everything else is already zero

Schedule = tuple[tuple[int, float], ...]  # (token, multiplier) points in order


def multiplier_at(schedule: Sequence[tuple[int, float]], token: int) -> float:
    """The strength multiplier at a new token, constant before the first point and after the last.

    Args:
        schedule: `(token, multiplier)` points in order; an empty schedule is 1 everywhere.
        token: Index of the new token, from 0.

    Example:
        >>> [multiplier_at(((2, 1.0), (4, 0.0)), token) for token in range(6)]
        [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if not schedule:
        return 1.0
    after = bisect_right(schedule, token, key=lambda point: point[0])
    if after in (0, len(schedule)):
        return schedule[max(0, after - 1)][1]
    (left, low), (right, high) = schedule[after - 1], schedule[after]
    return low + (high - low) * (token - left) / (right - left)


def check_schedule(schedule: Sequence[tuple[int, float]]) -> None:
    """Check the points of a schedule.

    Raises:
        ValueError: If there are no points, or they are out of order or out of range.
    """
    if not schedule:
        raise ValueError("has no points; give (token, multiplier) pairs")
    tokens = [token for token, _ in schedule]
    if tokens != sorted(set(tokens)) or tokens[0] < 0 or tokens[-1] > _MAX_TOKEN:
        raise ValueError(f"needs tokens in rising order, from 0 up to {_MAX_TOKEN}")
    for _, multiplier in schedule:
        if not (math.isfinite(multiplier) and 0 <= multiplier <= MAX_STRENGTH):
            raise ValueError(
                f"has the multiplier {multiplier}; it must be a finite number >= 0, up to "
                f"{MAX_STRENGTH:g}"
            )
