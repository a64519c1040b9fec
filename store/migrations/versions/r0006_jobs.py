"""Revision 0006: jobs, and the queue of those that are not finished."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "controlprefix_jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant_id", _ID, sa.ForeignKey("controlprefix_tenants.id"), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("user_name", sa.String(255), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("num_steps", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("key_id", sa.String(255)),
        sa.Column("payload", sa.LargeBinary),
    )
    op.create_table(
        "controlprefix_queue",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant_name", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("is_running", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("num_attempts", sa.Integer, nullable=False),
    )
    op.create_index(
        "ix_controlprefix_jobs_tenant", "controlprefix_jobs", ["tenant_id", "created_at"]
    )
    op.create_index("ix_controlprefix_jobs_user", "controlprefix_jobs", ["tenant_id", "user_name"])
    op.create_index("ix_controlprefix_queue_due", "controlprefix_queue", ["fingerprint", "due_at"])
    if op.get_bind().dialect.name != "postgresql":
        return
    own = "tenant_id = nullif(current_setting('controlprefix.tenant', true), '')::bigint"
    for statement in (
        "ALTER TABLE controlprefix_jobs ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE controlprefix_jobs FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY controlprefix_jobs_own ON controlprefix_jobs USING ({own})",
    ):
        op.execute(statement)
