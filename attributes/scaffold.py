"""A new attribute file, for `controlprefix attributes init`."""

import io
from collections.abc import Collection

from ruamel.yaml import YAML

from controlprefix.prefixes import PrefixKey

_EXAMPLE_LABELS = (
    ("formality", "casual"),
    ("formality", "formal"),
    ("tone", "brief"),
    ("tone", "warm"),
)

_HEADER = """\
# The attributes and what their labels mean.
#   description: what a text with this label is like
#   opposite:    another label of the same attribute
#   default:     the label of requests that name none
#   exclusive:   true if a request may name only one label, not a mixture
#   num_slots:   slots of each label's prefix in training
"""


def scaffold(labels: Collection[PrefixKey]) -> str:
    """The text of an attribute file with these labels; without any, with an example."""
    keys = sorted(labels) or [PrefixKey.for_label(*pair) for pair in _EXAMPLE_LABELS]
    attributes: dict[str, dict[str, object]] = {}
    for key in keys:
        attribute = attributes.setdefault(
            key.attribute, {"description": "", "exclusive": False, "labels": {}}
        )
        names = attribute["labels"]
        assert isinstance(names, dict)
        names[key.label] = {"description": ""}
    text = io.StringIO()
    YAML().dump({"attributes": attributes}, text)
    return _HEADER + text.getvalue()
