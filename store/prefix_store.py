"""PrefixStore: put, get, versions, rollback and forget, for one tenant.

Every statement goes through `_mine`, which adds the tenant: a handle cannot name
another tenant's rows. Publishing is one transaction, so a version is there whole or not
at all, and so are the parts of one training run.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Self, get_args

from sqlalchemy import Engine, Select, create_engine, delete, event, inspect, select, tuple_
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from controlprefix.errors import PrefixFormatError, StoreError, UnknownNameError, known_names
from controlprefix.prefix import Prefix
from controlprefix.store.tables import SCHEMA_VERSION, Base, PrefixRow, StoreRow, VersionRow

Kind = Literal["task", "attribute", "user"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class PrefixKey(NamedTuple):
    """What a prefix is for: `("user", "ana")`, `("attribute", "tone=warm")`."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A prefix to publish."""

    key: PrefixKey
    prefix: Prefix
    details: Mapping[str, Any] = field(default_factory=dict)


class VersionRef(NamedTuple):
    """A version by its number, and by its content, which no other content shares."""

    version: int
    content_hash: str


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """A prefix as the store has it."""

    prefix: Prefix
    ref: VersionRef


@dataclass(frozen=True, slots=True)
class PrefixInfo:
    """A name that has a prefix, and the model it is for."""

    key: PrefixKey
    model_name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What is known of one version without reading its numbers."""

    kind: Kind
    name: str
    version: int
    current: bool
    content_hash: str
    size_bytes: int
    num_slots: int
    dtype: str
    created_at: datetime
    details: Mapping[str, Any]


class PrefixStore:
    """The prefixes of one tenant in one database, for one frozen model at a time.

    Args:
        url: Of SQLAlchemy: `sqlite:///prefixes.db`, `sqlite://` (in memory),
            `postgresql+psycopg://…`.
        tenant: Whose data it is.

    Raises:
        StoreError: If the database cannot be opened or has a later schema.
    """

    def __init__(self, url: str, *, tenant: str = "default") -> None:
        _check_name("tenant", tenant)
        self.tenant = tenant
        self.url = url
        try:
            self._engine = _engine(url)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"cannot open the store {_without_password(url)!r}: {error}; install that package"
            ) from error
        except (ArgumentError, ValueError) as error:
            reason = str(error).splitlines()[0].replace(url, "it")
            raise StoreError(
                f"cannot open the store {_without_password(url)!r}: {reason}; give an SQLAlchemy "
                "URL such as sqlite:///prefixes.db"
            ) from error
        with self._session() as session:  # a store that is read only can still be read
            prepared = _is_prepared(session)
        if not prepared:
            with self._session(write=True) as session:
                _prepare(session)

    def require_writable(self, keys: Iterable[PrefixKey]) -> None:
        """Find out before long work whether its result could be stored.

        Raises:
            UnknownNameError: If a name cannot be one.
            StoreError: If the database cannot be written.
        """
        for key in keys:
            _check_key(key)
        with self._session(write=True) as session:
            session.connection()

    def put(self, versions: Sequence[NewVersion]) -> list[int]:
        """Publish versions, all or none, and make them current.

        Returns:
            The version numbers, counted from 1 for each name.

        Raises:
            StoreError: If the database cannot be written; then nothing is changed.
            PrefixFormatError: If a prefix holds NaN or infinite numbers.
        """
        payloads = [(new, new.prefix.to_bytes()) for new in versions]
        with self._session(write=True) as session:
            return [self._put(session, new, payload) for new, payload in payloads]

    def _put(self, session: Session, new: NewVersion, payload: bytes) -> int:
        _check_key(new.key)
        geometry = new.prefix.geometry
        row = session.scalars(self._mine(geometry.fingerprint, [new.key])).one_or_none()
        if row is None:
            row = PrefixRow(
                tenant=self.tenant,
                kind=new.key.kind,
                name=new.key.name,
                fingerprint=geometry.fingerprint,
                model_name=geometry.model_name,
                current_version=0,
                newest_version=0,
            )
            session.add(row)
            session.flush()
        row.newest_version += 1
        row.current_version = row.newest_version
        session.add(
            VersionRow(
                prefix_id=row.id,
                version=row.newest_version,
                payload=payload,
                content_hash=_content_hash(payload),
                size_bytes=len(payload),
                num_slots=new.prefix.num_slots,
                dtype=str(new.prefix.dtype).removeprefix("torch."),
                created_at=datetime.now(UTC),
                details=dict(new.details),
            )
        )
        return row.newest_version

    def current(self, keys: Iterable[PrefixKey], fingerprint: str) -> dict[PrefixKey, VersionRef]:
        """The current version of each key that exists, in one query."""
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        for key in wanted:
            _check_key(key)
        is_current = (VersionRow.prefix_id == PrefixRow.id) & (
            VersionRow.version == PrefixRow.current_version
        )
        query = self._mine(fingerprint, wanted).join(VersionRow, is_current)
        with self._session() as session:
            rows = session.execute(query.add_columns(VersionRow.version, VersionRow.content_hash))
            return {_key(row): VersionRef(version, content) for row, version, content in rows}

    def get(self, key: PrefixKey, fingerprint: str, *, version: int | None = None) -> StoredPrefix:
        """Read one version, the current one unless told, and check it against its hash.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        with self._session() as session:
            row = self._row(session, key, fingerprint)
            number = row.current_version if version is None else version
            stored = session.get(VersionRow, (row.id, number))
            if stored is None:
                raise self._no_version(session, row, number)
            payload, claimed = stored.payload, stored.content_hash
            others = [v for v in self._version_numbers(session, row) if v != number]
        name = f"{key} version {number}"
        if _content_hash(payload) != claimed:
            way_out = f"roll back to version {others[-1]}" if others else "train it again"
            raise PrefixFormatError(f"{name} is damaged in the store: wrong hash; {way_out}")
        return StoredPrefix(Prefix.from_bytes(payload, name=name), VersionRef(number, claimed))

    def prefixes(self, kind: Kind | None = None) -> list[PrefixInfo]:
        """What the tenant has, for all models, sorted by kind and name."""
        query = self._mine(None).order_by(PrefixRow.kind, PrefixRow.name, PrefixRow.model_name)
        if kind is not None:
            query = query.where(PrefixRow.kind == kind)
        with self._session() as session:
            return [
                PrefixInfo(_key(row), row.model_name, row.fingerprint)
                for row in session.scalars(query)
            ]

    def names(self, kind: Kind, fingerprint: str) -> list[str]:
        """The names of one kind that this model has prefixes for, sorted."""
        _check_kind(kind)
        with self._session() as session:
            query = self._mine(fingerprint).where(PrefixRow.kind == kind)
            return sorted(row.name for row in session.scalars(query))

    def versions(self, key: PrefixKey, fingerprint: str) -> list[VersionInfo]:
        """All versions of a name, oldest first.

        Raises:
            UnknownNameError: If there is no such name for this model.
        """
        with self._session() as session:
            row = self._row(session, key, fingerprint)
            query = (
                select(VersionRow)
                .where(VersionRow.prefix_id == row.id)
                .order_by(VersionRow.version)
            )
            return [
                VersionInfo(
                    kind=key.kind,
                    name=key.name,
                    version=found.version,
                    current=found.version == row.current_version,
                    content_hash=found.content_hash,
                    size_bytes=found.size_bytes,
                    num_slots=found.num_slots,
                    dtype=found.dtype,
                    created_at=found.created_at,
                    details=found.details,
                )
                for found in session.scalars(query)
            ]

    def rollback(self, key: PrefixKey, fingerprint: str, *, to: int) -> None:
        """Make an earlier (or later) version current. No version is removed.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        with self._session(write=True) as session:
            row = self._row(session, key, fingerprint)
            if to not in self._version_numbers(session, row):
                raise self._no_version(session, row, to)
            row.current_version = to

    def forget(self, key: PrefixKey) -> int:
        """Remove every version of a name, for every model.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If there is no such name.
        """
        _check_key(key)
        with self._session(write=True) as session:
            rows = list(session.scalars(self._mine(None, [key])))
            if not rows:
                raise self._unknown(session, key, None)
            removed = sum(len(self._version_numbers(session, row)) for row in rows)
            ids = [row.id for row in rows]
            session.execute(delete(VersionRow).where(VersionRow.prefix_id.in_(ids)))
            session.execute(delete(PrefixRow).where(PrefixRow.id.in_(ids)))
            return removed

    def unknown(self, key: PrefixKey, fingerprint: str | None) -> UnknownNameError:
        """The error for a key without a prefix: says what exists, and for which models it does."""
        with self._session() as session:
            return self._unknown(session, key, fingerprint)

    def close(self) -> None:
        """Give the database connections back."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mine(self, fingerprint: str | None, keys: Sequence[PrefixKey] = ()) -> Select[PrefixRow]:
        """The one place where rows are chosen: of this tenant only."""
        query = select(PrefixRow).where(PrefixRow.tenant == self.tenant)
        if fingerprint is not None:
            query = query.where(PrefixRow.fingerprint == fingerprint)
        if keys:
            query = query.where(
                tuple_(PrefixRow.kind, PrefixRow.name).in_([tuple(k) for k in keys])
            )
        return query

    def _row(self, session: Session, key: PrefixKey, fingerprint: str) -> PrefixRow:
        _check_key(key)
        row = session.scalars(self._mine(fingerprint, [key])).one_or_none()
        if row is None:
            raise self._unknown(session, key, fingerprint)
        return row

    def _unknown(
        self, session: Session, key: PrefixKey, fingerprint: str | None
    ) -> UnknownNameError:
        rows = list(session.scalars(self._mine(None).where(PrefixRow.kind == key.kind)))
        elsewhere = sorted(row.model_name for row in rows if row.name == key.name)
        if elsewhere:
            return UnknownNameError(
                f"{key} has no prefix for this model, only for other weights "
                f"({', '.join(elsewhere)}); train it on this model, or load that one"
            )
        known = {row.name for row in rows if fingerprint in (None, row.fingerprint)}
        way_out = "" if known else "; train or enroll one, or check the store and the tenant"
        names = known_names(key.name, known)
        return UnknownNameError(f"no {key.kind} {key.name!r} in the store; known: {names}{way_out}")

    @staticmethod
    def _version_numbers(session: Session, row: PrefixRow) -> list[int]:
        query = select(VersionRow.version).where(VersionRow.prefix_id == row.id)
        return sorted(session.scalars(query))

    def _no_version(self, session: Session, row: PrefixRow, version: int) -> UnknownNameError:
        existing = ", ".join(map(str, self._version_numbers(session, row)))
        return UnknownNameError(f"{_key(row)} has no version {version}; it has: {existing}")

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[Session]:
        """A transaction: committed at the end, or rolled back whole."""
        try:
            with Session(self._engine.execution_options(controlprefix_write=write)) as session:
                with session.begin():
                    yield session
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            doing = "write" if write else "read"
            raise StoreError(
                f"cannot {doing} the store {_without_password(self.url)!r}: {reason}; nothing was "
                "changed; check the path, its permissions, the free space, and who else writes"
            ) from error


def _engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    # A database in memory lives in its connection: one, that threads take in turn.
    in_memory = make_url(url).database in (None, "", ":memory:")
    one_connection = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    engine = create_engine(
        url,
        connect_args={"timeout": 30.0, "check_same_thread": False},
        **(one_connection if in_memory else {}),
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


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.rpartition("@")[2]


def _is_prepared(session: Session) -> bool:
    """Whether the tables are there.

    Raises:
        StoreError: If a later version of this library made them.
    """
    if not inspect(session.connection()).has_table(StoreRow.__tablename__):
        return False
    found = session.scalars(select(StoreRow.schema_version)).one()
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the store has schema {found}; this version reads up to {SCHEMA_VERSION}, so upgrade "
            "controlprefix"
        )
    return True


def _prepare(session: Session) -> None:
    if not _is_prepared(session):  # another process may have been first
        Base.metadata.create_all(session.connection())
        session.add(StoreRow(schema_version=SCHEMA_VERSION))


def _key(row: PrefixRow) -> PrefixKey:
    kind: Any = row.kind
    return PrefixKey(kind, row.name)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}; a prefix is for a: {', '.join(KINDS)}")


def _check_key(key: PrefixKey) -> None:
    _check_kind(key.kind)
    _check_name(key.kind, key.name)
    if key.kind == "attribute" and not all(key.name.partition("=")):
        raise UnknownNameError(
            f"attribute name {key.name!r} does not name a label; write it as attribute=label, "
            "such as 'formality=formal'"
        )


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise UnknownNameError(f"{what} name is a {type(name).__name__}; give a text")
    if not (0 < len(name) <= 255) or not name.isprintable():
        raise UnknownNameError(f"{what} name {name[:40]!r} is not 1 to 255 printable characters")


def _content_hash(payload: bytes) -> str:
    return f"sha256:{hashlib.sha256(payload).hexdigest()}"
