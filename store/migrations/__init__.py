"""Schema revisions, run by Alembic on request."""
