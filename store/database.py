"""Database: one tenant's transactions on one database, with retries and row security."""

import contextlib
import copy
import logging
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import sqlalchemy as sa
import tenacity
from sqlalchemy import Engine, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from controlprefix.errors import ControlPrefixError, DamagedRowError, StoreError
from controlprefix.store import revisions
from controlprefix.store.connections import Connections, is_in_memory
from controlprefix.store.tables import Base, TenantRow
from controlprefix.store.urls import full_url, label_of, redacted, sqlite_path, without_password

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.05  # doubled each time: about 1.5 s in total
_MAX_PAUSE_S = 1.0
_RESTART_S = 15  # a database that was reached before may restart, or move to another machine
_NO_TENANT = -1  # a tenant that has no row yet has no other rows either
# PostgreSQL's states of transactions that another one was in the way of: serialization, deadlock,
# a key that exists or is gone meanwhile.
_RACES = ("40001", "40P01", "23505", "23503")
_ADVISORY_LOCK = 7263519  # any number that only this library uses
_USERS_LOCK = 7263520  # the same, with a tenant's id


class _TransactionError(Exception):
    """A transaction that failed in the database.

    Attributes:
        cause: The error.
        dropped: The connection broke, or could not be made.
        committing: The commit had been sent.
    """

    def __init__(self, cause: SQLAlchemyError, *, dropped: bool, committing: bool) -> None:
        super().__init__(str(cause))
        self.cause, self.dropped, self.committing = cause, dropped, committing


class Database:
    """Runs work in transactions, as one tenant.

    Args:
        url: SQLAlchemy URL, or the path of an SQLite file.
        tenant: The tenant whose rows are visible.
        pool_size: Connections kept open to a server; ten more may be opened under load.
        create: Create the file if it does not exist; otherwise it reads as an empty database.

    Attributes:
        url: SQLAlchemy URL of the database that is open.
        display_name: How messages name the database: a path, or a URL without password.
        is_missing: The file does not exist and was not created.

    Raises:
        StoreError: If it cannot be opened, or has another schema.
    """

    def __init__(self, url: str, tenant: str, *, pool_size: int = 5, create: bool = True) -> None:
        url = full_url(url)
        self.display_name = label_of(url)
        path = sqlite_path(url)
        self.is_missing = not create and path is not None and not path.exists()
        if self.is_missing:
            self.display_name, url = f"{self.display_name} (no such file)", "sqlite://"
        self.url = url
        self.tenant = tenant
        self._tenant_id: int | None = None
        path = sqlite_path(url)
        if create and path is not None and path.parent.is_dir():
            with contextlib.suppress(OSError):  # one that exists is left; others are told below
                path.touch(mode=0o600, exist_ok=False)
        try:
            self._connections = Connections(url, pool_size)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"cannot open the store {without_password(url)!r}: {error}; install that package "
                "(for PostgreSQL: pip install 'controlprefix[postgres]')"
            ) from error
        except (ArgumentError, ValueError) as error:
            reason = redacted(str(error).splitlines()[0].replace(url, "it"), url)
            raise StoreError(
                f"cannot open the store {without_password(url)!r}: {reason}; give a path, or an "
                "SQLAlchemy URL such as sqlite:///prefixes.db or postgresql://user@host/name"
            ) from error

    def create_tables(self) -> None:
        """Create the tables unless they exist.

        Raises:
            StoreError: If there are tables of another schema.
        """
        # Checked in a read transaction first, so that a read-only store can be read.
        if not self.transaction(lambda s: revisions.require_head(s.connection()), write=False):
            self.transaction(self._create, write=True)

    def run(
        self,
        work: Callable[[Session, int], Result],
        *,
        write: bool = False,
        repeatable_read: bool = False,
    ) -> Result:
        """Do some work in a transaction, which is committed at its end or rolled back whole.

        If the connection breaks before the commit, the work is repeated after a pause, so it
        must change nothing but the session.

        Args:
            work: Called with the session and the tenant's id.
            write: Whether it changes anything.
            repeatable_read: All statements see the database as it was at the first.

        Raises:
            StoreError: If the database cannot be read or written.
        """

        def as_tenant(session: Session) -> Result:
            if repeatable_read and self.is_postgresql:  # SQLite's transactions always are
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            return work(session, self._set_tenant(session, write))

        result = self.transaction(as_tenant, write=write)
        if write and self.is_missing:
            raise StoreError(f"there is no store to write to: {self.display_name}")
        return result

    def check(self) -> None:
        """Check that the database answers, without waiting for one that restarts.

        Raises:
            StoreError: If it does not.
        """
        self.transaction(lambda _: None, write=False, max_attempts=2)

    def lock_schema(self, session: Session) -> None:
        """Keep other transactions from creating or upgrading tables until this one ends."""
        if self.is_postgresql:  # SQLite's writers wait for each other anyway
            session.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))

    def lock_users(self, session: Session, tenant: int, *, shared: bool) -> None:
        """Keep publishing and forgetting of a tenant's users apart, until the transaction ends.

        Args:
            session, tenant: The transaction; nothing else of it may be locked yet.
            shared: Others may publish meanwhile; none may forget.
        """
        if self.is_postgresql:  # in SQLite there is one writer at a time
            lock = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
            session.execute(select(getattr(sa.func, lock)(_USERS_LOCK, tenant)))

    def for_tenant(self, tenant: str) -> "Database":
        """The same connections as another tenant."""
        other = copy.copy(self)
        other.tenant, other._tenant_id = tenant, None
        return other

    def change_token(self) -> Hashable | None:
        """A token that is equal only while nobody has changed the database; None if unknown.

        SQLite counts, per connection, the changes that other connections made; one connection
        is kept for that, which nobody writes through. Asking takes microseconds. PostgreSQL
        has nothing like it, so there the token is None.
        """
        return self._connections.change_token()

    def purge(self) -> None:
        """Overwrite what was removed: rewrite the tables, and empty the write-ahead log.

        Raises:
            StoreError: If it has no files, the role may not do that, or somebody else uses it.
        """
        if not self.is_postgresql and is_in_memory(self.url):
            raise StoreError(
                f"the store {self.display_name!r} has no file to purge; check its path"
            )
        if self.is_postgresql:
            tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
            self._require_owner()
            statements = [f"VACUUM (FULL, ANALYZE) {tables}", "CHECKPOINT"]
        else:
            statements = ["VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"]
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as link:
                driver = link.connection.driver_connection
                for statement in statements:
                    # Below SQLAlchemy, which would begin a transaction.
                    result = driver.execute(statement)  # type: ignore[union-attr]
                    is_checkpoint = statement.startswith("PRAGMA wal_checkpoint")
                    if is_checkpoint and (row := result.fetchone()) and row[0]:
                        raise StoreError("another process reads it; purge when nobody does")
        except Exception as error:
            raise StoreError(
                f"cannot purge the store {self.display_name!r}: {_reason(error)}; on PostgreSQL "
                "run it as the tables' owner with the role pg_checkpoint"
            ) from error

    def _require_owner(self) -> None:
        """Check that the role owns the tables: PostgreSQL only warns of those it skips."""
        names = [table.name for table in Base.metadata.sorted_tables]
        query = sa.text(
            "SELECT bool_and(pg_has_role(current_user, relowner, 'USAGE')) FROM pg_class "
            "WHERE relname = ANY(:names) AND relkind = 'r'"
        )
        owns = self.transaction(lambda s: s.scalar(query, {"names": names}), write=False)
        if not owns:
            raise StoreError(
                f"cannot purge the store {self.display_name!r}: this role does not own its tables; "
                "run it as their owner, with the role pg_checkpoint"
            )

    def close(self) -> None:
        """Close all connections, also those of other tenants."""
        self._connections.close()

    @property
    def _engine(self) -> Engine:
        return self._connections.engine

    @property
    def ignores_row_security(self) -> bool:
        """Whether PostgreSQL does not hold tenants apart for this role."""
        if not self.is_postgresql:
            return False
        query = sa.text(
            "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
        )
        return bool(self.transaction(lambda session: session.scalar(query), write=False))

    @property
    def is_postgresql(self) -> bool:
        """Whether it is PostgreSQL rather than SQLite."""
        return self._engine.dialect.name == "postgresql"

    def insert_if_absent(self, table: type[Base], **values: Any) -> sa.Executable:
        """A statement that inserts a row unless it exists."""
        if self.is_postgresql:
            return postgresql.insert(table).values(**values).on_conflict_do_nothing()
        return sqlite.insert(table).values(**values).on_conflict_do_nothing()

    def _create(self, session: Session) -> None:
        self.lock_schema(session)  # two processes may come first at the same time
        if not revisions.require_head(session.connection()):
            revisions.create(session.connection())

    def _set_tenant(self, session: Session, write: bool) -> int:
        """Tell PostgreSQL's row security whose transaction it is; returns the tenant's id."""
        if self._tenant_id is None:
            if self.is_postgresql:
                self._set_config(session, "controlprefix.tenant_name", self.tenant)
            query = select(TenantRow.id).where(TenantRow.name == self.tenant)
            tenant_id = session.scalar(query)
            if tenant_id is None and write:
                session.execute(self.insert_if_absent(TenantRow, name=self.tenant))
                tenant_id = session.scalar(query)
            elif tenant_id is not None:  # a new id may be rolled back
                self._tenant_id = tenant_id
        else:
            tenant_id = self._tenant_id
        number = _NO_TENANT if tenant_id is None else tenant_id
        if self.is_postgresql:
            self._set_config(session, "controlprefix.tenant", str(number))
        return number

    @staticmethod
    def _set_config(session: Session, setting: str, value: str) -> None:
        session.execute(select(sa.func.set_config(setting, value, True)))  # for this transaction

    def transaction(
        self,
        work: Callable[[Session], Result],
        *,
        write: bool,
        max_attempts: int | None = None,
    ) -> Result:
        """Run a function of a session in a transaction of no tenant: see `run`."""
        stop: Any = tenacity.stop_after_attempt(max_attempts or _MAX_ATTEMPTS)
        if self._connections.was_reached and max_attempts is None:  # URL and password are right
            stop = tenacity.stop_all(stop, tenacity.stop_after_delay(_RESTART_S))
        retry = tenacity.Retrying(
            stop=stop,
            wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE_S, max=_MAX_PAUSE_S),
            retry=tenacity.retry_if_exception(lambda error: _can_be_repeated(error, write)),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return retry(self._attempt, work, write)
        except _TransactionError as error:
            unsure = error.dropped and write and error.committing
            raise self._explain(error.cause, write, unsure=unsure) from error.cause

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        cause = error.cause if isinstance(error, _TransactionError) else error
        reason = redacted(_reason(cause), self.url) if isinstance(cause, Exception) else "it failed"
        _log.warning("the store %s is asked again: %s", self.display_name, reason)

    def _attempt(self, work: Callable[[Session], Result], write: bool) -> Result:
        options = self._engine.execution_options(controlprefix_write=write)
        committing = False
        try:
            with Session(
                options, expire_on_commit=False, info={"display_name": self.display_name}
            ) as session:
                result = work(session)
                committing = True
                session.commit()
                self._connections.was_reached = True
                self._connections.num_writes += write
                return result
        except ControlPrefixError:
            raise
        except (TypeError, ValueError, AttributeError) as error:  # from reading a cell
            raise DamagedRowError(
                f"a row of the store {self.display_name!r} cannot be read: {error}; run "
                "`controlprefix store verify`, or restore a backup"
            ) from error
        except DBAPIError as error:
            dropped = (
                error.connection_invalidated
                or _is_refused(error)
                or getattr(error.orig, "sqlstate", None) in _RACES
            )
            raise _TransactionError(error, dropped=dropped, committing=committing) from error
        except SQLAlchemyError as error:
            raise _TransactionError(error, dropped=False, committing=committing) from error

    def _explain(self, error: SQLAlchemyError, write: bool, *, unsure: bool) -> StoreError:
        reason, url = redacted(_reason(error), self.url), self.display_name
        if unsure:
            return StoreError(
                f"the connection to the store {url!r} broke while a change was committed: "
                f"{reason}; it is there whole or not at all; look before doing it again"
            )
        verb = "write" if write else "read"
        advice = (
            "check that the server runs and can be reached, and the user's rights"
            if self.is_postgresql
            else "check the path, its permissions, the free space, and who else writes"
        )
        return StoreError(
            f"cannot {verb} the store {url!r}: {reason}; nothing was changed; {advice}"
        )


def _reason(error: Exception) -> str:
    """The first line of what the driver said."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _can_be_repeated(error: BaseException, write: bool) -> bool:
    """Whether nothing can have been committed: until then a transaction changes nothing."""
    if not isinstance(error, _TransactionError) or not error.dropped:
        return False
    return not (write and error.committing)


def _is_refused(error: DBAPIError) -> bool:
    """Whether a server could not be reached at all, as while it restarts."""
    is_driver = type(error.orig).__module__.startswith("psycopg")
    return error.statement is None and is_driver and isinstance(error, OperationalError)
