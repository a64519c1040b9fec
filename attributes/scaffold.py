"""A file of attributes to begin with."""

from collections.abc import Collection

_EXAMPLE = ("formality=casual", "formality=formal", "tone=brief", "tone=warm")

_HEAD = """\
# Which attributes there are, and what their labels mean.
#   description: what a text of that label is like
#   opposite:    another label of the same attribute
#   default:     the label of requests that name none
#   exclusive:   true: a request names one label, not a mixture
#   slots:       of each label's prefix, when it is trained
attributes:
"""


def scaffold(names: Collection[str]) -> str:
    """A file with labels such as `tone=warm`; without any, with an example."""
    space: dict[str, list[str]] = {}
    for name in sorted(names or _EXAMPLE):
        attribute, _, label = name.partition("=")
        space.setdefault(attribute, []).append(label)
    lines = []
    for attribute, labels in space.items():
        lines += [
            f"  {_quoted(attribute)}:",
            '    description: ""',
            "    exclusive: false",
            "    labels:",
            *(f'      {_quoted(label)}: {{description: ""}}' for label in labels),
        ]
    return _HEAD + "\n".join(lines) + "\n"


def _quoted(name: str) -> str:
    """As YAML reads it back: a name may look like a number, or hold a colon."""
    is_word = name.isidentifier() and name.lower() not in {
        "yes", "no", "on", "off", "y", "n", "true", "false", "null",
    }  # fmt: skip
    return name if is_word else "'" + name.replace("'", "''") + "'"
