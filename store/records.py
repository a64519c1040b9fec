"""What goes into the store and comes out of it, as values."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, get_args

from controlprefix.errors import UnknownNameError
from controlprefix.prefixes.container import PayloadDtype
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.user_code import PrefixDecoder

Kind = Literal["task", "attribute", "user", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class PrefixKey(NamedTuple):
    """What a prefix is for: `("user", "ana")`, `("attribute", "tone=warm")`.

    A decoder of user codes is kept in the same way: `("decoder", "users")`.
    """

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A prefix to publish.

    Attributes:
        key, prefix: What, and for what: of kind `decoder`, a decoder.
        details: Anything JSON can hold.
        replaces: The version that must be current for this to be published, 0 for none
            yet (compare and swap); left out, it follows whatever is there.
        dtype: Of the numbers in the store, `"int8"` among them; left out, as they are.
        sources: Users whose texts it was learned from; forgetting one marks it.
    """

    key: PrefixKey
    prefix: Prefix | PrefixDecoder
    details: Mapping[str, Any] = field(default_factory=dict)
    replaces: int | None = None
    dtype: PayloadDtype | None = None
    sources: Collection[str] = ()


class VersionRef(NamedTuple):
    """A version by its number, and by its content, which no other content shares."""

    version: int
    content_hash: str


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """A prefix as the store has it."""

    prefix: Prefix
    ref: VersionRef


class Fetched(NamedTuple):
    """What is current for a key; the prefix is left out where the caller has that content."""

    ref: VersionRef
    prefix: Prefix | None


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """A name that has a prefix, the model it is for, and the version that is current."""

    key: PrefixKey
    model_name: str
    fingerprint: str
    current: "VersionInfo"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What is known of one version without reading its numbers.

    `num_forgotten` counts those users it was learned from who were forgotten since.
    """

    kind: Kind
    name: str
    version: int
    current: bool
    content_hash: str
    size_bytes: int
    num_slots: int
    dtype: str
    created_at: datetime
    details: Mapping[str, Any]
    parent_version: int | None
    aliases: tuple[str, ...]
    num_forgotten: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How much a tenant has stored."""

    num_prefixes: Mapping[str, int]
    num_versions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """That something was removed on request."""

    at: datetime
    action: str
    key: PrefixKey
    num_versions: int


def place_of(key: PrefixKey, fingerprint: str, version: int) -> str:
    """One version of a key for one model, in words; what its encryption is bound to."""
    return f"{key} version {version} for model {fingerprint[:12]!r}"


def check_kind(kind: str) -> None:
    """Refuse a kind that there is none of."""
    if kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}; a prefix is for a: {', '.join(KINDS)}")


def check_is_for(key: PrefixKey, prefix: Prefix | PrefixDecoder) -> None:
    """Refuse a decoder under another kind, and anything else under that one."""
    if (key.kind == "decoder") != isinstance(prefix, PrefixDecoder):
        raise UnknownNameError(f"a {type(prefix).__name__} cannot be stored as {key}")


def check_key(key: PrefixKey) -> None:
    """Refuse a key that names nothing."""
    check_kind(key.kind)
    check_name(key.kind, key.name)
    if key.kind == "attribute" and not all(key.name.partition("=")):
        raise UnknownNameError(
            f"attribute name {key.name!r} does not name a label; write it as attribute=label, "
            "such as 'formality=formal'"
        )


def check_alias(alias: str) -> None:
    """Refuse an alias that could be taken for a number, or not be read back."""
    check_name("alias", alias)
    if alias.isdecimal() or len(alias) > 64:
        raise UnknownNameError(f"alias {alias!r} is a number, or longer than 64 characters")


def check_name(what: str, name: str) -> None:
    """Refuse a name that could not be read back."""
    if not isinstance(name, str):
        raise UnknownNameError(f"{what} name is a {type(name).__name__}; give a text")
    if not (0 < len(name) <= 255) or not name.isprintable():
        raise UnknownNameError(f"{what} name {name[:40]!r} is not 1 to 255 printable characters")
