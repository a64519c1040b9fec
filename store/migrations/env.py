"""Alembic environment: runs revisions in the transaction that it is given."""

from alembic import context

from controlprefix.store.revisions import REVISION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    version_table=REVISION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
