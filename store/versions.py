"""Publishing and finding versions inside a transaction.

Every statement selects rows through `select_prefixes`, or by the id of a row found there, so
no statement can reach another tenant's rows.
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, and_, or_, select
from sqlalchemy.orm import Session

from controlprefix.errors import (
    ForgottenError,
    StoreError,
    UnknownNameError,
    VersionConflictError,
    known_names,
)
from controlprefix.prefixes import Kind, PrefixKey, content_hash
from controlprefix.store import profiles, user_texts, version_links
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import NewVersion, VersionInfo, check_key, version_id
from controlprefix.store.tables import AliasRow, AuditRow, PayloadRow, PrefixRow, VersionRow

if TYPE_CHECKING:
    from controlprefix.store.records import Value

MAX_VERSION = 1 << 30
_MAX_MODEL_NAME = 255
_MAX_ATTEMPTS = 20
_MAX_NAMES_SEARCHED = 1000  # for the message of an unknown name: a store may have millions

is_current = and_(
    VersionRow.prefix_id == PrefixRow.id, VersionRow.version == PrefixRow.current_version
)


def select_prefixes(
    tenant: int, fingerprint: str | None, keys: Sequence[PrefixKey] = ()
) -> Select[PrefixRow]:
    """Select a tenant's prefix rows, of one model or all, of some keys or all."""
    query = select(PrefixRow).where(PrefixRow.tenant_id == tenant)
    if fingerprint is not None:
        query = query.where(PrefixRow.fingerprint == fingerprint)
    if keys:
        names: dict[Kind, list[str]] = {}
        for key in keys:
            names.setdefault(key.kind, []).append(key.name)
        query = query.where(
            or_(
                *(
                    and_(PrefixRow.kind == kind, PrefixRow.name.in_(of_kind))
                    for kind, of_kind in names.items()
                )
            )
        )
    return query


def key_of(row: PrefixRow | AuditRow) -> PrefixKey:
    """The key that a row belongs to."""
    kind: Any = row.kind
    return PrefixKey(kind, row.name)


def publish(
    session: Session,
    tenant: int,
    database: Database,
    cipher: TenantCipher,
    new: NewVersion,
    payload: bytes,
    forgotten: Collection[str] = (),
) -> int:
    """Add a version and make it current; returns its number.

    Args:
        session, tenant, database, cipher: The transaction, and what it needs.
        new: The version.
        payload: Its bytes.
        forgotten: Users who were forgotten since their texts were read.

    Raises:
        VersionConflictError: If the version to be replaced is no longer current.
        ForgottenError: If its user was forgotten meanwhile.
        StoreError: If it is a code and its decoder is not stored.
    """
    from controlprefix.prefixes import UserCode

    decoder: version_links.DecoderVersion | None = None
    if isinstance(new.value, UserCode):
        decoder = version_links.find_decoder(session, tenant, new.value.decoder_hash)
        fingerprint, model_name = decoder.fingerprint, decoder.model_name
    else:
        geometry = new.value.geometry
        fingerprint, model_name = geometry.fingerprint, geometry.model_name
    insertion = database.insert_if_absent(
        PrefixRow,
        tenant_id=tenant,
        kind=new.key.kind,
        name=new.key.name,
        fingerprint=fingerprint,
        model_name=model_name[:_MAX_MODEL_NAME],
        current_version=0,
        newest_version=0,
    )
    # The lock makes the next writer of this name wait for the end of this transaction.
    query = select_prefixes(tenant, fingerprint, [new.key]).with_for_update()
    row = None
    for _ in range(_MAX_ATTEMPTS):  # another transaction may remove it in between
        session.execute(insertion)
        if (row := session.scalars(query).one_or_none()) is not None:
            break
    if row is None:
        raise StoreError(f"{new.key} is removed again and again; nothing was stored")
    if new.key.kind == "user" and new.key.name in forgotten:
        raise ForgottenError(new.key.name)
    if new.replaces not in (None, row.current_version):
        raise VersionConflictError(
            f"{new.key}: replaces is {new.replaces}, but version {row.current_version} is current, "
            "since another was published first; read it and publish again"
        )
    sources = {PrefixKey("user", user).name for user in new.sources}
    remaining = sources.difference(forgotten)
    parent = row.current_version or None
    row.newest_version += 1
    row.current_version = row.newest_version
    ids = {"prefix_id": row.id, "version": row.newest_version, "tenant_id": tenant}
    version = VersionRow(
        **ids,
        parent_version=parent,
        content_hash=content_hash(payload),
        size_bytes=len(payload),
        num_slots=new.value.num_slots,
        dtype=new.dtype or _storage_dtype(new.value),
        created_at=datetime.now(UTC),
        details=dict(new.details),
        num_forgotten=len(sources) - len(remaining),
    )
    origin = _origin(session, tenant, new, row, version.content_hash)
    session.add(version)
    session.flush()  # rows below refer to it
    if decoder is not None:
        version_links.link_to_decoder(session, tenant, decoder, row.id, row.newest_version)
    version_links.add_sources(session, tenant, row.id, row.newest_version, remaining)
    if origin is not None:
        session.flush()
        version_links.inherit_sources(session, tenant, origin, version)
    identity = version_id(new.key, fingerprint, row.newest_version)
    stored, key_id = cipher.encrypt(payload, identity)
    session.add(PayloadRow(**ids, payload=stored, key_id=key_id))
    if new.texts:
        user_texts.add(session, tenant, cipher, new.key.name, new.texts)
    if new.profile is not None:
        profiles.replace(session, tenant, cipher, new.key.name, new.profile)
    return row.newest_version


def _origin(
    session: Session, tenant: int, new: NewVersion, row: PrefixRow, hash_of_content: str
) -> VersionRow | None:
    """The stored version that a new one is made from, if it is still there."""
    query = select(VersionRow)
    if new.derived_from is None:
        query = query.where(
            VersionRow.prefix_id == row.id, VersionRow.content_hash == hash_of_content
        )
    else:
        fingerprint, version = new.derived_from
        prefix = session.scalars(select_prefixes(tenant, fingerprint, [new.key])).one_or_none()
        if prefix is None:
            return None
        query = query.where(VersionRow.prefix_id == prefix.id, VersionRow.version == version)
    return session.scalars(query.order_by(VersionRow.version.desc()).limit(1)).first()


def find_prefix(
    session: Session, tenant: int, key: PrefixKey, fingerprint: str, *, lock: bool = False
) -> PrefixRow:
    """The row of a key for a model.

    Raises:
        UnknownNameError: If there is none.
    """
    check_key(key)
    query = select_prefixes(tenant, fingerprint, [key])
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise unknown_name(session, tenant, key, fingerprint)
    return row


def find_version(session: Session, row: PrefixRow, version: int | str | None) -> int:
    """The number of a version given by number or alias; None is the current one.

    Raises:
        UnknownNameError: If there is no such version.
    """
    if version is None:
        return row.current_version
    if isinstance(version, str):
        alias = session.get(AliasRow, (row.id, version))
        if alias is not None:
            return alias.version
    elif 0 < version <= MAX_VERSION and session.get(VersionRow, (row.id, version)) is not None:
        return version
    raise unknown_version(session, row, version)


def version_numbers(session: Session, row: PrefixRow) -> list[int]:
    """The numbers of all versions of a name, in order."""
    query = select(VersionRow.version).where(VersionRow.prefix_id == row.id)
    return sorted(session.scalars(query))


def version_info(row: PrefixRow, version: VersionRow, aliases: Collection[str]) -> VersionInfo:
    """A version without its bytes."""
    return VersionInfo(
        key=key_of(row),
        version=version.version,
        current=version.version == row.current_version,
        content_hash=version.content_hash,
        size_bytes=version.size_bytes,
        num_slots=version.num_slots,
        dtype=version.dtype,
        created_at=version.created_at,
        details=version.details,
        parent_version=version.parent_version,
        aliases=tuple(sorted(aliases)),
        num_forgotten=version.num_forgotten,
    )


def unknown_name(
    session: Session, tenant: int, key: PrefixKey, fingerprint: str | None
) -> UnknownNameError:
    """Make the error for a key that is not stored; it lists what exists, and for which models."""
    of_kind = select_prefixes(tenant, None).where(PrefixRow.kind == key.kind)
    same_name = of_kind.where(PrefixRow.name == key.name).order_by(PrefixRow.model_name)
    other_models = session.scalars(same_name.with_only_columns(PrefixRow.model_name)).all()
    if other_models:
        return UnknownNameError(
            f"{key} has no prefix for this model, only for other weights "
            f"({', '.join(other_models)}); train it on this model, or load that one"
        )
    if key.kind == "user":  # whose names are nobody else's business
        error = UnknownNameError(
            f"no {key} in the store; enroll or train the user, or check the store and the tenant"
        )
        error.add_note(f"the store is {session.info['display_name']}")
        return error
    if fingerprint is not None:
        of_kind = of_kind.where(PrefixRow.fingerprint == fingerprint)
    query = of_kind.with_only_columns(PrefixRow.name).limit(_MAX_NAMES_SEARCHED)
    names = set(session.scalars(query))
    advice = "" if names else "; train or enroll one, or check the store and the tenant"
    hint = known_names(key.name, names, truncated=len(names) == _MAX_NAMES_SEARCHED)
    error = UnknownNameError(f"no {key.kind} {key.name!r} in the store; known: {hint}{advice}")
    # A note, since a server must not tell its clients.
    error.add_note(f"the store is {session.info['display_name']}")
    return error


def unknown_version(session: Session, row: PrefixRow, version: int | str) -> UnknownNameError:
    """Make the error for an unknown version; it lists the existing ones."""
    aliases = select(AliasRow.alias).where(AliasRow.prefix_id == row.id)
    numbers = [str(number) for number in version_numbers(session, row)]
    listed = ", ".join([*numbers, *sorted(session.scalars(aliases))])
    return UnknownNameError(f"{key_of(row)} has no version {version}; it has: {listed}")


def _storage_dtype(value: "Value") -> str:
    """The dtype that `to_bytes` writes by default."""
    from controlprefix.prefixes import UserCode

    return "int8" if isinstance(value, UserCode) else str(value.dtype).removeprefix("torch.")
