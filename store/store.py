"""PrefixStore: put, fetch, versions, aliases, rollback, forget and prune, for one tenant.

Every statement chooses rows through `_mine` or by the number of a row found there, and the
database is told whose transaction it is (`database.py`). Publishing is one transaction, so
a version is there whole or not at all, and so are the parts of one training run.
"""

import hashlib
import logging
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Select, and_, delete, func, or_, select
from sqlalchemy.orm import Session

from controlprefix.errors import (
    PrefixFormatError,
    StoreKeyError,
    UnknownNameError,
    VersionConflictError,
    known_names,
)
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.user_code import CodedPrefix, PrefixDecoder, code_in
from controlprefix.store import api_keys, codes, profiles
from controlprefix.store.api_keys import ApiKeyInfo
from controlprefix.store.database import Database
from controlprefix.store.encryption import KeyProvider, Sealer
from controlprefix.store.profiles import Similar
from controlprefix.store.records import (
    AuditEntry,
    Fetched,
    Kind,
    NewVersion,
    PrefixInfo,
    PrefixKey,
    StoredPrefix,
    StoreStats,
    VersionInfo,
    VersionRef,
    check_alias,
    check_is_for,
    check_key,
    check_kind,
    check_name,
    place_of,
)
from controlprefix.store.tables import (
    AliasRow,
    AuditRow,
    PayloadRow,
    PrefixRow,
    SampleRow,
    VersionRow,
)
from controlprefix.store.transfer import export_tenant, import_tenant

_log = logging.getLogger(__name__)

_MAX_LOOKED_THROUGH = 1000  # names, to say which exist: a store may have millions
_MAX_DECODERS = 4  # kept in memory


class PrefixStore:
    """The prefixes of one tenant in one database.

    Args:
        url: Of SQLAlchemy: `sqlite:///prefixes.db`, `sqlite://` (in memory),
            `postgresql+psycopg://…`.
        tenant: Whose data it is.
        keys: To encrypt stored bytes with; see `controlprefix.store.encryption`.
        exact: Whether what others publish on PostgreSQL must be seen at once, at a question a
            batch; if not, it is seen a moment after (two seconds where a connection breaks
            silently), at none. SQLite is always exact.
        pool_size: Connections kept open to a server.

    Raises:
        StoreError: If the database cannot be opened or has another schema.
    """

    def __init__(
        self,
        url: str,
        *,
        tenant: str = "default",
        keys: KeyProvider | None = None,
        exact: bool = True,
        pool_size: int = 5,
    ) -> None:
        check_name("tenant", tenant)
        self._sealer = Sealer(tenant, keys)
        self.tenant = tenant
        self.url = url
        self._database = Database(url, tenant, exact=exact, pool_size=pool_size)
        self._database.prepare()
        self._decoders: dict[str, PrefixDecoder] = {}

    def require_writable(self, keys: Iterable[PrefixKey]) -> None:
        """Find out before long work whether its result could be stored.

        Raises:
            UnknownNameError: If a name cannot be one.
            StoreError: If the database cannot be written.
        """
        for key in keys:
            check_key(key)
        self._database.run(lambda session, tenant: None, write=True)

    def put(self, versions: Sequence[NewVersion]) -> list[int]:
        """Publish versions, all or none, and make them current.

        Returns:
            The version numbers, counted from 1 for each name.

        Raises:
            StoreError: If the database cannot be written; then nothing is changed.
            VersionConflictError: If a version to be replaced is no longer current.
            PrefixFormatError: If a prefix holds NaN or infinite numbers.
        """
        for new in versions:
            check_key(new.key)
            check_is_for(new.key, new.prefix)
        payloads = [new.prefix.to_bytes(new.dtype) for new in versions]

        def publish(session: Session, tenant: int) -> dict[int, int]:
            # In one order everywhere: writers that lock the same rows must not meet crosswise.
            order = sorted(range(len(versions)), key=lambda i: versions[i].key)
            return {i: self._put(session, tenant, versions[i], payloads[i]) for i in order}

        numbers = self._database.run(publish, write=True)
        for i, new in enumerate(versions):
            _log.info("tenant %s: published %s version %d", self.tenant, new.key, numbers[i])
        return [numbers[i] for i in range(len(versions))]

    def _put(self, session: Session, tenant: int, new: NewVersion, payload: bytes) -> int:
        geometry = new.prefix.geometry
        session.execute(
            self._database.insert(
                PrefixRow,
                tenant_id=tenant,
                kind=new.key.kind,
                name=new.key.name,
                fingerprint=geometry.fingerprint,
                model_name=geometry.model_name,
                current_version=0,
                newest_version=0,
            )
        )
        # The lock makes the next writer of this name wait for the end of this one.
        query = self._mine(tenant, geometry.fingerprint, [new.key]).with_for_update()
        row = session.scalars(query).one()
        if new.replaces not in (None, row.current_version):
            raise VersionConflictError(
                f"{new.key} is at version {row.current_version}, not at {new.replaces}, which this "
                "was to replace: someone else published; read it again and decide"
            )
        parent = row.current_version or None
        row.newest_version += 1
        row.current_version = row.newest_version
        mine = {"prefix_id": row.id, "version": row.newest_version, "tenant_id": tenant}
        session.add(
            VersionRow(
                **mine,
                parent_version=parent,
                content_hash=_content_hash(payload),
                size_bytes=len(payload),
                num_slots=new.prefix.num_slots,
                dtype=new.dtype or _dtype_name(new.prefix),
                created_at=datetime.now(UTC),
                details=dict(new.details),
            )
        )
        session.flush()  # what follows refers to it
        if isinstance(new.prefix, CodedPrefix):
            decoder = new.prefix.code.decoder
            codes.tie_to_decoder(
                session, tenant, geometry.fingerprint, decoder, row.id, row.newest_version
            )
        codes.note_sources(session, tenant, row.id, row.newest_version, new.sources)
        place = place_of(new.key, geometry.fingerprint, row.newest_version)
        stored, key_id = self._sealer.seal(payload, place)
        session.add(PayloadRow(**mine, payload=stored, key_id=key_id))
        return row.newest_version

    def fetch(
        self, keys: Iterable[PrefixKey], fingerprint: str, *, have: Collection[str] = ()
    ) -> dict[PrefixKey, Fetched]:
        """What is current for each key that exists, in one round trip for all.

        Args:
            keys: Any number.
            fingerprint: Of the model.
            have: Content hashes whose bytes need not be sent.

        Raises:
            PrefixFormatError: If stored bytes are damaged.
        """
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            return {}
        for key in wanted:
            check_key(key)

        def read(session: Session, tenant: int) -> list[Any]:
            is_current = and_(
                VersionRow.prefix_id == PrefixRow.id,
                VersionRow.version == PrefixRow.current_version,
            )
            its_bytes = and_(
                PayloadRow.prefix_id == VersionRow.prefix_id,
                PayloadRow.version == VersionRow.version,
                VersionRow.content_hash.not_in(list(have)),
            )
            query = (
                self._mine(tenant, fingerprint, wanted)
                .join(VersionRow, is_current)
                .outerjoin(PayloadRow, its_bytes)
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

        found = {}
        for kind, name, version, claimed, payload, key_id in self._database.run(read):
            key, ref = PrefixKey(kind, name), VersionRef(version, claimed)
            if payload is None and claimed not in have:
                raise self._damaged(key, fingerprint, version, "its bytes are gone")
            prefix = None if payload is None else self._read(key, fingerprint, ref, payload, key_id)
            found[key] = Fetched(ref, prefix)
        return found

    def change_token(self) -> Hashable | None:
        """Something that is equal only while nobody has changed the store; None: not known."""
        return self._database.change_token()

    def get(
        self, key: PrefixKey, fingerprint: str, *, version: int | str | None = None
    ) -> StoredPrefix:
        """Read one version, by its number or an alias; the current one unless told.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        ref, stored, key_id = self._stored(key, fingerprint, version)
        return StoredPrefix(self._read(key, fingerprint, ref, stored, key_id), ref)

    def decoder(
        self, name: str, fingerprint: str, *, version: int | str | None = None
    ) -> PrefixDecoder:
        """Read a decoder of user codes; the current version unless told.

        Raises:
            UnknownNameError, PrefixFormatError: As `get`.
        """
        key = PrefixKey("decoder", name)
        ref, stored, key_id = self._stored(key, fingerprint, version)
        known = self._decoders.get(ref.content_hash)
        if known is None:
            data = self._unsealed(key, fingerprint, ref, stored, key_id)
            known = PrefixDecoder.from_bytes(data, name=f"{key} version {ref.version}")
            while len(self._decoders) >= _MAX_DECODERS:
                self._decoders.pop(next(iter(self._decoders)), None)
            self._decoders[ref.content_hash] = known
        return known

    def _stored(
        self, key: PrefixKey, fingerprint: str, version: int | str | None
    ) -> tuple[VersionRef, bytes, str | None]:
        def read(session: Session, tenant: int) -> tuple[VersionRef, PayloadRow | None]:
            row = self._row(session, tenant, key, fingerprint)
            number = row.current_version
            if version is not None:
                number = self._number(session, row, version)
            stored = session.get_one(VersionRow, (row.id, number))
            ref = VersionRef(number, stored.content_hash)
            return ref, session.get(PayloadRow, (row.id, number))

        ref, row = self._database.run(read)
        if row is None:
            raise self._damaged(key, fingerprint, ref.version, "its bytes are gone")
        return ref, row.payload, row.key_id

    def prefixes(self, kind: Kind | None = None) -> list[PrefixInfo]:
        """What the tenant has, for all models, sorted by kind and name."""

        def read(session: Session, tenant: int) -> list[PrefixInfo]:
            query = (
                self._mine(tenant, None)
                .join(
                    VersionRow,
                    and_(
                        VersionRow.prefix_id == PrefixRow.id,
                        VersionRow.version == PrefixRow.current_version,
                    ),
                )
                .order_by(PrefixRow.kind, PrefixRow.name, PrefixRow.model_name)
                .add_columns(VersionRow)
            )
            if kind is not None:
                query = query.where(PrefixRow.kind == kind)
            return [
                PrefixInfo(_key(row), row.model_name, row.fingerprint, _info(row, version, ()))
                for row, version in session.execute(query)
            ]

        return self._database.run(read)

    def names(self, kind: Kind, fingerprint: str) -> list[str]:
        """The names of one kind that this model has prefixes for, sorted."""
        check_kind(kind)

        def read(session: Session, tenant: int) -> list[str]:
            query = self._mine(tenant, fingerprint).where(PrefixRow.kind == kind)
            return sorted(session.scalars(query.with_only_columns(PrefixRow.name)))

        return self._database.run(read)

    def versions(self, key: PrefixKey, fingerprint: str) -> list[VersionInfo]:
        """All versions of a name, oldest first.

        Raises:
            UnknownNameError: If there is no such name for this model.
        """

        def read(session: Session, tenant: int) -> list[VersionInfo]:
            row = self._row(session, tenant, key, fingerprint)
            aliases: dict[int, list[str]] = {}
            for alias in session.scalars(select(AliasRow).where(AliasRow.prefix_id == row.id)):
                aliases.setdefault(alias.version, []).append(alias.alias)
            query = select(VersionRow).where(VersionRow.prefix_id == row.id)
            return [
                _info(row, found, sorted(aliases.get(found.version, ())))
                for found in session.scalars(query.order_by(VersionRow.version))
            ]

        return self._database.run(read)

    def rollback(self, key: PrefixKey, fingerprint: str, *, to: int | str) -> None:
        """Make another version, by its number or an alias, current. No version is removed.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """

        def write(session: Session, tenant: int) -> None:
            row = self._row(session, tenant, key, fingerprint, lock=True)
            row.current_version = self._number(session, row, to)

        self._database.run(write, write=True)

    def alias(self, key: PrefixKey, fingerprint: str, alias: str, *, to: int | str | None) -> None:
        """Name a version, such as `canary`, or move that name; `to=None` takes it away.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        check_alias(alias)

        def write(session: Session, tenant: int) -> None:
            row = self._row(session, tenant, key, fingerprint, lock=True)
            known = session.get(AliasRow, (row.id, alias))
            if to is None:
                if known is None:
                    raise self._no_version(session, row, alias)
                session.delete(known)
                return
            number = self._number(session, row, to)
            if known is None:
                session.add(
                    AliasRow(prefix_id=row.id, alias=alias, version=number, tenant_id=tenant)
                )
            else:
                known.version = number

        self._database.run(write, write=True)

    def forget(self, key: PrefixKey) -> int:
        """Remove all of a name, for all models: versions, aliases, a user's texts and profile.

        The audit says so. Decoders that were learned from the user too are marked.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If there is no such name.
            StoreError: If it is a decoder that codes need.
        """
        check_key(key)

        def write(session: Session, tenant: int) -> int:
            rows = list(session.scalars(self._mine(tenant, None, [key]).with_for_update()))
            known = bool(rows)
            if key.kind == "user":
                samples = and_(SampleRow.tenant_id == tenant, SampleRow.user_name == key.name)
                known = known or profiles.is_kept(session, tenant, key.name)
                known = known or bool(session.scalar(select(SampleRow.id).where(samples).limit(1)))
                known = bool(codes.mark_forgotten(session, tenant, key.name)) or known
                profiles.forget(session, tenant, key.name)
                session.execute(delete(SampleRow).where(samples))
            if not known:
                raise self._unknown(session, tenant, key, None)
            removed = sum(len(self._version_numbers(session, row)) for row in rows)
            ids = [row.id for row in rows]
            codes.require_unused(session, ids, str(key))
            for table in (*codes.TIES, AliasRow, PayloadRow, VersionRow):
                session.execute(delete(table).where(table.prefix_id.in_(ids)))
            session.execute(delete(PrefixRow).where(PrefixRow.id.in_(ids)))
            self._note(session, tenant, "forget", key, removed)
            return removed

        removed = self._database.run(write, write=True)
        _log.info("tenant %s: forgot %s, %d versions", self.tenant, key, removed)
        return removed

    def keep_samples(self, user: str, texts: Sequence[str]) -> None:
        """Keep texts of a user, to train on later. Nothing else does; `forget` removes them."""
        check_name("user", user)
        now = datetime.now(UTC)

        def write(session: Session, tenant: int) -> None:
            for text in texts:
                sealed, key_id = self._sealer.seal(text.encode(), _sample_of(user))
                session.add(
                    SampleRow(
                        tenant_id=tenant,
                        user_name=user,
                        key_id=key_id,
                        text=sealed,
                        created_at=now,
                    )
                )

        self._database.run(write, write=True)

    def samples(self, user: str) -> list[str]:
        """The texts of a user that were kept, oldest first."""

        def read(session: Session, tenant: int) -> list[SampleRow]:
            query = select(SampleRow).where(
                SampleRow.tenant_id == tenant, SampleRow.user_name == user
            )
            return list(session.scalars(query.order_by(SampleRow.id)))

        place = _sample_of(user)
        rows = self._database.run(read)
        return [self._sealer.unseal(row.text, row.key_id, place).decode() for row in rows]

    def keep_profile(
        self, user: str, embedder: str, numbers: Sequence[float], *, num_texts: int
    ) -> None:
        """Keep what a user's texts are like, as numbers, in place of an earlier profile.

        Args:
            user: Who.
            embedder: What computed the numbers; only such are compared.
            numbers: As many as that always gives.
            num_texts: Whose mean they are.
        """
        check_name("user", user)
        self._database.run(
            lambda session, tenant: profiles.keep(
                session, tenant, self._sealer, user, embedder, numbers, num_texts
            ),
            write=True,
        )

    def similar_users(
        self,
        embedder: str,
        numbers: Sequence[float],
        *,
        most: int = 10,
        without: Collection[str] = (),
    ) -> list[Similar]:
        """The users whose kept profiles are most alike, the most alike first."""
        return self._database.run(
            lambda session, tenant: profiles.nearest(
                session, tenant, self._sealer, embedder, numbers, most=most, without=without
            )
        )

    def create_api_key(self, name: str) -> str:
        """Make a key for requests to a server; it is told this once.

        Raises:
            StoreError: If there is one of that name.
        """
        check_name("API key", name)
        return self._database.run(
            lambda session, tenant: api_keys.create(session, tenant, self.tenant, name), write=True
        )

    def name_of_api_key(self, key: str) -> str | None:
        """The name of a key, if it is one of this tenant's."""
        return self._database.run(lambda session, tenant: api_keys.name_of(session, tenant, key))

    def api_keys(self) -> list[ApiKeyInfo]:
        """All keys by name, oldest first."""
        return self._database.run(api_keys.listed)

    def revoke_api_key(self, name: str) -> None:
        """Remove a key.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        self._database.run(
            lambda session, tenant: api_keys.revoke(session, tenant, name), write=True
        )

    def prune(self, *, keep: int) -> int:
        """Remove old versions: of each name, all but the newest few and those in use.

        In use are the current one, those with an alias, and decoders that codes belong to.

        Returns:
            How many versions were removed.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be 1 or more")

        def write(session: Session, tenant: int) -> int:
            removed = 0
            many = select(VersionRow.prefix_id).where(VersionRow.tenant_id == tenant)
            many = many.group_by(VersionRow.prefix_id).having(func.count() > keep)
            query = self._mine(tenant, None).where(PrefixRow.id.in_(many)).order_by(PrefixRow.id)
            for row in session.scalars(query.with_for_update()):
                numbers = self._version_numbers(session, row)
                named = select(AliasRow.version).where(AliasRow.prefix_id == row.id)
                kept = {*numbers[-keep:], row.current_version, *session.scalars(named)}
                kept |= codes.in_use(session, row.id) if row.kind == "decoder" else set()
                old = [number for number in numbers if number not in kept]
                for table in (*codes.TIES, PayloadRow, VersionRow) if old else ():
                    where = and_(table.prefix_id == row.id, table.version.in_(old))
                    session.execute(delete(table).where(where))
                if old:
                    self._note(session, tenant, "prune", _key(row), len(old))
                removed += len(old)
            return removed

        return self._database.run(write, write=True)

    def verify(self) -> Iterator[tuple[PrefixKey, int, bool]]:
        """Read every version of the tenant: its key, its number, and whether it is whole.

        Encrypted bytes that the keys given do not open are not.
        """

        def list_all(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int]]:
            query = self._mine(tenant, None).join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
            query = query.order_by(PrefixRow.kind, PrefixRow.name, VersionRow.version)
            return [
                (_key(row), row.fingerprint, row.id, version)
                for row, version in session.execute(query.add_columns(VersionRow.version))
            ]

        for key, fingerprint, prefix_id, number in self._database.run(list_all):
            yield key, number, self._is_whole(key, fingerprint, prefix_id, number)

    def encrypt_again(self) -> int:
        """Write anew all that is not encrypted with the current key; gives how many versions.

        Readers and writers go on meanwhile, as long as the keys given know the old key too.
        Removing the current key from the provider makes plain what is written from then on.

        Raises:
            StoreKeyError: If a key is missing.
        """
        wanted = self._sealer.key_id

        def outdated(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int]]:
            query = self._mine(tenant, None).join(PayloadRow, PayloadRow.prefix_id == PrefixRow.id)
            query = query.where(PayloadRow.key_id.is_distinct_from(wanted))
            return [
                (_key(row), row.fingerprint, row.id, version)
                for row, version in session.execute(query.add_columns(PayloadRow.version))
            ]

        def seal_again(
            session: Session,
            _: int,
            *,
            key: PrefixKey,
            fingerprint: str,
            prefix_id: int,
            number: int,
        ) -> int:
            row = session.get(PayloadRow, (prefix_id, number), with_for_update=True)
            if row is None or row.key_id == wanted:
                return 0
            place = place_of(key, fingerprint, number)
            plain = self._sealer.unseal(row.payload, row.key_id, place)
            row.payload, row.key_id = self._sealer.seal(plain, place)
            return 1

        def seal_samples(session: Session, tenant: int) -> int:
            old = SampleRow.key_id.is_distinct_from(wanted)
            query = select(SampleRow).where(SampleRow.tenant_id == tenant, old)
            rows = list(session.scalars(query.with_for_update()))
            for row in rows:
                place = _sample_of(row.user_name)
                plain = self._sealer.unseal(row.text, row.key_id, place)
                row.text, row.key_id = self._sealer.seal(plain, place)
            return len(rows)

        self._database.run(seal_samples, write=True)
        self._database.run(
            lambda session, tenant: profiles.seal_again(session, tenant, self._sealer), write=True
        )
        return sum(
            self._database.run(
                partial(
                    seal_again, key=key, fingerprint=fingerprint, prefix_id=prefix_id, number=number
                ),
                write=True,
            )
            for key, fingerprint, prefix_id, number in self._database.run(outdated)
        )

    def export_to(self, path: str | Path) -> int:
        """Write all that the tenant has to one file, decrypted; gives the number of versions.

        Raises:
            PrefixFormatError: If stored bytes are damaged; then there is no file.
            StoreError: If the file cannot be written.
        """
        return export_tenant(self._database, self._sealer, Path(path))

    def import_from(self, path: str | Path) -> int:
        """Add all that an exported file holds, or nothing; gives the number of versions.

        Raises:
            PrefixFormatError: If the file is damaged, or no export.
            StoreError: If a name in it exists already.
        """
        return import_tenant(self._database, self._sealer, Path(path))

    def stats(self) -> StoreStats:
        """How much the tenant has stored."""

        def read(session: Session, tenant: int) -> StoreStats:
            counts = self._mine(tenant, None).with_only_columns(PrefixRow.kind, func.count())
            versions = select(func.count(), func.coalesce(func.sum(VersionRow.size_bytes), 0))
            num, size = session.execute(versions.where(VersionRow.tenant_id == tenant)).one()
            by_kind = session.execute(counts.group_by(PrefixRow.kind))
            return StoreStats({row[0]: row[1] for row in by_kind}, num, int(size))

        return self._database.run(read)

    def audit(self) -> list[AuditEntry]:
        """What was removed on request, oldest first."""

        def read(session: Session, tenant: int) -> list[AuditEntry]:
            query = select(AuditRow).where(AuditRow.tenant_id == tenant).order_by(AuditRow.id)
            return [
                AuditEntry(row.at, row.action, _key(row), row.num_versions)
                for row in session.scalars(query)
            ]

        return self._database.run(read)

    def unknown(self, key: PrefixKey, fingerprint: str | None) -> UnknownNameError:
        """The error for a key without a prefix: says what exists, and for which models it does."""
        return self._database.run(
            lambda session, tenant: self._unknown(session, tenant, key, fingerprint)
        )

    def close(self) -> None:
        """Give the database connections back."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(
        self, key: PrefixKey, fingerprint: str, ref: VersionRef, stored: bytes, key_id: str | None
    ) -> Prefix:
        """The prefix in stored bytes; what is there as a code is decoded."""
        payload = self._unsealed(key, fingerprint, ref, stored, key_id)
        name = f"{key} version {ref.version}"
        code = code_in(payload, name)
        if code is None:
            return Prefix.from_bytes(payload, name=name)
        return self._decoder_of(code.decoder, fingerprint, name).decode(code)

    def _decoder_of(self, content_hash: str, fingerprint: str, name: str) -> PrefixDecoder:
        """The decoder with that content."""
        known = self._decoders.get(content_hash)
        if known is not None:
            return known

        def find(session: Session, tenant: int) -> tuple[str, int] | None:
            query = self._mine(tenant, fingerprint).where(PrefixRow.kind == "decoder")
            query = query.join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
            query = query.where(VersionRow.content_hash == content_hash)
            chosen = query.with_only_columns(PrefixRow.name, VersionRow.version).limit(1)
            return session.execute(chosen).tuples().one_or_none()

        found = self._database.run(find)
        if found is None:
            raise PrefixFormatError(
                f"{name} is a code of decoder {content_hash[:19]}, which is not in the store; "
                "train or enroll the user anew"
            )
        decoder, version = found
        return self.decoder(decoder, fingerprint, version=version)

    def _unsealed(
        self, key: PrefixKey, fingerprint: str, ref: VersionRef, stored: bytes, key_id: str | None
    ) -> bytes:
        payload = self._sealer.unseal(stored, key_id, place_of(key, fingerprint, ref.version))
        if not _is_content(payload, ref.content_hash):
            raise self._damaged(key, fingerprint, ref.version, "wrong hash")
        return payload

    def _damaged(
        self, key: PrefixKey, fingerprint: str, number: int, reason: str
    ) -> PrefixFormatError:
        """The error for bytes that are not what was put; offers the newest whole version before."""

        def earlier(session: Session, tenant: int) -> tuple[int, list[int]]:
            row = self._row(session, tenant, key, fingerprint)
            return row.id, self._version_numbers(session, row)

        prefix_id, numbers = self._database.run(earlier)
        others = [n for n in reversed(numbers) if n < number] + [n for n in numbers if n > number]
        whole = (n for n in others if self._is_whole(key, fingerprint, prefix_id, n))
        good = next(whole, None)
        way_out = "train it again" if good is None else f"roll back to version {good}"
        return PrefixFormatError(
            f"{key} version {number} is damaged in the store: {reason}; {way_out}"
        )

    def _is_whole(self, key: PrefixKey, fingerprint: str, prefix_id: int, number: int) -> bool:
        """Whether a version is as it was put; also true where it was removed meanwhile."""

        def read(session: Session, tenant: int) -> tuple[str, PayloadRow | None] | None:
            mine = self._mine(tenant, fingerprint, [key]).where(PrefixRow.id == prefix_id)
            stored = session.get(VersionRow, (prefix_id, number))
            if session.scalar(mine.with_only_columns(PrefixRow.id)) is None or stored is None:
                return None
            return stored.content_hash, session.get(PayloadRow, (prefix_id, number))

        found = self._database.run(read)
        if found is None:
            return True
        claimed, row = found
        if row is None:
            return False
        try:
            place = place_of(key, fingerprint, number)
            return _is_content(self._sealer.unseal(row.payload, row.key_id, place), claimed)
        except StoreKeyError:
            return False

    @staticmethod
    def _note(session: Session, tenant: int, action: str, key: PrefixKey, num: int) -> None:
        entry = {"kind": key.kind, "name": key.name, "action": action, "num_versions": num}
        session.add(AuditRow(tenant_id=tenant, at=datetime.now(UTC), **entry))

    @staticmethod
    def _mine(
        tenant: int, fingerprint: str | None, keys: Sequence[PrefixKey] = ()
    ) -> Select[PrefixRow]:
        """The one place where rows are chosen: of this tenant only."""
        query = select(PrefixRow).where(PrefixRow.tenant_id == tenant)
        if fingerprint is not None:
            query = query.where(PrefixRow.fingerprint == fingerprint)
        if keys:
            kinds = {key.kind for key in keys}
            of_kind = {kind: [k.name for k in keys if k.kind == kind] for kind in kinds}
            query = query.where(
                or_(
                    *(
                        and_(PrefixRow.kind == kind, PrefixRow.name.in_(names))
                        for kind, names in of_kind.items()
                    )
                )
            )
        return query

    def _row(
        self,
        session: Session,
        tenant: int,
        key: PrefixKey,
        fingerprint: str,
        *,
        lock: bool = False,
    ) -> PrefixRow:
        check_key(key)
        query = self._mine(tenant, fingerprint, [key])
        row = session.scalars(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise self._unknown(session, tenant, key, fingerprint)
        return row

    def _unknown(
        self, session: Session, tenant: int, key: PrefixKey, fingerprint: str | None
    ) -> UnknownNameError:
        of_kind = self._mine(tenant, None).where(PrefixRow.kind == key.kind)
        same_name = of_kind.where(PrefixRow.name == key.name).order_by(PrefixRow.model_name)
        elsewhere = session.scalars(same_name.with_only_columns(PrefixRow.model_name)).all()
        if elsewhere:
            return UnknownNameError(
                f"{key} has no prefix for this model, only for other weights "
                f"({', '.join(elsewhere)}); train it on this model, or load that one"
            )
        some = (
            of_kind
            if fingerprint is None
            else self._mine(tenant, fingerprint).where(PrefixRow.kind == key.kind)
        )
        listed = some.with_only_columns(PrefixRow.name).limit(_MAX_LOOKED_THROUGH)
        known = set(session.scalars(listed))
        way_out = "" if known else "; train or enroll one, or check the store and the tenant"
        names = known_names(key.name, known, more=len(known) == _MAX_LOOKED_THROUGH)
        return UnknownNameError(f"no {key.kind} {key.name!r} in the store; known: {names}{way_out}")

    @staticmethod
    def _version_numbers(session: Session, row: PrefixRow) -> list[int]:
        query = select(VersionRow.version).where(VersionRow.prefix_id == row.id)
        return sorted(session.scalars(query))

    def _number(self, session: Session, row: PrefixRow, version: int | str) -> int:
        """The number of a version given by its number or an alias."""
        if isinstance(version, str):
            alias = session.get(AliasRow, (row.id, version))
            if alias is not None:
                return alias.version
        elif session.get(VersionRow, (row.id, version)) is not None:
            return version
        raise self._no_version(session, row, version)

    def _no_version(self, session: Session, row: PrefixRow, version: int | str) -> UnknownNameError:
        aliases = select(AliasRow.alias).where(AliasRow.prefix_id == row.id)
        existing = [str(number) for number in self._version_numbers(session, row)]
        listed = ", ".join([*existing, *sorted(session.scalars(aliases))])
        return UnknownNameError(f"{_key(row)} has no version {version}; it has: {listed}")


def _info(row: PrefixRow, version: VersionRow, aliases: Sequence[str]) -> VersionInfo:
    key = _key(row)
    return VersionInfo(
        kind=key.kind,
        name=key.name,
        version=version.version,
        current=version.version == row.current_version,
        content_hash=version.content_hash,
        size_bytes=version.size_bytes,
        num_slots=version.num_slots,
        dtype=version.dtype,
        created_at=version.created_at,
        details=version.details,
        parent_version=version.parent_version,
        aliases=tuple(aliases),
        num_forgotten=version.num_forgotten,
    )


def _dtype_name(prefix: Prefix | PrefixDecoder) -> str:
    """Of the numbers as `to_bytes` leaves them."""
    if isinstance(prefix, CodedPrefix):
        return "int8"
    return str(prefix.dtype).removeprefix("torch.")


def _key(row: PrefixRow | AuditRow) -> PrefixKey:
    kind: Any = row.kind
    return PrefixKey(kind, row.name)


def _sample_of(user: str) -> str:
    return f"a text of user {user!r}"


def _content_hash(payload: bytes) -> str:
    return f"sha256:{hashlib.sha256(payload).hexdigest()}"


def _is_content(payload: object, content_hash: str) -> bool:
    # SQLite keeps whatever type was written, also where the column is for bytes.
    return isinstance(payload, bytes) and _content_hash(payload) == content_hash
