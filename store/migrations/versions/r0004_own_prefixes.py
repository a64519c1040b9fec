"""Revision 0004: on PostgreSQL, a row can only belong to a prefix of its own tenant."""

from alembic import op

revision = "0004"
down_revision = "0003"

_TABLES = ("versions", "payloads", "codes", "sources", "aliases")


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    is_own = "tenant_id = nullif(current_setting('controlprefix.tenant', true), '')::bigint"
    for name in _TABLES:
        table = f"controlprefix_{name}"
        has_prefix = (
            "EXISTS (SELECT FROM controlprefix_prefixes"
            f" WHERE controlprefix_prefixes.id = {table}.prefix_id)"
        )
        op.execute(f"DROP POLICY {table}_own ON {table}")
        op.execute(
            f"CREATE POLICY {table}_own ON {table} USING ({is_own})"
            f" WITH CHECK ({is_own} AND {has_prefix})"
        )
