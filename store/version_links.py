"""Links between versions: user codes to their decoder, and versions to the users in them."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from controlprefix.errors import StoreError
from controlprefix.store.tables import AuditRow, CodeRow, PrefixRow, SourceRow, VersionRow

LINK_TABLES = (CodeRow, SourceRow)


class DecoderVersion(NamedTuple):
    """One stored version of a decoder, and the model it is for."""

    prefix_id: int
    version: int
    fingerprint: str
    model_name: str


def find_decoder(session: Session, tenant: int, decoder_hash: str) -> DecoderVersion:
    """The stored decoder with a content hash.

    Raises:
        StoreError: If there is none.
    """
    query = (
        select(VersionRow, PrefixRow)
        .join(PrefixRow, PrefixRow.id == VersionRow.prefix_id)
        .where(
            PrefixRow.tenant_id == tenant,
            PrefixRow.kind == "decoder",
            VersionRow.content_hash == decoder_hash,
        )
    )
    match = session.execute(query.limit(1)).one_or_none()
    if match is None:
        raise StoreError(
            f"the store has no decoder {decoder_hash[:19]}, which a user code belongs to; put the "
            "decoder first"
        )
    version, prefix = match
    return DecoderVersion(prefix.id, version.version, prefix.fingerprint, prefix.model_name)


def link_to_decoder(
    session: Session, tenant: int, decoder: DecoderVersion, prefix_id: int, version: int
) -> None:
    """Record which version of a decoder a code belongs to."""
    session.add(
        CodeRow(
            prefix_id=prefix_id,
            version=version,
            decoder_id=decoder.prefix_id,
            decoder_version=decoder.version,
            tenant_id=tenant,
        )
    )


def add_sources(
    session: Session, tenant: int, prefix_id: int, version: int, users: Iterable[str]
) -> None:
    """Record the users whose texts a version was trained on."""
    session.add_all(
        SourceRow(prefix_id=prefix_id, version=version, tenant_id=tenant, user_name=user)
        for user in sorted(set(users))
    )


def inherit_sources(session: Session, tenant: int, origin: VersionRow, version: VersionRow) -> None:
    """Give a version the sources of another one, and its number of forgotten ones."""
    # Those counted there and here may be the same.
    version.num_forgotten = max(version.num_forgotten, origin.num_forgotten)
    users = set(sources(session, origin.prefix_id, origin.version))
    users -= set(sources(session, version.prefix_id, version.version))
    add_sources(session, tenant, version.prefix_id, version.version, users)


def sources(session: Session, prefix_id: int, version: int) -> list[str]:
    """The users whose texts a version was trained on, without forgotten ones, sorted."""
    query = select(SourceRow.user_name).where(
        SourceRow.prefix_id == prefix_id, SourceRow.version == version
    )
    return sorted(session.scalars(query))


def forgotten_users(session: Session, tenant: int, removal_number: int) -> set[str]:
    """The users who were forgotten after an entry of the audit log."""
    query = select(AuditRow.name).where(
        AuditRow.tenant_id == tenant,
        AuditRow.id > removal_number,
        AuditRow.action == "forget",
        AuditRow.kind == "user",
    )
    return set(session.scalars(query))


def mark_forgotten(session: Session, tenant: int, user: str) -> int:
    """Count a user as forgotten in every version trained on them; returns how many."""
    of_user = and_(SourceRow.tenant_id == tenant, SourceRow.user_name == user)
    query = select(SourceRow.prefix_id, SourceRow.version).where(of_user)
    versions = session.execute(query).all()
    for prefix_id, version in versions:
        session.execute(
            update(VersionRow)
            .where(VersionRow.prefix_id == prefix_id, VersionRow.version == version)
            .values(num_forgotten=VersionRow.num_forgotten + 1)
        )
    session.execute(delete(SourceRow).where(of_user))
    return len(versions)


def versions_in_use(session: Session, decoder_id: int) -> set[int]:
    """The versions of a decoder that stored codes belong to."""
    query = select(CodeRow.decoder_version).where(CodeRow.decoder_id == decoder_id).distinct()
    return set(session.scalars(query))


def require_unused(session: Session, decoder_ids: Collection[int], name: str) -> None:
    """Check that no stored code needs these decoders.

    Raises:
        StoreError: If one does.
    """
    query = select(func.count()).where(CodeRow.decoder_id.in_(list(decoder_ids)))
    num_codes = session.scalar(query) or 0
    if num_codes:
        raise StoreError(
            f"{name} cannot be removed: {num_codes} stored user codes need it; first forget those "
            "users, or train them again and prune"
        )
