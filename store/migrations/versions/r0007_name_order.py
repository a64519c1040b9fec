"""Revision 0007: names are ordered by code points, so that an index reads a page of them."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            'ALTER TABLE controlprefix_prefixes ALTER COLUMN name TYPE varchar(255) COLLATE "C"'
        )
