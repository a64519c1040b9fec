"""Revision 0003: user codes and decoders, users in training data, profiles, API keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NUMBERS = sa.LargeBinary().with_variant(postgresql.ARRAY(postgresql.REAL), "postgresql")
_VERSION = ["controlprefix_versions.prefix_id", "controlprefix_versions.version"]


def _tenant(*, primary_key: bool = False) -> sa.Column[int]:
    reference = sa.ForeignKey("controlprefix_tenants.id")
    return sa.Column("tenant_id", _ID, reference, nullable=False, primary_key=primary_key)


def _version_key() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["prefix_id", "version"], _VERSION, ondelete="CASCADE")


def upgrade() -> None:
    op.add_column(
        "controlprefix_versions",
        sa.Column("num_forgotten", sa.Integer, nullable=False, server_default="0"),
    )
    tables = [
        op.create_table(
            "controlprefix_codes",
            sa.Column("prefix_id", _ID, primary_key=True),
            sa.Column("version", sa.Integer, primary_key=True),
            sa.Column("decoder_id", _ID, nullable=False),
            sa.Column("decoder_version", sa.Integer, nullable=False),
            _tenant(),
            _version_key(),
            sa.ForeignKeyConstraint(["decoder_id", "decoder_version"], _VERSION),
        ),
        op.create_table(
            "controlprefix_sources",
            sa.Column("prefix_id", _ID, primary_key=True),
            sa.Column("version", sa.Integer, primary_key=True),
            sa.Column("user_name", sa.String(255), primary_key=True),
            _tenant(),
            _version_key(),
        ),
        op.create_table(
            "controlprefix_profiles",
            _tenant(primary_key=True),
            sa.Column("user_name", sa.String(255), primary_key=True),
            sa.Column("embedder", sa.String(255), primary_key=True),
            sa.Column("num_texts", sa.Integer, nullable=False),
            sa.Column("numbers", _NUMBERS),
            sa.Column("sealed", sa.LargeBinary),
            sa.Column("key_id", sa.String(255)),
        ),
        op.create_table(
            "controlprefix_api_keys",
            sa.Column("id", _ID, primary_key=True),
            _tenant(),
            sa.Column("name", sa.String(255), nullable=False),
            sa.Column("key_hash", sa.String(64), nullable=False, index=True),
            sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
            sa.UniqueConstraint("tenant_id", "name"),
        ),
    ]
    op.create_index(
        "ix_controlprefix_codes_decoder", "controlprefix_codes", ["decoder_id", "decoder_version"]
    )
    op.create_index(
        "ix_controlprefix_sources_user", "controlprefix_sources", ["tenant_id", "user_name"]
    )
    if op.get_bind().dialect.name == "postgresql":
        is_own = "tenant_id = nullif(current_setting('controlprefix.tenant', true), '')::bigint"
        for table in tables:
            op.execute(f"ALTER TABLE {table.name} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table.name} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY {table.name}_own ON {table.name} USING ({is_own})")
