"""Ordinal attributes: labels that are numbers, with mixtures of the two nearest in between."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import quantiles

from controlprefix.errors import RequestError
from controlprefix.labels import Attributes, label_text, weighted_labels
from controlprefix.prefixes.key import PrefixKey

# Not what has a leading zero, which is a code.
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
MAX_DISTINCT = 8  # numbers of an attribute that are learned as labels of their own
_NUM_ANCHORS = 5


def as_number(label: str) -> float | None:
    """The finite number that a label is, if it is one."""
    number = float(label) if _NUMBER.fullmatch(label) else None
    return number if number is not None and math.isfinite(number) else None


def numbers_of(labels: Iterable[str]) -> set[float]:
    """The numbers among labels."""
    return {number for label in labels if (number := as_number(label)) is not None}


def is_ordinal(labels: Iterable[str]) -> bool:
    """Whether labels are those of an ordinal attribute: two numbers at least are among them.

    Labels that are no numbers, such as `n/a`, are then labels of their own.
    """
    return len(numbers_of(labels)) > 1


def is_inside(label: str, labels: Collection[str]) -> bool:
    """Whether a label is a number within the range of an ordinal attribute's labels."""
    number = as_number(label)
    numbers = numbers_of(labels)
    if number is None or len(numbers) < 2:
        return False
    return min(numbers) <= number <= max(numbers)


def by_attribute(keys: Iterable[PrefixKey]) -> dict[str, set[str]]:
    """The labels of each attribute, given the keys of labels."""
    labels: dict[str, set[str]] = {}
    for key in keys:
        labels.setdefault(key.attribute, set()).add(key.label)
    return labels


def between(attribute: str, label: str, labels: Collection[str]) -> dict[str, float]:
    """A number as a mixture of the two labels beside it, with weights that add up to 1.

    Args:
        attribute: Name of the attribute, for errors.
        label: The number.
        labels: The numbers that the attribute has.

    Raises:
        RequestError: If it lies outside of them.

    Example:
        >>> between("length", "0.7", ["0.4", "0.6", "1"])
        {'0.6': 0.75, '1': 0.25}
    """
    number = as_number(label)
    points = sorted((value, name) for name in labels if (value := as_number(name)) is not None)
    assert number is not None
    (lowest, first), (highest, last) = points[0], points[-1]
    if not lowest <= number <= highest:
        raise RequestError(
            f"{attribute}={label} is outside of what the attribute has: {first} to {last}"
        )
    below, lower = max(point for point in points if point[0] <= number)
    above, upper = min(point for point in points if point[0] >= number)
    if below == above:
        return {lower: 1.0}
    share = round((number - below) / (above - below), 6)
    return {lower: round(1.0 - share, 6), upper: share}


def interpolate(
    attributes: Attributes, labels: Mapping[str, Collection[str]]
) -> tuple[dict[str, str | dict[str, float]], dict[str, dict[str, float]]]:
    """Replace numbers that are no labels by mixtures of the labels beside them.

    Args:
        attributes: A request's attributes.
        labels: The labels that each attribute has.

    Returns:
        The request's attributes, and per replaced number, such as `length=0.7`, its mixture.

    Raises:
        RequestError: If a number lies outside of an attribute's labels.
    """
    result: dict[str, str | dict[str, float]] = {}
    replaced: dict[str, dict[str, float]] = {}
    for attribute, value in attributes.items():
        existing = labels.get(attribute, ())
        unknown = [
            label
            for _, label, _ in weighted_labels({attribute: value})
            if label not in existing and as_number(label) is not None
        ]
        if not unknown or not is_ordinal(existing):
            result[attribute] = value if isinstance(value, str) else dict(value)
            continue
        mixture: dict[str, float] = {}
        for _, label, weight in weighted_labels({attribute: value}):
            shares = {label: 1.0}
            if label in unknown:
                shares = replaced[f"{attribute}={label}"] = between(attribute, label, existing)
            for name, share in shares.items():
                mixture[name] = mixture.get(name, 0.0) + weight * share
        result[attribute] = mixture
    return result, replaced


def anchors(numbers: Sequence[float]) -> list[str]:
    """Labels to learn for an attribute with many numbers: its range, evenly filled by rows.

    Numbers between them are learned as mixtures, so that each label has many rows.

    Args:
        numbers: One per row, two different ones among them.
    """
    lowest, highest = min(numbers), max(numbers)
    inner = quantiles(numbers, n=_NUM_ANCHORS - 1, method="inclusive")
    digits = 2 - math.floor(math.log10(highest - lowest))  # a hundredth of the range
    rounded = {round(value, digits) for value in inner}
    points = {value for value in rounded if lowest < value < highest} | {lowest, highest}
    return [label_text(point) for point in sorted(points)]
