"""Users' texts and feedback that the caller chose to keep, encrypted as everything else."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import and_, delete, func, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from controlprefix.store.encryption import TenantCipher
from controlprefix.store.tables import UserTextRow

UserTextKind = Literal["text", "feedback"]
_MAX_FEEDBACK = 1000  # entries per user


def add(
    session: Session,
    tenant: int,
    cipher: TenantCipher,
    user: str,
    texts: Sequence[str],
    kind: UserTextKind = "text",
) -> None:
    """Keep texts of a user; a text that is kept already, such as of an earlier enrolment, once."""
    now = datetime.now(UTC)
    if kind == "text":
        earlier = {decrypt(row, cipher) for row in rows_of(session, tenant, user, kind)}
        texts = [text for text in dict.fromkeys(texts) if text not in earlier]
    for text in texts:
        encrypted, key_id = cipher.encrypt(text.encode(), _identity(user))
        row = UserTextRow(tenant_id=tenant, user_name=user, key_id=key_id, text=encrypted)
        row.created_at, row.kind = now, kind
        session.add(row)


def rows_of(session: Session, tenant: int, user: str, kind: UserTextKind) -> list[UserTextRow]:
    """The rows of a user's texts, oldest first."""
    is_kind = and_(_of_user(tenant, user), UserTextRow.kind == kind)
    return list(session.scalars(select(UserTextRow).where(is_kind).order_by(UserTextRow.id)))


def exists(session: Session, tenant: int, user: str, kind: UserTextKind) -> bool:
    """Whether there is a text of a user."""
    query = select(UserTextRow.id).where(_of_user(tenant, user), UserTextRow.kind == kind)
    return session.scalar(query.limit(1)) is not None


def trim_feedback(session: Session, tenant: int, user: str) -> int:
    """Remove all but a user's newest feedback; returns how many entries are left."""
    is_kind = and_(_of_user(tenant, user), UserTextRow.kind == "feedback")
    newest = select(UserTextRow.id).where(is_kind).order_by(UserTextRow.id.desc())
    oldest = session.scalar(newest.offset(_MAX_FEEDBACK - 1).limit(1))
    if oldest is not None:
        session.execute(delete(UserTextRow).where(is_kind, UserTextRow.id < oldest))
    return session.scalar(select(func.count()).select_from(UserTextRow).where(is_kind)) or 0


def decrypt(row: UserTextRow, cipher: TenantCipher) -> str:
    """The text of a row."""
    return cipher.decrypt(row.text, row.key_id, _identity(row.user_name)).decode()


def users(session: Session, tenant: int, kind: UserTextKind) -> list[str]:
    """The users with kept texts, sorted."""
    is_kind = and_(UserTextRow.tenant_id == tenant, UserTextRow.kind == kind)
    return sorted(session.scalars(select(UserTextRow.user_name).where(is_kind).distinct()))


def forget(session: Session, tenant: int, user: str) -> bool:
    """Remove all texts of a user; returns whether there were any."""
    any_row = session.scalar(select(UserTextRow.id).where(_of_user(tenant, user)).limit(1))
    session.execute(delete(UserTextRow).where(_of_user(tenant, user)))
    return any_row is not None


def rotate(session: Session, tenant: int, cipher: TenantCipher) -> None:
    """Encrypt all texts that are not encrypted with the current key."""
    is_outdated = UserTextRow.key_id.is_distinct_from(cipher.current_key_id)
    query = select(UserTextRow).where(UserTextRow.tenant_id == tenant, is_outdated)
    for row in list(session.scalars(query.with_for_update())):
        plain = decrypt(row, cipher).encode()
        row.text, row.key_id = cipher.encrypt(plain, _identity(row.user_name))


def _of_user(tenant: int, user: str) -> ColumnElement[bool]:
    return and_(UserTextRow.tenant_id == tenant, UserTextRow.user_name == user)


def _identity(user: str) -> str:
    return f"a text of user {user!r}"
