"""Key rotation: re-encrypting everything with the current key."""

from functools import partial

from sqlalchemy.orm import Session

from controlprefix.prefixes import PrefixKey
from controlprefix.store import jobs, profiles, user_texts
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import version_id
from controlprefix.store.tables import PayloadRow, PrefixRow
from controlprefix.store.versions import key_of, select_prefixes


def rotate_keys(database: Database, cipher: TenantCipher) -> int:
    """Re-encrypt a tenant's versions, texts, profiles and jobs; returns the number of versions.

    Each version is a transaction, and so are all texts, all profiles and all jobs: readers and
    writers go on meanwhile, as long as the keys given contain the old one too.

    Raises:
        StoreKeyError: If a key is missing.
    """
    current = cipher.current_key_id

    def list_outdated(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int]]:
        query = select_prefixes(tenant, None)
        query = query.join(PayloadRow, PayloadRow.prefix_id == PrefixRow.id)
        query = query.where(PayloadRow.key_id.is_distinct_from(current))
        return [
            (key_of(row), row.fingerprint, row.id, version)
            for row, version in session.execute(query.add_columns(PayloadRow.version))
        ]

    def rotate_version(
        session: Session, _: int, *, identity: str, prefix_id: int, number: int
    ) -> int:
        row = session.get(PayloadRow, (prefix_id, number), with_for_update=True)
        if row is None or row.key_id == current:
            return 0
        plain = cipher.decrypt(row.payload, row.key_id, identity)
        row.payload, row.key_id = cipher.encrypt(plain, identity)
        return 1

    database.run(lambda session, tenant: user_texts.rotate(session, tenant, cipher), write=True)
    database.run(lambda session, tenant: profiles.rotate(session, tenant, cipher), write=True)
    database.run(lambda session, tenant: jobs.rotate(session, tenant, cipher), write=True)
    num_rotated = 0
    for key, fingerprint, prefix_id, number in database.run(list_outdated):
        identity = version_id(key, fingerprint, number)
        work = partial(rotate_version, identity=identity, prefix_id=prefix_id, number=number)
        num_rotated += database.run(work, write=True)
    return num_rotated
