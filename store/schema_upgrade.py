"""Upgrading a store's schema to the one that this version reads and writes."""

import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.orm import Session

from controlprefix.errors import StoreError
from controlprefix.store import revisions
from controlprefix.store.database import Database
from controlprefix.store.tables import Base


def upgrade(url: str, *, service_role: str | None = None) -> tuple[str | None, str]:
    """Upgrade a store's schema to this version, in one transaction.

    Args:
        url: SQLAlchemy URL.
        service_role: A PostgreSQL role that may then read and write rows, and nothing else: it
            owns no table, so it can neither lift row security nor change the schema.

    Returns:
        The revision before (None: there were no tables) and after.

    Raises:
        StoreError: If it cannot be opened or written, or a later version made it.
    """
    database = Database(url, "")
    try:
        if service_role is not None and not database.is_postgresql:
            raise StoreError(
                f"the store {database.display_name!r} is not on PostgreSQL, which alone has roles; "
                "leave the service role out"
            )

        def work(session: Session) -> tuple[str | None, str]:
            database.lock_schema(session)
            result = revisions.upgrade(session.connection())
            if service_role is not None:
                _grant(session, service_role)
            return result

        return database.transaction(work, write=True)
    finally:
        database.close()


def _grant(session: Session, role: str) -> None:
    """Let a role read and write the rows of all tables, as row security allows."""
    name = session.connection().dialect.identifier_preparer.quote_identifier(role)
    tables = [table.name for table in Base.metadata.sorted_tables]
    sequences = [
        sequence
        for table in Base.metadata.sorted_tables
        if "id" in table.columns
        and (sequence := session.scalar(select(sa.func.pg_get_serial_sequence(table.name, "id"))))
    ]
    schema = session.scalar(select(sa.func.quote_ident(sa.func.current_schema())))
    for rights, on in (
        ("USAGE", f"SCHEMA {schema}"),
        ("SELECT, INSERT, UPDATE, DELETE", ", ".join(tables)),
        ("SELECT", revisions.REVISION_TABLE),
        ("USAGE", f"SEQUENCE {', '.join(sequences)}"),
    ):
        session.execute(sa.text(f"GRANT {rights} ON {on} TO {name}"))
