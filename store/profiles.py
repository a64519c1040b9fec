"""Profiles: the mean embeddings of users' texts, and the nearest users.

With pgvector in a PostgreSQL database, the database compares them; elsewhere, and where
profiles are encrypted, all are read and compared here, exactly.
"""

from array import array
from collections.abc import Collection, Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import and_, delete, select
from sqlalchemy.orm import Session

from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import Profile
from controlprefix.store.tables import ProfileRow

_ROWS_PER_PARTITION = 4096


class SimilarUser(NamedTuple):
    """A user, and the cosine similarity of their profile."""

    user: str
    similarity: float


def replace(
    session: Session, tenant: int, cipher: TenantCipher, user: str, profile: Profile
) -> None:
    """Store a user's profile in place of an earlier one of the same embedder."""
    is_same = and_(_of_user(tenant, user), ProfileRow.embedder == profile.embedder)
    session.execute(delete(ProfileRow).where(is_same))
    row = ProfileRow(
        tenant_id=tenant,
        user_name=user,
        embedder=profile.embedder,
        num_texts=profile.num_texts,
    )
    _write_values(row, cipher, profile.values)
    session.add(row)


def nearest(
    session: Session,
    tenant: int,
    cipher: TenantCipher,
    embedder: str,
    values: Sequence[float],
    *,
    limit: int,
    exclude: Collection[str] = (),
) -> list[SimilarUser]:
    """The users with the most similar profiles, the most similar first.

    Profiles of another size are of an earlier model under the embedder's name, and left out.
    """
    candidates = and_(
        ProfileRow.tenant_id == tenant,
        ProfileRow.embedder == embedder,
        ProfileRow.user_name.not_in(list(exclude)),
    )
    if _database_can_compare(session, tenant):
        distance = sa.cast(ProfileRow.numbers, _Vector()).op("<=>")(
            sa.cast(str(list(values)), _Vector())
        )
        has_size = sa.func.cardinality(ProfileRow.numbers) == len(values)
        query = select(ProfileRow.user_name, distance).where(candidates, has_size)
        matches = session.execute(query.order_by(distance).limit(limit))
        return [
            SimilarUser(user, 1.0 - float(cosine_distance)) for user, cosine_distance in matches
        ]
    import torch

    target = torch.nn.functional.normalize(torch.tensor(list(values)), dim=0)
    best: list[SimilarUser] = []
    query_all = select(ProfileRow).where(candidates)
    query_all = query_all.execution_options(yield_per=_ROWS_PER_PARTITION)
    for rows in session.scalars(query_all).partitions(_ROWS_PER_PARTITION):
        profiles = [(row.user_name, list(_read_values(row, cipher))) for row in rows]
        comparable = {name: own for name, own in profiles if len(own) == len(target)}
        if not comparable:
            continue
        stacked = torch.nn.functional.normalize(torch.tensor(list(comparable.values())), dim=1)
        pairs = zip(comparable, (stacked @ target).tolist(), strict=True)
        best += [SimilarUser(*pair) for pair in pairs]
        best = sorted(best, key=lambda match: (-match.similarity, match.user))[:limit]
    return best


def forget(session: Session, tenant: int, user: str) -> bool:
    """Remove all profiles of a user; returns whether there were any."""
    any_row = session.scalar(select(ProfileRow.user_name).where(_of_user(tenant, user)).limit(1))
    session.execute(delete(ProfileRow).where(_of_user(tenant, user)))
    return any_row is not None


def rotate(session: Session, tenant: int, cipher: TenantCipher) -> None:
    """Encrypt all profiles that are not encrypted with the current key."""
    is_outdated = ProfileRow.key_id.is_distinct_from(cipher.current_key_id)
    query = select(ProfileRow).where(ProfileRow.tenant_id == tenant, is_outdated)
    for row in list(session.scalars(query.with_for_update())):
        _write_values(row, cipher, _read_values(row, cipher))


class _Vector(sa.types.UserDefinedType[str]):
    """pgvector's column type."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "vector"


def _database_can_compare(session: Session, tenant: int) -> bool:
    """Whether the database has pgvector, and no profile of the tenant is encrypted."""
    if session.get_bind().dialect.name != "postgresql":
        return False
    has_pgvector = session.scalar(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'vector'"))
    is_encrypted = and_(ProfileRow.tenant_id == tenant, ProfileRow.numbers.is_(None))
    any_encrypted = session.scalar(select(ProfileRow.user_name).where(is_encrypted).limit(1))
    return has_pgvector is not None and any_encrypted is None


def _of_user(tenant: int, user: str) -> sa.ColumnElement[bool]:
    return and_(ProfileRow.tenant_id == tenant, ProfileRow.user_name == user)


def _write_values(row: ProfileRow, cipher: TenantCipher, values: Sequence[float]) -> None:
    row.numbers, row.sealed, row.key_id = list(values), None, None
    if cipher.current_key_id is not None:
        plain = array("f", values).tobytes()
        row.numbers = None
        row.sealed, row.key_id = cipher.encrypt(plain, _identity(row.user_name))


def _read_values(row: ProfileRow, cipher: TenantCipher) -> Sequence[float]:
    if row.numbers is not None:
        return list(row.numbers)
    plain = cipher.decrypt(row.sealed or b"", row.key_id, _identity(row.user_name))
    return array("f", plain)


def _identity(user: str) -> str:
    return f"the profile of user {user!r}"
