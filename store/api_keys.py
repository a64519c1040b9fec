"""API keys of a tenant. The store keeps their hashes; a key is shown once, when it is created.

An API key contains its tenant: `cp.<tenant>.<secret>`, the tenant in base64. So lookup is limited
to that tenant's rows, and no key can be taken for another tenant's.
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

_SCHEME = "cp"


class ApiKeyInfo(NamedTuple):
    """The name of an API key, and when it was created."""

    name: str
    created_at: datetime


def create(session: Session, tenant_id: int, tenant: str, name: str) -> str:
    """Create an API key; it cannot be read again later.

    Raises:
        StoreError: If there is one of that name.
    """
    if session.scalar(_named(tenant_id, name)) is not None:
        raise StoreError(f"there is an API key {name!r} already; revoke it first, or name another")
    encoded_tenant = base64.urlsafe_b64encode(tenant.encode()).decode().rstrip("=")
    key = f"{_SCHEME}.{encoded_tenant}.{secrets.token_urlsafe(32)}"
    session.add(
        ApiKeyRow(tenant_id=tenant_id, name=name, key_hash=_hash(key), created_at=datetime.now(UTC))
    )
    return key


def tenant_of(key: str) -> str | None:
    """The tenant that an API key contains; None if it is not an API key."""
    scheme, _, rest = key.partition(".")
    encoded_tenant, _, secret = rest.partition(".")
    if scheme != _SCHEME or not secret:
        return None
    try:
        padded = encoded_tenant + "=" * (-len(encoded_tenant) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode() or None
    except ValueError:
        return None


def name_of(session: Session, tenant_id: int, key: str) -> str | None:
    """The name of an API key, if it is one of the tenant's."""
    query = select(ApiKeyRow.name).where(
        ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.key_hash == _hash(key)
    )
    return session.scalar(query)


def list_all(session: Session, tenant_id: int) -> list[ApiKeyInfo]:
    """All API keys, oldest first."""
    query = select(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id).order_by(ApiKeyRow.id)
    return [ApiKeyInfo(row.name, row.created_at) for row in session.scalars(query)]


def revoke(session: Session, tenant_id: int, name: str) -> None:
    """Remove an API key.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if session.scalar(_named(tenant_id, name)) is None:
        hint = known_names(name, [info.name for info in list_all(session, tenant_id)])
        raise UnknownNameError(f"there is no API key {name!r}; known: {hint}")
    session.execute(
        delete(ApiKeyRow).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.name == name)
    )


def _named(tenant_id: int, name: str) -> Select[int]:
    return select(ApiKeyRow.id).where(ApiKeyRow.tenant_id == tenant_id, ApiKeyRow.name == name)


def _hash(key: str) -> str:
    # One unsalted pass is enough for 32 random bytes: they cannot be guessed.
    return hashlib.sha256(key.encode()).hexdigest()
