"""The attribute space: which attributes and labels a request may name, and how they mix."""

from controlprefix.attributes.labels import (
    WeightedLabel,
    attribute_name,
    require_known,
    weighted_labels,
)

__all__ = ["WeightedLabel", "attribute_name", "require_known", "weighted_labels"]
