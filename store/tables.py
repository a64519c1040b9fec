"""The tables. Every row says whose it is, and in PostgreSQL the database itself holds it to that.

A version's bytes stand in a table of their own, so that asking which version is current
never reads past them.
"""

from array import array
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    event,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

# SQLite counts up by itself only where the type is INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


class Numbers(TypeDecorator[Sequence[float]]):
    """float32 numbers: an array on PostgreSQL, where pgvector can compare them; else bytes."""

    impl = LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.ARRAY(postgresql.REAL()))
        return dialect.type_descriptor(LargeBinary())

    def process_bind_param(self, value: Sequence[float] | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return array("f", value).tobytes()

    def process_result_value(self, value: Any, dialect: Dialect) -> Sequence[float] | None:
        if value is None or dialect.name == "postgresql":
            return value
        return array("f", value)


class Base(DeclarativeBase):
    """Of all tables."""


class TenantRow(Base):
    """Someone whose prefixes nobody else can name, see or count."""

    __tablename__ = "controlprefix_tenants"

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)


class PrefixRow(Base):
    """A tenant's name for a prefix of one frozen model, and the version that is current."""

    __tablename__ = "controlprefix_prefixes"
    __table_args__ = (UniqueConstraint("tenant_id", "fingerprint", "kind", "name"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String(255))
    current_version: Mapped[int]
    newest_version: Mapped[int]


class VersionRow(Base):
    """What is worth knowing of one immutable version."""

    __tablename__ = "controlprefix_versions"

    prefix_id: Mapped[int] = mapped_column(
        ForeignKey(PrefixRow.id, ondelete="CASCADE"), primary_key=True
    )
    version: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    parent_version: Mapped[int | None]
    content_hash: Mapped[str] = mapped_column(String(80))
    size_bytes: Mapped[int]
    num_slots: Mapped[int]
    dtype: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    # Of those it was learned from (`SourceRow`), how many were forgotten since.
    num_forgotten: Mapped[int] = mapped_column(default=0, server_default="0")


_OF_A_VERSION = (
    ["prefix_id", "version"],
    ["controlprefix_versions.prefix_id", "controlprefix_versions.version"],
)


class PayloadRow(Base):
    """The bytes of one version: a whole safetensors file, encrypted where a key is named."""

    __tablename__ = "controlprefix_payloads"
    __table_args__ = (ForeignKeyConstraint(*_OF_A_VERSION, ondelete="CASCADE"),)

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    key_id: Mapped[str | None] = mapped_column(String(255))
    payload: Mapped[bytes] = mapped_column(LargeBinary)


class CodeRow(Base):
    """That a version is a code, which means nothing without that version of a decoder."""

    __tablename__ = "controlprefix_codes"
    __table_args__ = (
        ForeignKeyConstraint(*_OF_A_VERSION, ondelete="CASCADE"),
        ForeignKeyConstraint(["decoder_id", "decoder_version"], _OF_A_VERSION[1]),
        Index("ix_controlprefix_codes_decoder", "decoder_id", "decoder_version"),
    )

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    decoder_id: Mapped[int] = mapped_column(_Id)
    decoder_version: Mapped[int]
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class SourceRow(Base):
    """That a version was learned from a user's texts."""

    __tablename__ = "controlprefix_sources"
    __table_args__ = (
        ForeignKeyConstraint(*_OF_A_VERSION, ondelete="CASCADE"),
        Index("ix_controlprefix_sources_user", "tenant_id", "user_name"),
    )

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    user_name: Mapped[str] = mapped_column(String(255), primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class ProfileRow(Base):
    """What a user's texts are like, as numbers: plain for the database to compare, or sealed."""

    __tablename__ = "controlprefix_profiles"

    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id), primary_key=True)
    user_name: Mapped[str] = mapped_column(String(255), primary_key=True)
    embedder: Mapped[str] = mapped_column(String(255), primary_key=True)
    num_texts: Mapped[int]
    numbers: Mapped[Sequence[float] | None] = mapped_column(Numbers)
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary)
    key_id: Mapped[str | None] = mapped_column(String(255))


class ApiKeyRow(Base):
    """A key that requests to a server carry: its hash."""

    __tablename__ = "controlprefix_api_keys"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    name: Mapped[str] = mapped_column(String(255))
    key_hash: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class AliasRow(Base):
    """A name for a version, such as `canary`."""

    __tablename__ = "controlprefix_aliases"
    __table_args__ = (ForeignKeyConstraint(*_OF_A_VERSION, ondelete="CASCADE"),)

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int]
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class SampleRow(Base):
    """A text of a user, kept because the caller asked for it."""

    __tablename__ = "controlprefix_samples"
    __table_args__ = (Index("ix_controlprefix_samples_user", "tenant_id", "user_name", "id"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    user_name: Mapped[str] = mapped_column(String(255))
    key_id: Mapped[str | None] = mapped_column(String(255))
    text: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class AuditRow(Base):
    """That something was forgotten: what and when, never what it held."""

    __tablename__ = "controlprefix_audit"
    __table_args__ = (Index("ix_controlprefix_audit_tenant", "tenant_id", "id"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    action: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    num_versions: Mapped[int]


def row_security(table: Table) -> list[str]:
    """PostgreSQL's statements that show a session the rows of its own tenant alone.

    A transaction says whose it is in `controlprefix.tenant`; without that it sees nothing.
    """
    whose = "id" if table.name == TenantRow.__tablename__ else "tenant_id"
    setting = "nullif(current_setting('controlprefix.tenant', true), '')"
    mine = f"{whose} = {setting}::bigint"
    if table.name == TenantRow.__tablename__:  # found by its name, before its number is known
        mine = f"{mine} OR name = current_setting('controlprefix.tenant_name', true)"
    return [
        f"ALTER TABLE {table.name} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table.name} FORCE ROW LEVEL SECURITY",  # for the tables' owner too
        f"CREATE POLICY {table.name}_own ON {table.name} USING ({mine})",
    ]


for _table in Base.metadata.sorted_tables:
    for _statement in row_security(_table):
        event.listen(_table, "after_create", DDL(_statement).execute_if(dialect="postgresql"))
