"""PrefixStore: the prefixes of one tenant in one database.

Publishing is one transaction, so a version is there whole or not at all, and so are all
prefixes of one training run.
"""

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from controlprefix.errors import ForgottenError, StoreError, UnknownNameError
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.store import api_keys, version_links, versions
from controlprefix.store.api_keys import ApiKeyInfo
from controlprefix.store.database import Database
from controlprefix.store.encryption import EncryptionKeys, TenantCipher
from controlprefix.store.integrity import PayloadReader
from controlprefix.store.jobs import JobMethods
from controlprefix.store.key_rotation import rotate_keys
from controlprefix.store.model_store import ModelStore
from controlprefix.store.records import (
    NewVersion,
    PrefixInfo,
    StoreStats,
    check_key,
    check_name,
    check_value_fits,
)
from controlprefix.store.removal import RemovalMethods
from controlprefix.store.tables import AuditRow, PrefixRow, VersionRow
from controlprefix.store.transfer import export_tenant, import_tenant
from controlprefix.store.user_data import UserData
from controlprefix.store.versions import key_of, select_prefixes

_log = logging.getLogger(__name__)


class PrefixStore(UserData, RemovalMethods, JobMethods):
    """The prefixes of one tenant in one database, for all models.

    Args:
        url: The path of an SQLite file, or an SQLAlchemy URL: `sqlite:///prefixes.db`,
            `sqlite://` (in memory), `postgresql://…`.
        tenant: The tenant.
        encryption_keys: Keys to encrypt stored bytes with, such as `JsonEncryptionKeys`.
        pool_size: Connections kept open to a server.
        create: Create an SQLite file that does not exist; otherwise it reads as an empty store.

    Attributes:
        tenant: As given.
        url: SQLAlchemy URL of the open database.
        display_name: How messages name the store: a path, or a URL without password.

    Raises:
        StoreError: If the database cannot be opened or has another schema.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        tenant: str = "default",
        encryption_keys: EncryptionKeys | None = None,
        pool_size: int = 5,
        create: bool = True,
    ) -> None:
        if not isinstance(url, (str, os.PathLike)):
            raise StoreError(f"the store is {url!r}; give a path or an SQLAlchemy URL")
        database = Database(os.fspath(url), tenant, pool_size=pool_size, create=create)
        self.url, self.display_name = database.url, database.display_name
        self._encryption_keys = encryption_keys
        self._use(database)
        database.create_tables()

    def _use(self, database: Database) -> None:
        check_name("tenant", database.tenant)
        self.tenant = database.tenant
        self._database = database
        self._cipher = TenantCipher(self.tenant, self._encryption_keys)
        self._reader = PayloadReader(database, self._cipher)

    def for_tenant(self, tenant: str) -> "PrefixStore":
        """The store of another tenant, on the same connections; `close` closes them for all.

        Raises:
            UnknownNameError: If a tenant cannot have that name.
        """
        other = copy.copy(self)
        other._use(self._database.for_tenant(tenant))
        return other

    @property
    def is_missing(self) -> bool:
        """Whether the file does not exist: with `create=False` it reads as an empty store."""
        return self._database.is_missing

    @property
    def ignores_row_security(self) -> bool:
        """Whether it is on PostgreSQL with a role for which tenants are not held apart."""
        return self._database.ignores_row_security

    def for_model(self, fingerprint: str) -> ModelStore:
        """What is stored for the model with this fingerprint."""
        return ModelStore(self._database, self._reader, fingerprint)

    # --- versions ----------------------------------------------------------------------------

    def require_writable(self, keys: Iterable[PrefixKey]) -> None:
        """Check before long work that its results can be stored.

        Raises:
            UnknownNameError: If a key is not valid.
            StoreError: If the database cannot be written.
        """
        for key in keys:
            check_key(key)

        def try_writing(session: Session, tenant: int) -> None:
            attempt = session.begin_nested()
            key = {"kind": "task", "name": "", "action": "check", "num_versions": 0}
            session.add(AuditRow(tenant_id=tenant, at=datetime.now(UTC), **key))
            session.flush()  # a read-only disk or server refuses the statement
            attempt.rollback()

        self._database.run(try_writing, write=True)

    def put(
        self, new_versions: Sequence[NewVersion], *, removal_number: int | None = None
    ) -> list[int]:
        """Publish versions, all or none, and make them current.

        Args:
            new_versions: What to publish.
            removal_number: `last_removal_number` from before the users' texts were read. A user
                who was forgotten after it is not stored again, and counts among a version's
                sources as forgotten.

        Returns:
            The version numbers, counted from 1 for each name.

        Raises:
            StoreError: If the database cannot be written; then nothing is changed.
            VersionConflictError: If a version to be replaced is no longer current.
            ForgottenError: If a user to be stored was forgotten after that entry.
            PrefixFormatError: If a prefix holds NaN or infinite values.
        """
        for new in new_versions:
            check_key(new.key)
            check_value_fits(new.key, new.value)
            try:
                json.dumps(dict(new.details), allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise StoreError(f"the details of {new.key} are not JSON: {error}") from error
        payloads = [new.value.to_bytes(new.dtype) for new in new_versions]

        def publish(session: Session, tenant: int) -> dict[int, int]:
            forgotten: set[str] = set()
            if removal_number is not None:
                self._database.lock_users(session, tenant, shared=True)
                forgotten = version_links.forgotten_users(session, tenant, removal_number)
            # In the order of keys, so that writers that lock the same rows cannot deadlock.
            order = sorted(range(len(new_versions)), key=lambda i: new_versions[i].key)
            return {
                i: versions.publish(
                    session,
                    tenant,
                    self._database,
                    self._cipher,
                    new_versions[i],
                    payloads[i],
                    forgotten,
                )
                for i in order
            }

        numbers = self._database.run(publish, write=True)
        for i, new in enumerate(new_versions):
            _log.info("tenant %s: published %s version %d", self.tenant, new.key, numbers[i])
        return [numbers[i] for i in range(len(new_versions))]

    def put_unless_forgotten(
        self, new_versions: Sequence[NewVersion], removal_number: int
    ) -> dict[PrefixKey, int]:
        """As `put`, without users who were forgotten after `removal_number`.

        Returns:
            The version number of each name that was published.

        Raises:
            ForgottenError: If all of them are users who were forgotten.
            StoreError, PrefixFormatError: As `put`.
        """
        while True:
            try:
                numbers = self.put(new_versions, removal_number=removal_number)
            except ForgottenError as error:
                gone = PrefixKey("user", error.user)
                new_versions = [new for new in new_versions if new.key != gone]
                if not new_versions:
                    raise
                _log.warning("a user was forgotten meanwhile, and is not stored")
                continue
            return {new.key: number for new, number in zip(new_versions, numbers, strict=True)}

    def prefixes(self, kind: Kind | None = None, name: str | None = None) -> list[PrefixInfo]:
        """What is stored, for all models, sorted by kind and name.

        Args:
            kind, name: Only those of that kind, and of that name.
        """

        def read(session: Session, tenant: int) -> list[PrefixInfo]:
            query = (
                select_prefixes(tenant, None)
                .join(VersionRow, versions.is_current)
                .order_by(PrefixRow.kind, PrefixRow.name, PrefixRow.model_name)
                .add_columns(VersionRow)
            )
            if kind is not None:
                query = query.where(PrefixRow.kind == kind)
            if name is not None:
                query = query.where(PrefixRow.name == name)
            return [
                PrefixInfo(
                    key_of(row),
                    row.model_name,
                    row.fingerprint,
                    versions.version_info(row, version, ()),
                )
                for row, version in session.execute(query)
            ]

        return self._database.run(read)

    def unknown_name(self, key: PrefixKey) -> UnknownNameError:
        """Make the error for a key that is not stored for any model; it lists what exists."""
        return self._database.run(
            lambda session, tenant: versions.unknown_name(session, tenant, key, None)
        )

    # --- API keys ----------------------------------------------------------------------------

    def create_api_key(self, name: str) -> str:
        """Create an API key for a server; it cannot be read again later.

        Raises:
            StoreError: If there is one of that name.
        """
        check_name("API key", name)
        return self._database.run(
            lambda session, tenant: api_keys.create(session, tenant, self.tenant, name), write=True
        )

    def name_of_api_key(self, api_key: str) -> str | None:
        """The name of an API key, if it is one of this tenant's."""
        return self._database.run(
            lambda session, tenant: api_keys.name_of(session, tenant, api_key)
        )

    def api_keys(self) -> list[ApiKeyInfo]:
        """All API keys by name, oldest first."""
        return self._database.run(api_keys.list_all)

    def revoke_api_key(self, name: str) -> None:
        """Remove an API key.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        self._database.run(
            lambda session, tenant: api_keys.revoke(session, tenant, name), write=True
        )

    # --- the database as a whole -------------------------------------------------------------

    def verify(self) -> Iterator[tuple[PrefixKey, int, bool]]:
        """Read every version; yields its key, its number, and whether it is intact.

        A version that cannot be decrypted with the given keys is not intact.

        Raises:
            StoreKeyError: If the tenant's own key cannot be used.
        """
        self._cipher.require_current_key()
        return self._reader.verify_all()

    def purge(self) -> None:
        """Overwrite what was removed or forgotten, for all tenants; others wait meanwhile.

        An SQLite file without write-ahead log never keeps it. PostgreSQL does, in tables until
        they are rewritten, and in segments of its log until these are recycled, archived ones
        and backups aside.

        Raises:
            StoreError: If the database does not allow it.
        """
        self._database.purge()

    def rotate_keys(self) -> int:
        """Re-encrypt everything not encrypted with the current key; returns the versions.

        Readers and writers go on meanwhile, as long as the keys given contain the old one
        too. Without a current key, everything is decrypted.

        Raises:
            StoreKeyError: If a key is missing.
        """
        return rotate_keys(self._database, self._cipher)

    def export_to(self, path: str | Path) -> int:
        """Write all versions to one file, decrypted; returns their number.

        Raises:
            PrefixFormatError: If stored bytes are damaged; then there is no file.
            StoreError: If the file cannot be written.
        """
        return export_tenant(self._database, self._cipher, Path(path))

    def import_from(self, path: str | Path) -> int:
        """Add all versions of an exported file, or none; returns their number.

        Raises:
            PrefixFormatError: If the file is damaged, or not an export.
            StoreError: If a name in it exists already.
        """
        return import_tenant(self._database, self._cipher, Path(path))

    def stats(self) -> StoreStats:
        """How much is stored."""

        def read(session: Session, tenant: int) -> StoreStats:
            query = select_prefixes(tenant, None).with_only_columns(PrefixRow.kind, func.count())
            sizes = select(func.count(), func.coalesce(func.sum(VersionRow.size_bytes), 0))
            num_versions, size = session.execute(sizes.where(VersionRow.tenant_id == tenant)).one()
            counts = session.execute(query.group_by(PrefixRow.kind))
            return StoreStats({row[0]: row[1] for row in counts}, num_versions, int(size))

        return self._database.run(read)

    def check_health(self) -> None:
        """Check that the database answers.

        Raises:
            StoreError: If it does not.
        """
        self._database.check()

    def close(self) -> None:
        """Close the database connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
