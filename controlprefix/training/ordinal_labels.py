"""Labels that are numbers: which of them training rows teach, and rows as mixtures of those."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from controlprefix.attributes import AttributeSpace
from controlprefix.attributes.ordinal import (
    MAX_DISTINCT,
    anchors,
    as_number,
    by_attribute,
    interpolate,
    is_inside,
    is_ordinal,
    numbers_of,
)
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.labels import label_text, weighted_labels
from controlprefix.prefixes import PrefixKey
from controlprefix.request import AnyRequest, Request

_log = logging.getLogger("controlprefix")


def ordinal_labels(
    rows: Sequence[Request],
    space: AttributeSpace | None,
    stored: Callable[[], Iterable[PrefixKey]],
    *,
    may_add: bool,
) -> dict[str, Collection[str]]:
    """Per attribute with numbers as labels, the labels that other numbers are mixtures of.

    They are those of the attribute space, or the stored ones with what lies outside of them, or
    the numbers of the rows, if they are few, or else anchors over their range.

    Args:
        rows: Training rows.
        space: The attribute space, if there is one.
        stored: Gives the labels that have prefixes; called if the rows have numbers.
        may_add: Whether labels other than the stored ones can be learned.
    """
    numbers: dict[str, list[float]] = {}
    names: dict[str, set[str]] = {}
    for row in rows:
        for attribute, label, _ in weighted_labels(row.attributes):
            names.setdefault(attribute, set()).add(label)
            if (number := as_number(label)) is not None:
                numbers.setdefault(attribute, []).append(number)
    earlier_labels = by_attribute(stored()) if numbers else {}
    attributes = space.attributes if space else {}
    result: dict[str, Collection[str]] = {}
    for attribute, values in numbers.items():
        own, earlier = names[attribute], earlier_labels.get(attribute, set())
        if attribute in attributes:
            result[attribute] = attributes[attribute].labels.keys()
        elif is_ordinal(earlier):
            few = len(numbers_of(own | earlier)) <= MAX_DISTINCT
            ends = own if few else {label_text(min(values)), label_text(max(values))}
            outside = {end for end in ends if not is_inside(end, earlier)}
            outside |= {label for label in own if as_number(label) is None}
            result[attribute] = earlier | (outside if may_add else set())
        elif len(numbers_of(own)) > MAX_DISTINCT:
            points = anchors(values)
            _log.warning(
                "%s has %d numbers as labels: learned as %s, and mixtures of them",
                attribute,
                len(numbers_of(own)),
                ", ".join(points),
            )
            result[attribute] = {*points, *(x for x in own if as_number(x) is None)}
        elif is_ordinal(own):
            result[attribute] = own
    return result


def interpolated(
    rows: Sequence[AnyRequest], labels: Mapping[str, Collection[str]], *, source: str = ""
) -> list[AnyRequest]:
    """Rows with the numbers of ordinal attributes as mixtures of labels.

    Args:
        rows: The rows.
        labels: What `ordinal_labels` gives.
        source: What the rows are, for errors, such as `"validation, "`.

    Raises:
        TrainingDataError: If a number lies outside of an attribute's labels.
    """
    if not labels:
        return list(rows)
    result = []
    for number, row in enumerate(rows, 1):
        try:
            attributes, _ = interpolate(row.attributes, labels)
        except RequestError as error:
            raise TrainingDataError(f"{source}{row.place(number)}: {error}") from None
        result.append(row.model_copy(update={"attributes": attributes}))
    return result
