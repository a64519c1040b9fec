"""The tables: one row a named prefix, one row each of its versions."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    ForeignKey,
    LargeBinary,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 1


class Base(DeclarativeBase):
    """Of all tables."""


class StoreRow(Base):
    """One row: which schema this database has."""

    __tablename__ = "controlprefix_store"

    schema_version: Mapped[int] = mapped_column(primary_key=True)


class PrefixRow(Base):
    """A tenant's name for a prefix of one frozen model, and the version that is current."""

    __tablename__ = "prefixes"
    __table_args__ = (UniqueConstraint("tenant", "kind", "name", "fingerprint"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(255))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String(255))
    current_version: Mapped[int]
    newest_version: Mapped[int]


class VersionRow(Base):
    """One immutable version: a whole safetensors file and what is worth knowing of it."""

    __tablename__ = "prefix_versions"

    prefix_id: Mapped[int] = mapped_column(
        ForeignKey("prefixes.id", ondelete="CASCADE"), primary_key=True
    )
    version: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)
    content_hash: Mapped[str] = mapped_column(String(80))
    size_bytes: Mapped[int]
    num_slots: Mapped[int]
    dtype: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
