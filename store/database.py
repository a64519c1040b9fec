"""One tenant's connections to one database: transactions, retries, and whose rows they see."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from controlprefix.errors import StoreError
from controlprefix.store import revisions
from controlprefix.store.listener import CHANNEL, Listener
from controlprefix.store.tables import Base, TenantRow

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_RETRIES = 5
_FIRST_PAUSE_S = 0.05  # doubled each time: about 1.5 s in all
_NOBODY = -1  # a tenant that has no row yet has no other rows either


class Database:
    """Runs work in transactions, as one tenant.

    Args:
        url: Of SQLAlchemy.
        tenant: Whose rows are seen and written.
        exact: Whether `change_token` must know of every change at once.
        pool_size: Connections kept open to a server; ten more may be opened under load.

    Raises:
        StoreError: If it cannot be opened, or has another schema.
    """

    def __init__(self, url: str, tenant: str, *, exact: bool = True, pool_size: int = 5) -> None:
        self.url = url
        self.tenant = tenant
        self._tenant_id: int | None = None
        self._num_writes = 0
        self._exact = exact
        self._watch: Any = None
        self._listener: Listener | None = None
        self._lock = threading.Lock()
        try:
            self._engine = _engine(url, pool_size)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"cannot open the store {without_password(url)!r}: {error}; install that package "
                "(for PostgreSQL: pip install 'controlprefix[postgres]')"
            ) from error
        except (ArgumentError, ValueError) as error:
            reason = str(error).splitlines()[0].replace(url, "it")
            raise StoreError(
                f"cannot open the store {without_password(url)!r}: {reason}; give an SQLAlchemy "
                "URL such as sqlite:///prefixes.db"
            ) from error

    def prepare(self) -> None:
        """Make the tables where there are none.

        Raises:
            StoreError: If there are some, of another schema.
        """
        # Read first: a store that is read only can still be read.
        if not self._transaction(lambda s: revisions.require_head(s.connection()), write=False):
            self._transaction(self._create, write=True)

    def run(
        self,
        work: Callable[[Session, int], Result],
        *,
        write: bool = False,
        whole_view: bool = False,
    ) -> Result:
        """Do some work in a transaction, committed at its end or rolled back whole.

        Work is done again, after a pause, when the connection breaks before the commit:
        it must change nothing but the session.

        Args:
            work: Given the session and the tenant's number.
            write: Whether it changes anything.
            whole_view: All statements see the database as it was at the first.

        Raises:
            StoreError: If the database cannot be read or written.
        """

        def as_tenant(session: Session) -> Result:
            if whole_view and self.on_server:  # SQLite's transactions always do
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            return work(session, self._introduce(session, write))

        return self._transaction(as_tenant, write=write)

    def change_token(self) -> Hashable | None:
        """Something that is equal only while nobody has changed the database; None: not known.

        SQLite counts, for each connection, the changes that others made: so one is kept
        aside, that nobody writes through. Asking takes microseconds. PostgreSQL tells of
        changes a moment after them, so there it is known only where that is good enough.
        """
        if self.on_server:
            if self._exact:
                return None
            with self._lock:
                if self._listener is None:
                    self._listener = Listener(self._engine)
            heard = self._listener.token()
            return None if heard is None else (self._num_writes, heard)
        if _in_memory(self.url):
            return self._num_writes
        try:
            with self._lock:
                if self._watch is None:
                    self._watch = self._engine.raw_connection()
                    self._watch.detach()
                (version,) = self._watch.execute("PRAGMA data_version").fetchone()
        except (sqlite3.Error, SQLAlchemyError):
            return None  # the question itself will say what is wrong
        return (self._num_writes, version)

    def close(self) -> None:
        """Give the connections back."""
        with self._lock:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        self._engine.dispose()

    @property
    def on_server(self) -> bool:
        """Whether it is PostgreSQL, and not SQLite in a file."""
        return self._engine.dialect.name == "postgresql"

    def insert(self, table: type[Base], **values: Any) -> sa.Executable:
        """A statement that inserts a row unless one is there."""
        if self.on_server:
            return postgresql.insert(table).values(**values).on_conflict_do_nothing()
        return sqlite.insert(table).values(**values).on_conflict_do_nothing()

    def _create(self, session: Session) -> None:
        if self.on_server:  # two processes may be first; the number is any that is ours
            session.execute(sa.text("SELECT pg_advisory_xact_lock(7263519)"))
        if not revisions.require_head(session.connection()):
            revisions.create(session.connection())

    def _introduce(self, session: Session, write: bool) -> int:
        """Tell the database whose transaction it is; gives the tenant's number."""
        if self._tenant_id is None:
            if self.on_server:
                self._say(session, "controlprefix.tenant_name", self.tenant)
            query = select(TenantRow.id).where(TenantRow.name == self.tenant)
            found = session.scalar(query)
            if found is None and write:
                session.execute(self.insert(TenantRow, name=self.tenant))
                found = session.scalar(query)
            elif found is not None:  # a number just made may yet be rolled back
                self._tenant_id = found
        else:
            found = self._tenant_id
        number = _NOBODY if found is None else found
        if self.on_server:
            self._say(session, "controlprefix.tenant", str(number))
        return number

    @staticmethod
    def _say(session: Session, setting: str, value: str) -> None:
        session.execute(select(sa.func.set_config(setting, value, True)))  # for this transaction

    def _transaction(self, work: Callable[[Session], Result], *, write: bool) -> Result:
        options = self._engine.execution_options(controlprefix_write=write)
        pause = _FIRST_PAUSE_S
        for attempt in range(_RETRIES + 1):
            committing = False
            try:
                with Session(options, expire_on_commit=False) as session:
                    result = work(session)
                    if write and self.on_server:  # those who listen hear of it at the commit
                        session.execute(select(sa.func.pg_notify(CHANNEL, "")))
                    committing = True
                    session.commit()
                    self._num_writes += write
                    return result
            except DBAPIError as error:
                dropped = error.connection_invalidated or _refused(error)
                unsure = write and committing
                if dropped and not unsure and attempt < _RETRIES:
                    _log.warning("the connection to the store broke; again in %.2f s", pause)
                    time.sleep(pause)
                    pause *= 2
                    continue
                raise self._explained(error, write, unsure=dropped and unsure) from error
            except SQLAlchemyError as error:
                raise self._explained(error, write, unsure=False) from error
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, error: SQLAlchemyError, write: bool, *, unsure: bool) -> StoreError:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        where = without_password(self.url)
        if unsure:
            return StoreError(
                f"the connection to the store {where!r} broke while a change was committed: "
                f"{reason}; it is there whole or not at all; look before doing it again"
            )
        doing = "write" if write else "read"
        return StoreError(
            f"cannot {doing} the store {where!r}: {reason}; nothing was changed; check the path, "
            "its permissions, the free space, and who else writes"
        )


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring a store's schema to today's, in one transaction.

    Returns:
        The revision before (None: there were no tables) and after.

    Raises:
        StoreError: If it cannot be opened or written, or a later version made it.
    """
    database = Database(url, "")
    try:
        return database._transaction(lambda s: revisions.upgrade(s.connection()), write=True)
    finally:
        database.close()


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    try:
        # A query may hold passwords too.
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.rpartition("@")[2]


def _refused(error: DBAPIError) -> bool:
    """Whether a server could not be reached at all, as while it restarts."""
    return error.statement is None and type(error.orig).__module__.startswith("psycopg")


def _in_memory(url: str) -> bool:
    return make_url(url).database in (None, "", ":memory:")


def _engine(url: str, pool_size: int) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        # No ping before each use: work on a connection that turns out dead is done again.
        return create_engine(url, pool_size=pool_size, pool_timeout=30.0)
    # A database in memory lives in its connection: one, that threads take in turn.
    one_connection = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    engine = create_engine(
        url,
        connect_args={"timeout": 30.0, "check_same_thread": False},
        **(one_connection if _in_memory(url) else {}),
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("controlprefix_write")
        # A writer takes its lock at once: one that read first could not wait for another's end.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
