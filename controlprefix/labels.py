"""Labels of attributes, as requests name them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from controlprefix.prefixes.key import PrefixKey, composed

Attributes = Mapping[str, str | Mapping[str, float]]

RESERVED_PARTS = ("task", "user")  # names in `strengths` and `schedules` beside attributes


def label_text(value: Any) -> Any:
    """A number or a truth value as the name of a label; anything else as it is.

    Example:
        >>> [label_text(value) for value in (5, 5.0, 0.8, True, "warm")]
        ['5', '5', '0.8', 'true', 'warm']
    """
    value = value.item() if hasattr(value, "item") else value  # numpy
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (int, float)) else value


def check_labels(attributes: Any) -> Any:
    """A request's attributes with the names of labels as texts.

    Raises:
        ValueError: If a label is neither a text nor a finite number.
    """
    if not isinstance(attributes, Mapping):
        return attributes
    result: dict[Any, Any] = {}
    for attribute, labels in attributes.items():
        names = list(labels) if isinstance(labels, Mapping) else [labels]
        for name in names:
            plain = name.item() if hasattr(name, "item") else name
            is_finite = isinstance(plain, int) or (
                isinstance(plain, float) and math.isfinite(plain)
            )
            if not isinstance(plain, str) and not is_finite:
                raise ValueError(
                    f"a label of {attribute!r} must be a text or a number, got "
                    f"{type(name).__name__} {name!r}"
                )
        own_name = composed(attribute) if isinstance(attribute, str) else attribute
        if own_name in result:
            raise ValueError(f"the attribute {own_name!r} is named twice")
        if not isinstance(labels, Mapping):
            result[own_name] = composed(label_text(labels))
            continue
        result[own_name] = {composed(label_text(name)): w for name, w in labels.items()}
        if len(result[own_name]) < len(labels):
            raise ValueError(f"the mixture of {attribute!r} names a label twice")
    return result


def with_composed_names(values: Any) -> Any:
    """A mapping with its names in Unicode's composed form, as keys have them."""
    if not isinstance(values, Mapping):
        return values
    return {composed(k) if isinstance(k, str) else k: value for k, value in values.items()}


class WeightedLabel(NamedTuple):
    """One label that a request names, and its weight in the mixture."""

    attribute: str
    label: str
    weight: float

    @property
    def key(self) -> PrefixKey:
        """The key of the label's prefix."""
        return PrefixKey.for_label(self.attribute, self.label)


def weighted_labels(attributes: Attributes) -> tuple[WeightedLabel, ...]:
    """The labels of a request's `attributes`, each with its weight; a single label has weight 1.

    Example:
        >>> [(w.label, w.weight) for w in weighted_labels({"tone": {"warm": 0.6, "brief": 0.4}})]
        [('warm', 0.6), ('brief', 0.4)]
    """
    return tuple(
        WeightedLabel(attribute, label, weight)
        for attribute, labels in attributes.items()
        for label, weight in ({labels: 1.0} if isinstance(labels, str) else labels).items()
    )


def check_attribute_name(name: str) -> None:
    """Check that an attribute can have this name.

    Raises:
        ValueError: If it is empty, contains `=`, or is `task` or `user`.
    """
    if "=" in name or name in {"", *RESERVED_PARTS}:
        raise ValueError(f"{name!r} cannot be the name of an attribute")
