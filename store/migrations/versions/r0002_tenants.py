"""Revision 0002: tables of tenants, payloads, aliases and audit; row security."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _tenant() -> sa.Column[int]:
    return sa.Column("tenant_id", _ID, sa.ForeignKey("controlprefix_tenants.id"), nullable=False)


def _version_key() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["prefix_id", "version"],
        ["controlprefix_versions.prefix_id", "controlprefix_versions.version"],
        ondelete="CASCADE",
    )


def upgrade() -> None:
    tenants = op.create_table(
        "controlprefix_tenants",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False, unique=True),
    )
    tables = [
        tenants,
        op.create_table(
            "controlprefix_prefixes",
            sa.Column("id", _ID, primary_key=True),
            _tenant(),
            sa.Column("kind", sa.String(16), nullable=False),
            sa.Column("name", sa.String(255), nullable=False),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("model_name", sa.String(255), nullable=False),
            sa.Column("current_version", sa.Integer, nullable=False),
            sa.Column("newest_version", sa.Integer, nullable=False),
            sa.UniqueConstraint("tenant_id", "fingerprint", "kind", "name"),
        ),
        op.create_table(
            "controlprefix_versions",
            sa.Column(
                "prefix_id",
                _ID,
                sa.ForeignKey("controlprefix_prefixes.id", ondelete="CASCADE"),
                primary_key=True,
            ),
            sa.Column("version", sa.Integer, primary_key=True),
            _tenant(),
            sa.Column("parent_version", sa.Integer),
            sa.Column("content_hash", sa.String(80), nullable=False),
            sa.Column("size_bytes", sa.Integer, nullable=False),
            sa.Column("num_slots", sa.Integer, nullable=False),
            sa.Column("dtype", sa.String(16), nullable=False),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
            sa.Column("details", sa.JSON, nullable=False),
        ),
        op.create_table(
            "controlprefix_payloads",
            sa.Column("prefix_id", _ID, primary_key=True),
            sa.Column("version", sa.Integer, primary_key=True),
            _tenant(),
            sa.Column("key_id", sa.String(255)),
            sa.Column("payload", sa.LargeBinary, nullable=False),
            _version_key(),
        ),
        op.create_table(
            "controlprefix_aliases",
            sa.Column("prefix_id", _ID, primary_key=True),
            sa.Column("alias", sa.String(64), primary_key=True),
            sa.Column("version", sa.Integer, nullable=False),
            _tenant(),
            _version_key(),
        ),
        op.create_table(
            "controlprefix_samples",
            sa.Column("id", _ID, primary_key=True),
            _tenant(),
            sa.Column("user_name", sa.String(255), nullable=False),
            sa.Column("key_id", sa.String(255)),
            sa.Column("text", sa.LargeBinary, nullable=False),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        ),
        op.create_table(
            "controlprefix_audit",
            sa.Column("id", _ID, primary_key=True),
            _tenant(),
            sa.Column("at", sa.DateTime(timezone=True), nullable=False),
            sa.Column("action", sa.String(32), nullable=False),
            sa.Column("kind", sa.String(16), nullable=False),
            sa.Column("name", sa.String(255), nullable=False),
            sa.Column("num_versions", sa.Integer, nullable=False),
        ),
    ]
    op.create_index(
        "ix_controlprefix_samples_user", "controlprefix_samples", ["tenant_id", "user_name", "id"]
    )
    op.create_index("ix_controlprefix_audit_tenant", "controlprefix_audit", ["tenant_id", "id"])
    op.execute(
        "INSERT INTO controlprefix_tenants (name) SELECT DISTINCT tenant FROM prefixes ORDER BY 1"
    )
    op.execute(
        "INSERT INTO controlprefix_prefixes (id, tenant_id, kind, name, fingerprint, model_name,"
        " current_version, newest_version) SELECT p.id, t.id, p.kind, p.name, p.fingerprint,"
        " p.model_name, p.current_version, p.newest_version FROM prefixes p"
        " JOIN controlprefix_tenants t ON t.name = p.tenant"
    )
    op.execute(
        "INSERT INTO controlprefix_versions (prefix_id, version, tenant_id, content_hash,"
        " size_bytes, num_slots, dtype, created_at, details) SELECT v.prefix_id, v.version,"
        " p.tenant_id, v.content_hash, v.size_bytes, v.num_slots, v.dtype, v.created_at, v.details"
        " FROM prefix_versions v JOIN controlprefix_prefixes p ON p.id = v.prefix_id"
    )
    op.execute(
        "INSERT INTO controlprefix_payloads (prefix_id, version, tenant_id, payload)"
        " SELECT v.prefix_id, v.version, p.tenant_id, v.payload"
        " FROM prefix_versions v JOIN controlprefix_prefixes p ON p.id = v.prefix_id"
    )
    for old in ("prefix_versions", "prefixes", "controlprefix_store"):
        op.drop_table(old)
    if op.get_bind().dialect.name == "postgresql":
        # Copied ids do not advance the sequence.
        op.execute(
            "SELECT setval(pg_get_serial_sequence('controlprefix_prefixes', 'id'),"
            " coalesce((SELECT max(id) FROM controlprefix_prefixes), 0) + 1, false)"
        )
        for table in tables:
            column = "id" if table.name == "controlprefix_tenants" else "tenant_id"
            is_own = f"{column} = nullif(current_setting('controlprefix.tenant', true), '')::bigint"
            if table.name == "controlprefix_tenants":
                is_own += " OR name = current_setting('controlprefix.tenant_name', true)"
            op.execute(f"ALTER TABLE {table.name} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table.name} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY {table.name}_own ON {table.name} USING ({is_own})")
