"""The attribute space: which attributes and labels a request may name, and how they mix."""

from controlprefix.attributes.labels import (
    WeightedLabel,
    attribute_name,
    require_known,
    weighted_labels,
)
from controlprefix.attributes.space import Attribute, AttributeSpace, Label

__all__ = [
    "Attribute",
    "AttributeSpace",
    "Label",
    "WeightedLabel",
    "attribute_name",
    "require_known",
    "weighted_labels",
]
