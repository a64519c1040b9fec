"""Checks of the labels that a request names."""

from collections.abc import Iterable

from controlprefix.attributes.ordinal import as_number, between, by_attribute, is_ordinal
from controlprefix.errors import UnknownNameError, known_names
from controlprefix.labels import WeightedLabel
from controlprefix.prefixes import PrefixKey


def require_known(labels: Iterable[WeightedLabel], known: Iterable[PrefixKey]) -> None:
    """Check that labels exist, or are numbers between the labels of an ordinal attribute.

    Args:
        labels: The labels that a request names.
        known: Keys of the labels that exist.

    Raises:
        UnknownNameError: With what exists and the nearest match.
        RequestError: If a number is outside of an ordinal attribute's labels.
    """
    known_labels = by_attribute(known)
    for attribute, label, _ in labels:
        if attribute not in known_labels:
            raise UnknownNameError(
                f"unknown attribute {attribute!r}; known: {known_names(attribute, known_labels)}"
            )
        if label not in known_labels[attribute]:
            if as_number(label) is not None and is_ordinal(known_labels[attribute]):
                between(attribute, label, known_labels[attribute])  # or it is out of range
                continue
            raise UnknownNameError(
                f"attribute {attribute!r} has no label {label!r}; it has: "
                f"{known_names(label, known_labels[attribute])}"
            )
