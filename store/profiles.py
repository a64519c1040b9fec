"""Profiles: what users' texts are like, as numbers, and who writes alike.

With pgvector in a PostgreSQL database it is the database that compares; elsewhere, and
where profiles are encrypted, all are read and compared here, exactly.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import sqlalchemy as sa
import torch
from sqlalchemy import and_, delete, select
from sqlalchemy.orm import Session
from torch import Tensor

from controlprefix.store.encryption import Sealer
from controlprefix.store.tables import ProfileRow

_AT_A_TIME = 4096


class Similar(NamedTuple):
    """A user, and the cosine of the angle between their profile and the one asked about."""

    user: str
    similarity: float


def keep(
    session: Session,
    tenant: int,
    sealer: Sealer,
    user: str,
    embedder: str,
    numbers: Sequence[float],
    num_texts: int,
) -> None:
    """Write a user's profile, in place of an earlier one."""
    session.execute(
        delete(ProfileRow).where(_of(tenant, user), ProfileRow.embedder == embedder),
    )
    row = ProfileRow(tenant_id=tenant, user_name=user, embedder=embedder, num_texts=num_texts)
    if sealer.key_id is None:
        row.numbers = list(numbers)
    else:
        row.sealed, row.key_id = sealer.seal(_bytes(numbers), place_of_profile(user))
    session.add(row)


def nearest(
    session: Session,
    tenant: int,
    sealer: Sealer,
    embedder: str,
    numbers: Sequence[float],
    *,
    most: int,
    without: Collection[str] = (),
) -> list[Similar]:
    """The users whose profiles are most alike, the most alike first."""
    wanted = and_(
        ProfileRow.tenant_id == tenant,
        ProfileRow.embedder == embedder,
        ProfileRow.user_name.not_in(list(without)),
    )
    if _can_compare(session, tenant):
        distance = sa.cast(ProfileRow.numbers, _Vector()).op("<=>")(
            sa.cast(str(list(numbers)), _Vector())
        )
        query = select(ProfileRow.user_name, distance).where(wanted).order_by(distance)
        found = session.execute(query.limit(most))
        return [Similar(user, 1.0 - float(far)) for user, far in found]
    asked = torch.nn.functional.normalize(torch.tensor(list(numbers)), dim=0)
    best: list[Similar] = []
    query_all = select(ProfileRow).where(wanted).execution_options(yield_per=_AT_A_TIME)
    for rows in session.scalars(query_all).partitions(_AT_A_TIME):
        known = torch.stack([_numbers(row, sealer) for row in rows])
        alike = torch.nn.functional.normalize(known, dim=1) @ asked
        found_here = zip((row.user_name for row in rows), alike.tolist(), strict=True)
        best += [Similar(user, cosine) for user, cosine in found_here]
        best = sorted(best, key=lambda one: (-one.similarity, one.user))[:most]
    return best


def forget(session: Session, tenant: int, user: str) -> None:
    """Remove all profiles of a user."""
    session.execute(delete(ProfileRow).where(_of(tenant, user)))


def is_kept(session: Session, tenant: int, user: str) -> bool:
    """Whether there is a profile of a user."""
    query = select(ProfileRow.user_name).where(_of(tenant, user)).limit(1)
    return session.scalar(query) is not None


def seal_again(session: Session, tenant: int, sealer: Sealer) -> int:
    """Write anew all profiles that are not encrypted with the current key."""
    old = ProfileRow.key_id.is_distinct_from(sealer.key_id)
    query = select(ProfileRow).where(ProfileRow.tenant_id == tenant, old).with_for_update()
    rows = list(session.scalars(query))
    for row in rows:
        numbers = _numbers(row, sealer).tolist()
        row.numbers, row.sealed, row.key_id = numbers, None, None
        if sealer.key_id is not None:
            row.numbers = None
            row.sealed, row.key_id = sealer.seal(_bytes(numbers), place_of_profile(row.user_name))
    return len(rows)


def place_of_profile(user: str) -> str:
    """What its encryption is bound to."""
    return f"the profile of user {user!r}"


class _Vector(sa.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "vector"


def _can_compare(session: Session, tenant: int) -> bool:
    """Whether the database has pgvector, and can read all profiles."""
    if session.get_bind().dialect.name != "postgresql":
        return False
    installed = session.scalar(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'vector'"))
    sealed = and_(ProfileRow.tenant_id == tenant, ProfileRow.numbers.is_(None))
    return installed is not None and (
        session.scalar(select(ProfileRow.user_name).where(sealed).limit(1)) is None
    )


def _of(tenant: int, user: str) -> sa.ColumnElement[bool]:
    return and_(ProfileRow.tenant_id == tenant, ProfileRow.user_name == user)


def _numbers(row: ProfileRow, sealer: Sealer) -> Tensor:
    if row.numbers is not None:
        return torch.tensor(list(row.numbers), dtype=torch.float32)
    plain = sealer.unseal(row.sealed or b"", row.key_id, place_of_profile(row.user_name))
    return torch.frombuffer(bytearray(plain), dtype=torch.float32)


def _bytes(numbers: Sequence[float]) -> bytes:
    return torch.tensor(list(numbers), dtype=torch.float32).numpy().tobytes()
