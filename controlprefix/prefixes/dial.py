"""Dials: from the position that a person chooses to the strength that has its effect."""

import math
from itertools import pairwise
from typing import Any

from controlprefix.errors import PrefixFormatError, RequestError
from controlprefix.prefixes.schedule import MAX_STRENGTH

Dial = tuple[tuple[float, float], ...]  # (position, strength) points from (0, 0) up


def strength_at(dial: Dial, position: float) -> float:
    """The strength at a position, proportional to it beyond the last point.

    A position below 0 is that negative strength.

    Raises:
        RequestError: If the dial has no points.
    """
    if not dial:
        raise RequestError("the prefix has no dial")
    if position <= 0:
        return position
    for (left, low), (right, high) in pairwise(dial):
        if position <= right:
            return low + (high - low) * (position - left) / (right - left)
    last_position, last_strength = dial[-1]
    return last_strength * position / last_position


def read_dial(points: Any, name: str) -> Dial:
    """The points of a dial in a file.

    Args:
        points: What the file has.
        name: How errors name the prefix.

    Raises:
        PrefixFormatError: If they are no dial.
    """
    try:
        dial = tuple((float(position), float(strength)) for position, strength in points)
    except (TypeError, ValueError, OverflowError) as error:
        raise PrefixFormatError(f"{name} has a dial that cannot be read") from error
    check_dial(dial, name)
    return dial


def check_dial(dial: Dial, name: str) -> None:
    """Check that a dial is empty, or rises from (0, 0) to strengths that requests may have.

    Raises:
        PrefixFormatError: If it does not.
    """
    if not dial:
        return
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(dial))
    position, strength = dial[-1]
    is_finite = math.isfinite(position) and strength <= MAX_STRENGTH * min(1.0, position)
    if len(dial) < 2 or dial[0] != (0.0, 0.0) or not rising or not is_finite:
        raise PrefixFormatError(f"{name} has a dial that does not rise from 0")
