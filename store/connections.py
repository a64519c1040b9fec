"""Connections: those to one database, which the tenants of a process share."""

import os
import sqlite3
import threading
from collections.abc import Hashable
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

_LIBPQ_TIMEOUTS = {"connect_timeout": 10, "tcp_user_timeout": 30_000}  # seconds, milliseconds
_all_connections: WeakSet["Connections"] = WeakSet()


def _forget_connections() -> None:
    """In the child of a fork: connections belong to the parent."""
    for connections in list(_all_connections):
        connections.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)


class Connections:
    """The connections to one database, which its tenants share.

    Args:
        url: SQLAlchemy URL.
        pool_size: Connections kept open to a server; ten more may be opened under load.

    Attributes:
        engine: The pool.
        num_writes: Transactions of this process that wrote.
        was_reached: Whether a transaction has ended well.

    Raises:
        ModuleNotFoundError, ArgumentError, ValueError: If there is no driver for the URL.
    """

    def __init__(self, url: str, pool_size: int) -> None:
        self.engine = _create_engine(url, pool_size)
        self.num_writes = 0
        self.was_reached = False
        self._is_in_memory = self.engine.dialect.name == "sqlite" and is_in_memory(url)
        self._lock = threading.Lock()
        self._watching: Any = None
        _all_connections.add(self)

    def change_token(self) -> Hashable | None:
        """See `Database.change_token`."""
        if self.engine.dialect.name == "postgresql":
            return None
        if self._is_in_memory:
            return self.num_writes
        try:
            with self._lock:
                if self._watching is None:
                    self._watching = self.engine.raw_connection()
                    self._watching.detach()
                (version,) = self._watching.execute("PRAGMA data_version").fetchone()
        except (sqlite3.Error, SQLAlchemyError):
            return None  # the next query will report what is wrong
        return (self.num_writes, version)

    def forget(self) -> None:
        """Use none of the connections that are open, and leave them open."""
        self._lock = threading.Lock()
        self._watching = None
        if not self._is_in_memory:
            self.engine.dispose(close=False)

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            if self._watching is not None:
                self._watching.close()
                self._watching = None
        self.engine.dispose()


def is_in_memory(url: str) -> bool:
    """Whether an SQLite database has no file."""
    return make_url(url).database in (None, "", ":memory:")


def _create_engine(url: str, pool_size: int) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        # A server that is gone without a word is not waited for without end.
        is_libpq = parsed.get_driver_name().startswith("psycopg")
        timeouts = _LIBPQ_TIMEOUTS if is_libpq else {}
        # No ping before each use: work on a connection that turns out dead is repeated.
        return create_engine(
            url,
            pool_size=pool_size,
            pool_timeout=30.0,
            connect_args={k: v for k, v in timeouts.items() if k not in parsed.query},
        )
    # An in-memory database exists only in one connection, which all threads share.
    one_connection = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    engine = create_engine(
        url,
        connect_args={"timeout": 30.0, "check_same_thread": False},
        **(one_connection if is_in_memory(url) else {}),
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not in the driver
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # overwrite what is forgotten

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("controlprefix_write")
        # A writer takes its lock at once: a transaction that began with a read could not wait
        # for the write lock.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
