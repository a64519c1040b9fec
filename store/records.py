"""What goes into the store and comes out of it, as values; checks of names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from controlprefix.errors import InvalidNameError
from controlprefix.prefixes import KINDS, PrefixKey

if TYPE_CHECKING:  # they import torch
    from controlprefix.prefixes import Prefix, PrefixDecoder, StorageDtype, UserCode

    Value = Prefix | UserCode | PrefixDecoder

_MAX_NAME_CHARACTERS = 255
_MAX_ALIAS_CHARACTERS = 64


class Profile(NamedTuple):
    """The mean embedding of a user's texts, to find similar users.

    Attributes:
        embedder: Name of the embedding model; only profiles of the same one are compared.
        values: The mean embedding.
        num_texts: Number of texts it is the mean of.
    """

    embedder: str
    values: Sequence[float]
    num_texts: int


def parse_payload(key: PrefixKey, data: bytes, name: str) -> "Value":
    """What the bytes of a version hold.

    Args:
        key: The name it belongs to.
        data: Its bytes.
        name: What they are called in errors.

    Raises:
        PrefixFormatError: If they are damaged, or not what the key's kind has.
    """
    from controlprefix.prefixes import Prefix, PrefixDecoder, UserCode
    from controlprefix.prefixes.user_code import is_user_code

    if key.kind == "decoder":
        return PrefixDecoder.from_bytes(data, name=name)
    if key.kind == "user" and is_user_code(data, name):
        return UserCode.from_bytes(data, name=name)
    return Prefix.from_bytes(data, name=name)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version to publish.

    Attributes:
        key: The name to publish it under.
        value: A prefix; for users also a code of a stored decoder; for kind `decoder` a decoder.
        details: Anything JSON can hold.
        replaces: The version that must be current for this one to be published, 0 for none
            yet (compare-and-swap); None publishes over whatever is current.
        dtype: Storage dtype; None keeps the dtype of the value.
        sources: Users whose texts it was trained on; forgetting one marks this version.
        derived_from: Version of the same name that its slots come from, whose sources are added
            to its own. Left out, a version with equal content is taken, if there is one.
        texts: Texts of the user to keep in the store, in the same transaction.
        profile: Profile of the user to keep in the store, in the same transaction.
    """

    key: PrefixKey
    value: "Value"
    details: Mapping[str, Any] = field(default_factory=dict)
    replaces: int | None = None
    dtype: "StorageDtype | None" = None
    sources: Collection[str] = ()
    derived_from: "VersionRef | None" = None
    texts: Sequence[str] = ()
    profile: Profile | None = None


class VersionRef(NamedTuple):
    """A stored version of a name that another one is made from.

    Attributes:
        fingerprint: Fingerprint of its model.
        version: Its number.
    """

    fingerprint: str
    version: int


class StoredVersion(NamedTuple):
    """A version as the store has it.

    Attributes:
        version: Its number.
        content_hash: Hash of its bytes.
        value: None where the caller has that content already.
    """

    version: int
    content_hash: str
    value: "Value | None"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version without its bytes.

    Attributes:
        key: The name it belongs to.
        version: Its number, from 1.
        current: Whether it is the version that requests get.
        content_hash: Hash of its bytes.
        size_bytes: Size of its bytes.
        num_slots: Number of slots.
        dtype: Storage dtype.
        created_at: When it was published, in UTC.
        details: As given when it was published.
        parent_version: The version that was current before it.
        aliases: Its aliases.
        num_forgotten: Users it was trained on who have been forgotten since.
    """

    key: PrefixKey
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

    @property
    def storage_dtype(self) -> "StorageDtype | None":
        """Its dtype for another version made from it; None where that is the value's own."""
        from controlprefix.prefixes.file_format import StorageDtype

        return cast(StorageDtype, self.dtype) if self.dtype in get_args(StorageDtype) else None


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """A stored name, the model it is for, and its current version."""

    key: PrefixKey
    model_name: str
    fingerprint: str
    current: VersionInfo


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How much a tenant has stored: prefixes by kind, versions, and bytes."""

    num_prefixes: Mapping[str, int]
    num_versions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A removal: its number, when, by which action, and how many versions."""

    number: int
    at: datetime
    action: str
    key: PrefixKey
    num_versions: int


def version_id(key: PrefixKey, fingerprint: str, version: int) -> str:
    """One version in words; its encryption is bound to this text as associated data."""
    return f"{key} version {version} for model {fingerprint[:12]!r}"


def check_kind(kind: str) -> None:
    """Check that a kind exists.

    Raises:
        InvalidNameError: If it does not.
    """
    if kind not in KINDS:
        raise InvalidNameError(f"unknown kind {kind!r}; a prefix is for a: {', '.join(KINDS)}")


def check_value_fits(key: PrefixKey, value: "Value") -> None:
    """Check that decoders are stored as decoders, and user codes as users.

    Raises:
        InvalidNameError: If the value cannot be stored under that kind.
    """
    from controlprefix.prefixes import PrefixDecoder, UserCode

    is_decoder = isinstance(value, PrefixDecoder)
    is_misplaced_code = isinstance(value, UserCode) and key.kind != "user"
    if (key.kind == "decoder") != is_decoder or is_misplaced_code:
        raise InvalidNameError(f"a {type(value).__name__} cannot be stored as {key}")


def check_key(key: PrefixKey) -> None:
    """Check that a key can be stored and read back.

    Raises:
        InvalidNameError: If it cannot.
    """
    check_kind(key.kind)
    check_name(key.kind, key.name)
    if key.kind == "attribute" and not (key.attribute and key.label):
        raise InvalidNameError(
            f"attribute name {key.name!r} does not name a label; write it as attribute=label, "
            "such as 'formality=formal'"
        )


def check_alias(alias: str) -> None:
    """Check an alias: printable, at most 64 characters, and not a number.

    Raises:
        InvalidNameError: If it is not such a name.
    """
    check_name("alias", alias)
    if alias.isdecimal() or len(alias) > _MAX_ALIAS_CHARACTERS:
        raise InvalidNameError(f"alias {alias!r} is a number, or longer than 64 characters")


def user_name(name: str) -> str:
    """The name of a user as it is stored, with accents in one form.

    Raises:
        InvalidNameError: If it is not a name that can be stored.
    """
    check_name("user", name)
    return PrefixKey("user", name).name


def check_name(what: str, name: str) -> None:
    """Check that a name can be read back.

    Args:
        what: What the name is for, in the error.
        name: The name.

    Raises:
        InvalidNameError: If it is not 1 to 255 printable characters, or if a proxy may change it
            in a URL.
    """
    if not isinstance(name, str):
        raise InvalidNameError(f"{what} name must be a text, got {type(name).__name__}")
    if not (0 < len(name) <= _MAX_NAME_CHARACTERS) or not name.isprintable():
        raise InvalidNameError(f"{what} name {name[:40]!r} is not 1 to 255 printable characters")
    if name != name.strip() or "\ufffd" in name or {".", "..", ""} & set(name.split("/")):
        raise InvalidNameError(
            f"{what} name {name[:40]!r} cannot stand in a URL: it begins or ends with a blank or a "
            "slash, has an empty or dot segment, or a replacement character"
        )
