"""Users' texts that the caller chose to keep, encrypted as everything else."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import and_, delete, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from controlprefix.store.encryption import TenantCipher
from controlprefix.store.tables import SampleRow


def add(
    session: Session, tenant: int, cipher: TenantCipher, user: str, texts: Sequence[str]
) -> None:
    """Keep texts of a user."""
    now = datetime.now(UTC)
    for text in texts:
        encrypted, key_id = cipher.encrypt(text.encode(), _identity(user))
        row = SampleRow(tenant_id=tenant, user_name=user, key_id=key_id, text=encrypted)
        row.created_at = now
        session.add(row)


def rows_of(session: Session, tenant: int, user: str) -> list[SampleRow]:
    """The rows of a user's texts, oldest first."""
    query = select(SampleRow).where(_of_user(tenant, user)).order_by(SampleRow.id)
    return list(session.scalars(query))


def decrypt(row: SampleRow, cipher: TenantCipher) -> str:
    """The text of a row."""
    return cipher.decrypt(row.text, row.key_id, _identity(row.user_name)).decode()


def users(session: Session, tenant: int) -> list[str]:
    """The users with kept texts, sorted."""
    query = select(SampleRow.user_name).where(SampleRow.tenant_id == tenant).distinct()
    return sorted(session.scalars(query))


def forget(session: Session, tenant: int, user: str) -> bool:
    """Remove all texts of a user; returns whether there were any."""
    any_row = session.scalar(select(SampleRow.id).where(_of_user(tenant, user)).limit(1))
    session.execute(delete(SampleRow).where(_of_user(tenant, user)))
    return any_row is not None


def rotate(session: Session, tenant: int, cipher: TenantCipher) -> None:
    """Encrypt all texts that are not encrypted with the current key."""
    is_outdated = SampleRow.key_id.is_distinct_from(cipher.current_key_id)
    query = select(SampleRow).where(SampleRow.tenant_id == tenant, is_outdated)
    for row in list(session.scalars(query.with_for_update())):
        plain = decrypt(row, cipher).encode()
        row.text, row.key_id = cipher.encrypt(plain, _identity(row.user_name))


def _of_user(tenant: int, user: str) -> ColumnElement[bool]:
    return and_(SampleRow.tenant_id == tenant, SampleRow.user_name == user)


def _identity(user: str) -> str:
    return f"a text of user {user!r}"
