"""Reading stored bytes back: decryption, verification, and what to do about damage."""

from collections.abc import Iterator

from sqlalchemy.orm import Session

from controlprefix.errors import DamagedRowError, PrefixFormatError, StoreKeyError
from controlprefix.prefixes import PrefixKey, content_hash
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import version_id
from controlprefix.store.tables import PayloadRow, PrefixRow, VersionRow
from controlprefix.store.versions import find_prefix, key_of, select_prefixes, version_numbers


class PayloadReader:
    """Decrypts and verifies one tenant's stored bytes.

    Args:
        database: The tenant's database.
        cipher: The tenant's cipher.
    """

    def __init__(self, database: Database, cipher: TenantCipher) -> None:
        self._database = database
        self._cipher = cipher

    def read(
        self,
        key: PrefixKey,
        fingerprint: str,
        version: int,
        expected_hash: str,
        stored: bytes | None,
        key_id: str | None,
    ) -> bytes:
        """The plain bytes of a version.

        Raises:
            StoreKeyError: If they cannot be decrypted.
            PrefixFormatError: If they are damaged; the message offers the newest intact version.
        """
        if stored is None:
            raise self._damaged(key, fingerprint, version, "its bytes are gone")
        plain = self._cipher.decrypt(stored, key_id, version_id(key, fingerprint, version))
        if not matches_hash(plain, expected_hash):
            raise self._damaged(key, fingerprint, version, "wrong hash")
        return plain

    def verify_all(self) -> Iterator[tuple[PrefixKey, int, bool]]:
        """Read every version of the tenant; yields its key, its number, and whether it is intact.

        A version that cannot be decrypted with the given keys is not intact.
        """

        def list_versions(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int]]:
            query = select_prefixes(tenant, None)
            query = query.join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
            query = query.order_by(PrefixRow.kind, PrefixRow.name, VersionRow.version)
            return [
                (key_of(row), row.fingerprint, row.id, version)
                for row, version in session.execute(query.add_columns(VersionRow.version))
            ]

        for key, fingerprint, prefix_id, number in self._database.run(list_versions):
            yield key, number, self._is_intact(key, fingerprint, prefix_id, number)

    def _damaged(
        self, key: PrefixKey, fingerprint: str, number: int, reason: str
    ) -> PrefixFormatError:
        def list_numbers(session: Session, tenant: int) -> tuple[int, list[int]]:
            row = find_prefix(session, tenant, key, fingerprint)
            return row.id, version_numbers(session, row)

        prefix_id, numbers = self._database.run(list_numbers)
        others = [n for n in reversed(numbers) if n < number] + [n for n in numbers if n > number]
        intact = (n for n in others if self._is_intact(key, fingerprint, prefix_id, n))
        newest = next(intact, None)
        way_out = "train it again" if newest is None else f"roll back to version {newest}"
        return PrefixFormatError(
            f"{key} version {number} is damaged in the store: {reason}; {way_out}"
        )

    def _is_intact(self, key: PrefixKey, fingerprint: str, prefix_id: int, number: int) -> bool:
        """Whether a version's bytes are those that were put; also true if it was removed since."""

        def read(session: Session, tenant: int) -> tuple[str, PayloadRow | None] | None:
            own = select_prefixes(tenant, fingerprint, [key]).where(PrefixRow.id == prefix_id)
            version = session.get(VersionRow, (prefix_id, number))
            if session.scalar(own.with_only_columns(PrefixRow.id)) is None or version is None:
                return None
            return version.content_hash, session.get(PayloadRow, (prefix_id, number))

        try:
            stored = self._database.run(read, repeatable_read=True)
        except DamagedRowError:
            return False
        if stored is None:
            return True
        expected_hash, row = stored
        if row is None:
            return False
        try:
            identity = version_id(key, fingerprint, number)
            plain = self._cipher.decrypt(row.payload, row.key_id, identity)
        except (StoreKeyError, TypeError, ValueError):  # another key, or bytes of another type
            return False
        return matches_hash(plain, expected_hash)


def matches_hash(plain: object, expected_hash: str) -> bool:
    """Whether bytes have a content hash."""
    # SQLite keeps whatever type was written, also in a column for bytes.
    return isinstance(plain, bytes) and content_hash(plain) == expected_hash
