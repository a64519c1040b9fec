"""API keys of a tenant. The store has their hashes; the key itself is shown once.

A key says whose it is: `cp.<tenant>.<secret>`, the tenant in base64. So it is looked for among
that tenant's keys alone, and no key can be taken for another tenant's.
"""

import base64
import hashlib
import secrets
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from controlprefix.errors import StoreError, UnknownNameError, known_names
from controlprefix.store.tables import ApiKeyRow

_START = "cp"


class ApiKeyInfo(NamedTuple):
    """A key by its name, and when it was made."""

    name: str
    created_at: datetime


def create(session: Session, tenant_id: int, tenant: str, name: str) -> str:
    """A new key; nobody can tell it afterwards.

    Raises:
        StoreError: If there is one of that name.
    """
    if session.scalar(_named(tenant_id, name)) is not None:
        raise StoreError(f"there is an API key {name!r} already; revoke it first, or name another")
    whose = base64.urlsafe_b64encode(tenant.encode()).decode().rstrip("=")
    key = f"{_START}.{whose}.{secrets.token_urlsafe(32)}"
    session.add(
        ApiKeyRow(tenant_id=tenant_id, name=name, key_hash=_hash(key), created_at=datetime.now(UTC))
    )
    return key


def tenant_of(key: str) -> str | None:
    """Whose a key says it is; None if it is no key."""
    start, _, rest = key.partition(".")
    whose, _, secret = rest.partition(".")
    if start != _START or not secret:
        return None
    try:
        padded = whose + "=" * (-len(whose) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode() or None
    except ValueError:
        return None


def name_of(session: Session, tenant_id: int, key: str) -> str | None:
    """The name of a key, if it is one of the tenant's."""
    query = select(ApiKeyRow.name).where(
        ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_hash == _hash(key)
    )
    return session.scalar(query)


def listed(session: Session, tenant_id: int) -> list[ApiKeyInfo]:
    """All keys, oldest first."""
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id).order_by(ApiKeyRow.id)
    return [ApiKeyInfo(row.name, row.created_at) for row in session.scalars(query)]


def revoke(session: Session, tenant_id: int, name: str) -> None:
    """Remove a key.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if session.scalar(_named(tenant_id, name)) is None:
        known = known_names(name, [one.name for one in listed(session, tenant_id)])
        raise UnknownNameError(f"there is no API key {name!r}; known: {known}")
    session.execute(
        delete(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.name == name)
    )


def _named(tenant_id: int, name: str) -> Select[int]:
    return select(ApiKeyRow.id).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.name == name)


def _hash(key: str) -> str:
    # Of 32 random bytes, so one pass is enough: nobody tries them all.
    return hashlib.sha256(key.encode()).hexdigest()
