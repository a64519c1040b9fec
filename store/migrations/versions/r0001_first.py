"""Revision 0001: prefixes and their versions, with the tenant's name in each row."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "controlprefix_store", sa.Column("schema_version", sa.Integer, primary_key=True)
    )
    op.create_table(
        "prefixes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("model_name", sa.String(255), nullable=False),
        sa.Column("current_version", sa.Integer, nullable=False),
        sa.Column("newest_version", sa.Integer, nullable=False),
        sa.UniqueConstraint("tenant", "kind", "name", "fingerprint"),
    )
    op.create_table(
        "prefix_versions",
        sa.Column(
            "prefix_id",
            sa.Integer,
            sa.ForeignKey("prefixes.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("content_hash", sa.String(80), nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("num_slots", sa.Integer, nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.execute("INSERT INTO controlprefix_store (schema_version) VALUES (1)")
