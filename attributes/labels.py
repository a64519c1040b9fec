"""From what a person writes about attributes to labels with weights."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from controlprefix.errors import UnknownNameError, known_names


class WeightedLabel(NamedTuple):
    """One label of one attribute, and how much of it."""

    attribute: str
    label: str
    weight: float

    @property
    def name(self) -> str:
        """As the store knows it: `formality=formal`."""
        return attribute_name(self.attribute, self.label)


def attribute_name(attribute: str, label: str) -> str:
    """The name of a label's prefix.

    Example:
        >>> attribute_name("formality", "formal")
        'formality=formal'
    """
    return f"{attribute}={label}"


def weighted_labels(
    attributes: Mapping[str, str | Mapping[str, float]],
) -> tuple[WeightedLabel, ...]:
    """The labels a request names, each with its weight; a lone label has weight 1.

    Example:
        >>> [(w.name, w.weight) for w in weighted_labels({"tone": {"warm": 0.6, "brief": 0.4}})]
        [('tone=warm', 0.6), ('tone=brief', 0.4)]
    """
    return tuple(
        WeightedLabel(attribute, label, weight)
        for attribute, chosen in attributes.items()
        for label, weight in ({chosen: 1.0} if isinstance(chosen, str) else chosen).items()
    )


def require_known(labels: Iterable[WeightedLabel], known: Iterable[str]) -> None:
    """Refuse labels that nobody has trained.

    Args:
        labels: Those a request names.
        known: Names such as `formality=formal`.

    Raises:
        UnknownNameError: Naming what exists and the nearest of it.
    """
    space: dict[str, set[str]] = {}
    for name in known:
        attribute, _, label = name.partition("=")
        space.setdefault(attribute, set()).add(label)
    for wanted in labels:
        if wanted.attribute not in space:
            raise UnknownNameError(
                f"unknown attribute {wanted.attribute!r}; known: "
                f"{known_names(wanted.attribute, space)}"
            )
        if wanted.label not in space[wanted.attribute]:
            raise UnknownNameError(
                f"attribute {wanted.attribute!r} has no label {wanted.label!r}; it has: "
                f"{known_names(wanted.label, space[wanted.attribute])}"
            )
