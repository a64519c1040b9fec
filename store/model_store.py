"""ModelStore: a tenant's prefixes for one frozen model."""

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from controlprefix.errors import UnknownNameError
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.store.database import Database
from controlprefix.store.integrity import PayloadReader
from controlprefix.store.records import (
    StoredVersion,
    VersionInfo,
    check_alias,
    check_key,
    check_kind,
    parse_payload,
)
from controlprefix.store.tables import AliasRow, PayloadRow, PrefixRow, VersionRow
from controlprefix.store.versions import (
    find_prefix,
    find_version,
    is_current,
    select_prefixes,
    unknown_name,
    unknown_version,
    version_info,
)

if TYPE_CHECKING:  # they import torch
    from controlprefix.prefixes import PrefixDecoder
    from controlprefix.store.records import Value


_MAX_KEYS = 10_000  # of a statement, whose parameters databases limit


class ModelStore:
    """What one tenant has stored for one frozen model. Get it with `PrefixStore.for_model`.

    Args:
        database: The tenant's database.
        reader: Decrypts and verifies stored bytes.
        fingerprint: Fingerprint of the model.
    """

    def __init__(self, database: Database, reader: PayloadReader, fingerprint: str) -> None:
        self._database = database
        self._reader = reader
        self._fingerprint = fingerprint

    def fetch(
        self, keys: Iterable[PrefixKey], *, known_hashes: Collection[str] = ()
    ) -> dict[PrefixKey, StoredVersion]:
        """The current versions of those keys that exist, in one round trip per 10,000 keys.

        Args:
            keys: Any number.
            known_hashes: Content hashes whose bytes need not be sent; their `value` is None.

        Raises:
            UnknownNameError: If a key is not valid.
            PrefixFormatError: If stored bytes are damaged.
            StoreKeyError: If they cannot be decrypted.
        """
        keys = list(dict.fromkeys(keys))
        if not keys:
            return {}
        if len(keys) > _MAX_KEYS:
            parts = (keys[i : i + _MAX_KEYS] for i in range(0, len(keys), _MAX_KEYS))
            return {
                key: version
                for part in parts
                for key, version in self.fetch(part, known_hashes=known_hashes).items()
            }
        for key in keys:
            check_key(key)

        def read(session: Session, tenant: int) -> list[Any]:
            needed_bytes = and_(
                PayloadRow.prefix_id == VersionRow.prefix_id,
                PayloadRow.version == VersionRow.version,
                VersionRow.content_hash.not_in(list(known_hashes)),
            )
            query = (
                select_prefixes(tenant, self._fingerprint, keys)
                .join(VersionRow, is_current)
                .outerjoin(PayloadRow, needed_bytes)
                .with_only_columns(
                    PrefixRow.kind,
                    PrefixRow.name,
                    VersionRow.version,
                    VersionRow.content_hash,
                    PayloadRow.payload,
                    PayloadRow.key_id,
                )
            )
            return list(session.execute(query))

        stored: dict[PrefixKey, StoredVersion] = {}
        for kind, name, number, content_hash, payload, key_id in self._database.run(read):
            key, version = PrefixKey(kind, name), StoredVersion(number, content_hash, None)
            if payload is not None or content_hash not in known_hashes:
                version = version._replace(value=self._parse(key, version, payload, key_id))
            stored[key] = version
        return stored

    def get(self, key: PrefixKey, *, version: int | str | None = None) -> StoredVersion:
        """Read one version.

        Args:
            key: Its name.
            version: Its number or an alias; None is the current one.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
            StoreKeyError: If they cannot be decrypted.
        """

        def read(session: Session, tenant: int) -> tuple[StoredVersion, PayloadRow | None]:
            row = find_prefix(session, tenant, key, self._fingerprint)
            number = find_version(session, row, version)
            content = session.get_one(VersionRow, (row.id, number)).content_hash
            return StoredVersion(number, content, None), session.get(PayloadRow, (row.id, number))

        stored, row = self._database.run(read, repeatable_read=True)
        payload, key_id = (None, None) if row is None else (row.payload, row.key_id)
        return stored._replace(value=self._parse(key, stored, payload, key_id))

    def decoder_by_hash(self, content_hash: str) -> "PrefixDecoder | None":
        """The stored decoder with a content hash, if there is one.

        Raises:
            PrefixFormatError: If the stored bytes are damaged.
        """

        def find(session: Session, tenant: int) -> tuple[str, int] | None:
            query = select_prefixes(tenant, self._fingerprint).where(PrefixRow.kind == "decoder")
            query = query.join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
            query = query.where(VersionRow.content_hash == content_hash)
            columns = query.with_only_columns(PrefixRow.name, VersionRow.version).limit(1)
            return session.execute(columns).tuples().one_or_none()

        match = self._database.run(find)
        if match is None:
            return None
        name, version = match
        decoder = self.get(PrefixKey("decoder", name), version=version).value
        from controlprefix.prefixes import PrefixDecoder

        assert isinstance(decoder, PrefixDecoder)
        return decoder

    def names(self, kind: Kind, *, after: str = "", limit: int | None = None) -> list[str]:
        """The names of one kind, sorted by code points.

        Args:
            kind: The kind.
            after: Only names that come after this one.
            limit: Maximum number of names.
        """
        check_kind(kind)
        after = after.partition("\0")[0]  # which PostgreSQL does not take

        def read(session: Session, tenant: int) -> list[str]:
            query = select_prefixes(tenant, self._fingerprint).where(PrefixRow.kind == kind)
            if after:
                query = query.where(PrefixRow.name > after)
            page = query.with_only_columns(PrefixRow.name).order_by(PrefixRow.name).limit(limit)
            return list(session.scalars(page))

        return self._database.run(read)

    def exists(self, key: PrefixKey) -> bool:
        """Whether a name has a prefix for this model.

        Raises:
            UnknownNameError: If the name is not valid.
        """
        check_key(key)

        def read(session: Session, tenant: int) -> bool:
            query = select_prefixes(tenant, self._fingerprint, [key])
            return session.scalar(query.with_only_columns(PrefixRow.id)) is not None

        return self._database.run(read)

    def versions(self, key: PrefixKey) -> list[VersionInfo]:
        """All versions of a name, oldest first.

        Raises:
            UnknownNameError: If there is no such name for this model.
        """

        def read(session: Session, tenant: int) -> list[VersionInfo]:
            row = find_prefix(session, tenant, key, self._fingerprint)
            aliases: dict[int, list[str]] = {}
            for alias in session.scalars(select(AliasRow).where(AliasRow.prefix_id == row.id)):
                aliases.setdefault(alias.version, []).append(alias.alias)
            query = select(VersionRow).where(VersionRow.prefix_id == row.id)
            return [
                version_info(row, version, aliases.get(version.version, ()))
                for version in session.scalars(query.order_by(VersionRow.version))
            ]

        return self._database.run(read)

    def has_versions(self, saved: Mapping[str, int], keys: Collection[PrefixKey]) -> bool:
        """Whether versions that a run stored are still there.

        Args:
            saved: Versions by the names of their keys.
            keys: The keys that the run trained; those that are not among `saved` are left out.
        """
        for key in keys:
            if (version := saved.get(str(key))) is not None:
                try:
                    self.version_info(key, version=version)
                except UnknownNameError:
                    return False
        return True

    def has_content(self, key: PrefixKey, version: int, content_hash: str) -> bool:
        """Whether a version is still there, and has that content."""
        try:
            return self.version_info(key, version=version).content_hash == content_hash
        except UnknownNameError:
            return False

    def current_version(self, key: PrefixKey) -> int:
        """The number of the current version; 0 if there is none."""
        try:
            return self.version_info(key).version
        except UnknownNameError:
            return 0

    def version_info(self, key: PrefixKey, *, version: int | str | None = None) -> VersionInfo:
        """One version without its bytes.

        Args:
            key: Its name.
            version: Its number or an alias; None is the current one.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """

        def read(session: Session, tenant: int) -> VersionInfo:
            row = find_prefix(session, tenant, key, self._fingerprint)
            number = find_version(session, row, version)
            aliases = select(AliasRow.alias).where(AliasRow.prefix_id == row.id)
            own = session.scalars(aliases.where(AliasRow.version == number))
            return version_info(row, session.get_one(VersionRow, (row.id, number)), own.all())

        return self._database.run(read, repeatable_read=True)

    def rollback(self, key: PrefixKey, *, to: int | str) -> None:
        """Make another version current, by its number or an alias; no version is removed.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """

        def write(session: Session, tenant: int) -> None:
            row = find_prefix(session, tenant, key, self._fingerprint, lock=True)
            row.current_version = find_version(session, row, to)

        self._database.run(write, write=True)

    def alias(self, key: PrefixKey, alias: str, *, to: int | str | None) -> None:
        """Give a version an alias such as `canary`, or move it; `to=None` removes the alias.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        check_alias(alias)

        def write(session: Session, tenant: int) -> None:
            row = find_prefix(session, tenant, key, self._fingerprint, lock=True)
            existing = session.get(AliasRow, (row.id, alias))
            if to is None:
                if existing is None:
                    raise unknown_version(session, row, alias)
                session.delete(existing)
                return
            number = find_version(session, row, to)
            if existing is None:
                session.add(
                    AliasRow(prefix_id=row.id, alias=alias, version=number, tenant_id=tenant)
                )
            else:
                existing.version = number

        self._database.run(write, write=True)

    def unknown_name(self, key: PrefixKey) -> UnknownNameError:
        """Make the error for a key that is not stored; it lists what exists."""
        return self._database.run(
            lambda session, tenant: unknown_name(session, tenant, key, self._fingerprint)
        )

    def change_token(self) -> Hashable | None:
        """A token that is equal only while nobody has changed the store; None if unknown."""
        return self._database.change_token()

    def _parse(
        self, key: PrefixKey, stored: StoredVersion, payload: bytes | None, key_id: str | None
    ) -> "Value":
        data = self._reader.read(
            key, self._fingerprint, stored.version, stored.content_hash, payload, key_id
        )
        return parse_payload(key, data, f"{key} version {stored.version}")
