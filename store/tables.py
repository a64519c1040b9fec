"""The tables. Every row but those of the queue has its tenant, which PostgreSQL enforces with
row-level security.

The bytes of a version are in a table of their own, so that finding the current version never
reads past them.
"""

from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
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
    Text,
    TypeDecorator,
    UniqueConstraint,
    event,
    false,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

# SQLite autoincrements only columns of type INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


class Numbers(TypeDecorator[Sequence[float]]):
    """A float32 vector: an array on PostgreSQL, where pgvector can compare it; else bytes."""

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


class Time(TypeDecorator[datetime]):
    """A time in UTC; SQLite gives it back without saying so."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return None if value is None else value.astimezone(UTC)
        return value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Declarative base of all tables."""


class TenantRow(Base):
    """A tenant, whose rows no other tenant can see."""

    __tablename__ = "controlprefix_tenants"

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)


class PrefixRow(Base):
    """A name for one frozen model, and its current version."""

    __tablename__ = "controlprefix_prefixes"
    __table_args__ = (UniqueConstraint("tenant_id", "fingerprint", "kind", "name"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    kind: Mapped[str] = mapped_column(String(16))
    # By code points, as in SQLite, and not by a language, whose order no index has.
    name: Mapped[str] = mapped_column(
        String(255).with_variant(postgresql.VARCHAR(255, collation="C"), "postgresql")
    )
    fingerprint: Mapped[str] = mapped_column(String(64))
    model_name: Mapped[str] = mapped_column(String(255))
    current_version: Mapped[int]
    newest_version: Mapped[int]


class VersionRow(Base):
    """One immutable version, without its bytes."""

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
    created_at: Mapped[datetime] = mapped_column(Time())
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    # Users it was trained on (`SourceRow`) who have been forgotten since.
    num_forgotten: Mapped[int] = mapped_column(default=0, server_default="0")


_VERSION_KEY = (
    ["prefix_id", "version"],
    ["controlprefix_versions.prefix_id", "controlprefix_versions.version"],
)


class PayloadRow(Base):
    """The bytes of one version: a whole safetensors file, encrypted if it has a key id."""

    __tablename__ = "controlprefix_payloads"
    __table_args__ = (ForeignKeyConstraint(*_VERSION_KEY, ondelete="CASCADE"),)

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    key_id: Mapped[str | None] = mapped_column(String(255))
    payload: Mapped[bytes] = mapped_column(LargeBinary)


class CodeRow(Base):
    """A version that is a user code, and the version of the decoder that it needs."""

    __tablename__ = "controlprefix_codes"
    __table_args__ = (
        ForeignKeyConstraint(*_VERSION_KEY, ondelete="CASCADE"),
        ForeignKeyConstraint(["decoder_id", "decoder_version"], _VERSION_KEY[1]),
        Index("ix_controlprefix_codes_decoder", "decoder_id", "decoder_version"),
    )

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    decoder_id: Mapped[int] = mapped_column(_Id)
    decoder_version: Mapped[int]
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class SourceRow(Base):
    """A user whose texts a version was trained on."""

    __tablename__ = "controlprefix_sources"
    __table_args__ = (
        ForeignKeyConstraint(*_VERSION_KEY, ondelete="CASCADE"),
        Index("ix_controlprefix_sources_user", "tenant_id", "user_name"),
    )

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    user_name: Mapped[str] = mapped_column(String(255), primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class ProfileRow(Base):
    """A user's mean embedding: plain, so that the database can compare it, or encrypted."""

    __tablename__ = "controlprefix_profiles"

    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id), primary_key=True)
    user_name: Mapped[str] = mapped_column(String(255), primary_key=True)
    embedder: Mapped[str] = mapped_column(String(255), primary_key=True)
    num_texts: Mapped[int]
    numbers: Mapped[Sequence[float] | None] = mapped_column(Numbers)
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary)
    key_id: Mapped[str | None] = mapped_column(String(255))


class ApiKeyRow(Base):
    """The hash of an API key."""

    __tablename__ = "controlprefix_api_keys"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    name: Mapped[str] = mapped_column(String(255))
    key_hash: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(Time())


class AliasRow(Base):
    """An alias of a version, such as `canary`."""

    __tablename__ = "controlprefix_aliases"
    __table_args__ = (ForeignKeyConstraint(*_VERSION_KEY, ondelete="CASCADE"),)

    prefix_id: Mapped[int] = mapped_column(_Id, primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int]
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))


class UserTextRow(Base):
    """A text of a user that the caller chose to keep, or feedback as JSON."""

    __tablename__ = "controlprefix_samples"
    __table_args__ = (Index("ix_controlprefix_samples_user", "tenant_id", "user_name", "id"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    user_name: Mapped[str] = mapped_column(String(255))
    key_id: Mapped[str | None] = mapped_column(String(255))
    text: Mapped[bytes] = mapped_column(LargeBinary)
    kind: Mapped[str] = mapped_column(String(16), default="text", server_default="text")
    created_at: Mapped[datetime] = mapped_column(Time())


class JobRow(Base):
    """Training that a server accepted for a user."""

    __tablename__ = "controlprefix_jobs"
    __table_args__ = (
        Index("ix_controlprefix_jobs_tenant", "tenant_id", "created_at"),
        Index("ix_controlprefix_jobs_user", "tenant_id", "user_name"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    kind: Mapped[str] = mapped_column(String(32))
    user_name: Mapped[str] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(Time())
    started_at: Mapped[datetime | None] = mapped_column(Time())
    finished_at: Mapped[datetime | None] = mapped_column(Time())
    num_attempts: Mapped[int]
    num_steps: Mapped[int]
    version: Mapped[int | None]
    error: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(String(255))
    payload: Mapped[bytes | None] = mapped_column(LargeBinary)


class QueueRow(Base):
    """A job that is not finished, for workers, who see those of all tenants."""

    __tablename__ = "controlprefix_queue"
    __table_args__ = (Index("ix_controlprefix_queue_due", "fingerprint", "due_at"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_name: Mapped[str] = mapped_column(String(255))
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(Time())
    # When it may be taken: a worker that has it moves that ahead.
    due_at: Mapped[datetime] = mapped_column(Time())
    is_running: Mapped[bool] = mapped_column(default=False, server_default=false())
    num_attempts: Mapped[int]


class AuditRow(Base):
    """A removal: what and when, never its content."""

    __tablename__ = "controlprefix_audit"
    __table_args__ = (Index("ix_controlprefix_audit_tenant", "tenant_id", "id"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey(TenantRow.id))
    at: Mapped[datetime] = mapped_column(Time())
    action: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(255))
    num_versions: Mapped[int]


def row_security(table: Table) -> list[str]:
    """PostgreSQL statements that restrict a session to the rows of its own tenant.

    A transaction sets its tenant in `controlprefix.tenant`; without that it sees no rows. A row
    can only be added to a prefix that the session sees.
    """
    column = "id" if table.name == TenantRow.__tablename__ else "tenant_id"
    setting = "nullif(current_setting('controlprefix.tenant', true), '')"
    is_own = f"{column} = {setting}::bigint"
    if table.name == TenantRow.__tablename__:  # looked up by name before its id is known
        is_own = f"{is_own} OR name = current_setting('controlprefix.tenant_name', true)"
    check = ""
    if "prefix_id" in table.columns:
        prefixes = PrefixRow.__tablename__
        has_prefix = f"SELECT FROM {prefixes} WHERE {prefixes}.id = {table.name}.prefix_id"
        check = f" WITH CHECK ({is_own} AND EXISTS ({has_prefix}))"
    return [
        f"ALTER TABLE {table.name} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table.name} FORCE ROW LEVEL SECURITY",  # also for the owner of the tables
        f"CREATE POLICY {table.name}_own ON {table.name} USING ({is_own}){check}",
    ]


for _table in Base.metadata.sorted_tables:
    if _table.name == QueueRow.__tablename__:
        continue
    for _statement in row_security(_table):
        event.listen(_table, "after_create", DDL(_statement).execute_if(dialect="postgresql"))
