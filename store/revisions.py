"""Schema revisions: which one a database has, and upgrading it."""

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, inspect

from controlprefix.errors import StoreError
from controlprefix.store.tables import Base

REVISION_TABLE = "controlprefix_revision"
REVISIONS = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0006",
    "0007",
)  # oldest first; a test compares them with the files
HEAD = REVISIONS[-1]


def revision_of(connection: Connection) -> str | None:
    """The revision of a database; None if it has none of our tables.

    Raises:
        StoreError: If a later version of this library created it.
    """
    tables = set(inspect(connection).get_table_names())
    if REVISION_TABLE in tables:
        revision = connection.scalar(sa.text(f"SELECT version_num FROM {REVISION_TABLE}"))
        if revision is not None and revision not in REVISIONS:
            raise StoreError(
                f"the store has schema {revision}; this version reads up to {HEAD}, so upgrade "
                "controlprefix"
            )
        return None if revision is None else str(revision)
    return "0001" if {"prefixes", "prefix_versions", "controlprefix_store"} <= tables else None


def require_head(connection: Connection) -> bool:
    """Whether the tables exist with the current schema.

    Raises:
        StoreError: If the database has an earlier or a later schema.
    """
    revision = revision_of(connection)
    if revision not in (None, HEAD):
        raise StoreError(
            f"the store has schema {revision}; this version needs {HEAD}; back the database up, "
            "then run: controlprefix store upgrade"
        )
    return revision == HEAD


def create(connection: Connection) -> None:
    """Create the tables of the current schema in an empty database."""
    Base.metadata.create_all(connection)
    connection.execute(
        sa.text(
            f"CREATE TABLE {REVISION_TABLE} (version_num VARCHAR(32) NOT NULL, "
            f"CONSTRAINT {REVISION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
    )
    connection.execute(sa.text(f"INSERT INTO {REVISION_TABLE} VALUES ('{HEAD}')"))


def upgrade(connection: Connection, to: str = HEAD) -> tuple[str | None, str]:
    """Upgrade a database to a revision, in the transaction of the connection.

    Returns:
        The revision before and after.
    """
    # Imported here, since nothing else needs Alembic.
    from alembic import command
    from alembic.config import Config

    before = revision_of(connection)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("version_path_separator", "os")
    config.attributes["connection"] = connection
    if before == "0001" and REVISION_TABLE not in inspect(connection).get_table_names():
        command.stamp(config, "0001")  # created before revisions were recorded
    command.upgrade(config, to)
    return before, to
