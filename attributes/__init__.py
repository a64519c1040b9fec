"""The attribute space: which attributes and labels exist, what they mean, how they mix."""

from controlprefix.attributes.labels import require_known
from controlprefix.attributes.space import Attribute, AttributeSpace, Label

__all__ = ["Attribute", "AttributeSpace", "Label", "require_known"]
