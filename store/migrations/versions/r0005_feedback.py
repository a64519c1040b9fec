"""Revision 0005: what is kept of a user is a text or feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column(
        "controlprefix_samples",
        sa.Column("kind", sa.String(16), nullable=False, server_default="text"),
    )
