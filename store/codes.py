"""What ties versions to each other: codes to their decoder, a decoder to its users."""

from collections.abc import Collection, Iterable

from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from controlprefix.errors import StoreError
from controlprefix.store.tables import CodeRow, PrefixRow, SourceRow, VersionRow

TIES = (CodeRow, SourceRow)


def tie_to_decoder(
    session: Session, tenant: int, fingerprint: str, decoder: str, prefix_id: int, version: int
) -> None:
    """Note which version of which decoder a code belongs to.

    Raises:
        StoreError: If there is none with that content.
    """
    query = (
        select(VersionRow)
        .join(PrefixRow, PrefixRow.id == VersionRow.prefix_id)
        .where(
            PrefixRow.tenant_id == tenant,
            PrefixRow.fingerprint == fingerprint,
            PrefixRow.kind == "decoder",
            VersionRow.content_hash == decoder,
        )
    )
    found = session.scalars(query.limit(1)).one_or_none()
    if found is None:
        raise StoreError(
            f"the store has no decoder {decoder[:19]}, which a user code belongs to; put the "
            "decoder first"
        )
    session.add(
        CodeRow(
            prefix_id=prefix_id,
            version=version,
            decoder_id=found.prefix_id,
            decoder_version=found.version,
            tenant_id=tenant,
        )
    )


def note_sources(
    session: Session, tenant: int, prefix_id: int, version: int, users: Iterable[str]
) -> None:
    """Note whose texts a version was learned from."""
    session.add_all(
        SourceRow(prefix_id=prefix_id, version=version, tenant_id=tenant, user_name=user)
        for user in sorted(set(users))
    )


def sources(session: Session, prefix_id: int, version: int) -> list[str]:
    """Whose texts a version was learned from: those who are not forgotten, sorted."""
    query = select(SourceRow.user_name).where(
        SourceRow.prefix_id == prefix_id, SourceRow.version == version
    )
    return sorted(session.scalars(query))


def mark_forgotten(session: Session, tenant: int, user: str) -> int:
    """Count a user among the forgotten of every version learned from them; gives how many."""
    own = and_(SourceRow.tenant_id == tenant, SourceRow.user_name == user)
    touched = session.execute(select(SourceRow.prefix_id, SourceRow.version).where(own)).all()
    for prefix_id, version in touched:
        session.execute(
            update(VersionRow)
            .where(VersionRow.prefix_id == prefix_id, VersionRow.version == version)
            .values(num_forgotten=VersionRow.num_forgotten + 1)
        )
    session.execute(delete(SourceRow).where(own))
    return len(touched)


def in_use(session: Session, decoder_id: int) -> set[int]:
    """The versions of a decoder that codes belong to."""
    query = select(CodeRow.decoder_version).where(CodeRow.decoder_id == decoder_id).distinct()
    return set(session.scalars(query))


def require_unused(session: Session, decoder_ids: Collection[int], what: str) -> None:
    """Refuse to lose a decoder that codes need.

    Raises:
        StoreError: If there are such codes.
    """
    query = select(func.count()).where(CodeRow.decoder_id.in_(list(decoder_ids)))
    codes = session.scalar(query) or 0
    if codes:
        raise StoreError(
            f"{what} cannot be removed: {codes} stored user codes need it; forget those users, or "
            "train them anew and prune, first"
        )
