"""PrefixKey: the name of what a prefix is for; the hash that tells contents apart."""

import hashlib
import unicodedata
from typing import Literal, NamedTuple, Self, get_args

Kind = Literal["task", "attribute", "user", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SEPARATOR = "="


def composed(name: str) -> str:
    """A name with its accents in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


class _Fields(NamedTuple):
    kind: Kind
    name: str


class PrefixKey(_Fields):
    """What a prefix is for: a task, one label of an attribute, or a user.

    Decoders of user codes are stored under keys of kind `decoder`. Names are in Unicode's
    composed form (NFC), so that two ways to type an accent are one user.

    Attributes:
        kind: `task`, `attribute`, `user` or `decoder`.
        name: The name within that kind. The name of a label contains its attribute:
            `tone=warm`.

    Example:
        >>> key = PrefixKey.for_label("tone", "warm")
        >>> key.name, key.attribute, key.label
        ('tone=warm', 'tone', 'warm')
    """

    __slots__ = ()

    def __new__(cls, kind: Kind, name: str) -> Self:
        """Make a key."""
        is_text = isinstance(name, str) and not name.isascii()
        return super().__new__(cls, kind, composed(name) if is_text else name)

    @classmethod
    def for_label(cls, attribute: str, label: str) -> Self:
        """The key of one label of an attribute."""
        return cls("attribute", f"{attribute}{_SEPARATOR}{label}")

    @property
    def attribute(self) -> str:
        """The attribute of a label; empty for other kinds."""
        return self.name.partition(_SEPARATOR)[0] if self.kind == "attribute" else ""

    @property
    def label(self) -> str:
        """The label without its attribute; empty for other kinds."""
        return self.name.partition(_SEPARATOR)[2] if self.kind == "attribute" else ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def content_hash(data: bytes) -> str:
    """SHA-256 of some bytes, as the store and exports write it: `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
