"""Export and import: a tenant's prefixes as one file, bit for bit, all or nothing.

The file is a zip: `manifest.json` describes the versions, `payloads/<sha256>` hold the bytes.
Exporting what was imported gives the same file again.
"""

import json
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from controlprefix._io import atomic_path
from controlprefix.errors import (
    ControlPrefixError,
    DamagedRowError,
    PrefixFormatError,
    StoreError,
    short_reason,
)
from controlprefix.prefixes import PrefixKey, content_hash
from controlprefix.store import version_links
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import (
    check_alias,
    check_key,
    check_name,
    parse_payload,
    version_id,
)
from controlprefix.store.tables import AliasRow, PayloadRow, PrefixRow, VersionRow
from controlprefix.store.versions import MAX_VERSION, key_of, select_prefixes

FORMAT = 1
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_RATIO = 4  # of an entry to its size in the file; exports are not compressed
_MAX_TOTAL_BYTES = 64 << 30  # what an import may add to the store
_MAX_VERSIONS_PER_PAYLOAD = 8  # on average
_VERSION_FIELDS = (
    "version",
    "parent_version",
    "content_hash",
    "size_bytes",
    "num_slots",
    "dtype",
    "num_forgotten",
)


def export_tenant(database: Database, cipher: TenantCipher, path: Path) -> int:
    """Write all versions of a tenant to a file; returns their number.

    Raises:
        PrefixFormatError: If stored bytes are damaged; then there is no file.
        StoreError: If the file or the database cannot be used.
    """

    def write(session: Session, tenant: int) -> int:
        unfinished.touch(mode=0o600)  # plain, also of an encrypted store
        with zipfile.ZipFile(unfinished, "w") as archive:
            manifest = _manifest(session, tenant)
            total = sum(
                v["size_bytes"] for prefix in manifest["prefixes"] for v in prefix["versions"]
            )
            if total > _MAX_TOTAL_BYTES:
                raise StoreError(
                    f"the tenant's versions take {total:,} bytes, and an import reads up to "
                    f"{_MAX_TOTAL_BYTES:,}; prune old versions, or copy the database instead"
                )
            counts = Counter[str]()
            for key, fingerprint, prefix_id, version, expected_hash in _versions(session, tenant):
                copy, remainder = divmod(counts[expected_hash], _MAX_VERSIONS_PER_PAYLOAD)
                counts[expected_hash] += 1
                if remainder:
                    continue  # several versions share a payload, but no more than an import takes
                identity = version_id(key, fingerprint, version)
                row = session.get(PayloadRow, (prefix_id, version))
                payload = cipher.decrypt(row.payload, row.key_id, identity) if row else b""
                if content_hash(payload) != expected_hash:
                    raise PrefixFormatError(
                        f"{identity} is damaged in the store; roll back and prune, then export"
                    )
                archive.writestr(_entry(expected_hash, copy), payload)
                session.expunge_all()  # at most one in memory
            text = json.dumps(manifest, sort_keys=True, indent=1)
            if len(text) > _MAX_MANIFEST_BYTES:
                raise StoreError(
                    f"the tenant's list of versions has {len(text):,} bytes, more than an import "
                    "reads; copy the database instead"
                )
            archive.writestr(zipfile.ZipInfo("manifest.json"), text)
        return sum(len(prefix["versions"]) for prefix in manifest["prefixes"])

    try:
        with atomic_path(path) as unfinished:
            return database.run(write, repeatable_read=True)
    except ControlPrefixError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def import_tenant(database: Database, cipher: TenantCipher, path: Path) -> int:
    """Add all versions of an exported file to a tenant that has none of these names.

    Returns:
        The number of versions.

    Raises:
        PrefixFormatError: If the file is damaged, or not an export.
        StoreError: If a name exists already, or the database cannot be written.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise StoreError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            manifest = _read_manifest(archive, path)
            _require_whole(archive, manifest)

            def write(session: Session, tenant: int) -> int:
                # Decoders first: codes refer to them.
                order = sorted(manifest["prefixes"], key=lambda entry: entry["kind"] != "decoder")
                return sum(_add(session, tenant, cipher, archive, prefix) for prefix in order)

            return database.run(write, write=True)
    except Exception as error:  # whatever a damaged or hostile zip or JSON can do
        if isinstance(error, ControlPrefixError) and not isinstance(error, DamagedRowError):
            raise
        raise PrefixFormatError(
            f"{str(path)!r} is damaged or not an export of controlprefix: {short_reason(error)}; "
            "nothing was changed"
        ) from error


def _manifest(session: Session, tenant: int) -> dict[str, Any]:
    order = (PrefixRow.kind, PrefixRow.name, PrefixRow.fingerprint)
    prefixes = []
    for row in session.scalars(select_prefixes(tenant, None).order_by(*order)):
        versions = select(VersionRow).where(VersionRow.prefix_id == row.id)
        aliases = select(AliasRow).where(AliasRow.prefix_id == row.id)
        prefixes.append(
            {
                "kind": row.kind,
                "name": row.name,
                "fingerprint": row.fingerprint,
                "model_name": row.model_name,
                "current_version": row.current_version,
                "newest_version": row.newest_version,
                "aliases": {a.alias: a.version for a in session.scalars(aliases)},
                "versions": [
                    {
                        **{name: getattr(version, name) for name in _VERSION_FIELDS},
                        "created_at": version.created_at.astimezone(UTC).isoformat(),
                        "details": version.details,
                        "sources": version_links.sources(session, row.id, version.version),
                    }
                    for version in session.scalars(versions.order_by(VersionRow.version))
                ],
            }
        )
    return {"format": FORMAT, "prefixes": prefixes}


def _versions(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int, str]]:
    """Every version, in the order of content hashes: the same for the same content."""
    query = select_prefixes(tenant, None)
    query = query.join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
    columns = query.add_columns(VersionRow.version, VersionRow.content_hash)
    return [
        (key_of(row), row.fingerprint, row.id, version, expected_hash)
        for row, version, expected_hash in session.execute(
            columns.order_by(VersionRow.content_hash)
        )
    ]


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    manifest = json.loads(_read_entry(archive, "manifest.json", _MAX_MANIFEST_BYTES))
    if manifest["format"] > FORMAT:
        raise PrefixFormatError(
            f"{str(path)!r} was written in format {manifest['format']}; this version reads up to "
            f"{FORMAT}, so upgrade controlprefix"
        )
    assert isinstance(manifest, dict)
    return manifest


def _read_entry(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Read an entry whose declared size is plausible."""
    entry = archive.getinfo(name)
    limit = min(max_bytes, _MAX_RATIO * max(1, entry.compress_size))
    if entry.file_size > limit:
        raise ValueError(f"{name} claims {entry.file_size:,} bytes")
    return archive.read(entry)


def _require_whole(archive: zipfile.ZipFile, manifest: dict[str, Any]) -> None:
    """Read every payload, before anything is written: sizes, hashes and contents."""
    versions = [
        (PrefixKey(prefix["kind"], prefix["name"]), prefix["fingerprint"], version)
        for prefix in manifest["prefixes"]
        for version in prefix["versions"]
    ]
    total = sum(int(version["size_bytes"]) for _, _, version in versions)
    payloads = (e for e in archive.infolist() if e.filename != "manifest.json")
    stored = sum(entry.file_size for entry in payloads)
    # The same content may have several versions, each of which takes its bytes in the store.
    if total > min(_MAX_TOTAL_BYTES, _MAX_VERSIONS_PER_PAYLOAD * max(1, stored)):
        raise ValueError(f"its versions claim {total:,} bytes")
    models: dict[str, str] = {}  # content hash -> the model that it was made for
    for key, own_fingerprint, version in versions:
        name = f"{key} version {version['version']}"
        expected = version["content_hash"]
        entry = archive.getinfo(_entry(expected).filename)
        if entry.file_size != version["size_bytes"]:
            raise ValueError(f"{name} has {entry.file_size:,} bytes")
        if expected not in models:
            payload = _read_entry(archive, entry.filename, entry.file_size)
            if content_hash(payload) != expected:
                raise ValueError(f"{name} has the wrong hash")
            try:
                value = parse_payload(key, payload, name)
            except PrefixFormatError as error:
                raise ValueError(str(error)) from error
            geometry = getattr(value, "geometry", None)  # a code has its decoder's
            models[expected] = "" if geometry is None else geometry.fingerprint
        if models[expected] not in ("", own_fingerprint):
            raise ValueError(f"{name} is listed for another model than it was made for")


def _add(
    session: Session,
    tenant: int,
    cipher: TenantCipher,
    archive: zipfile.ZipFile,
    prefix: dict[str, Any],
) -> int:
    """Add one name with all its versions; returns their number."""
    key = PrefixKey(prefix["kind"], prefix["name"])
    check_key(key)
    check_name("model fingerprint", prefix["fingerprint"])
    existing = select_prefixes(tenant, prefix["fingerprint"], [key])
    if session.scalar(existing.with_only_columns(PrefixRow.id)) is not None:
        raise StoreError(
            f"{key} exists already; nothing was imported: import into a tenant that has none of "
            "these names, or forget it first"
        )
    numbers = [version["version"] for version in prefix["versions"]]
    referenced = {prefix["current_version"], *prefix["aliases"].values()}
    counts = [version["num_slots"] for version in prefix["versions"]]
    for number in (*numbers, prefix["newest_version"]):
        if type(number) is not int or not 1 <= number < MAX_VERSION:
            raise ValueError(f"{key} has the version {number!r}")
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{key} has a version with an impossible number of slots")
    if not referenced <= set(numbers) or max(numbers) > prefix["newest_version"]:
        raise ValueError(f"{key} refers to versions that are not there")
    row = PrefixRow(
        tenant_id=tenant,
        kind=key.kind,
        name=key.name,
        fingerprint=prefix["fingerprint"],
        model_name=str(prefix["model_name"]),
        current_version=int(prefix["current_version"]),
        newest_version=int(prefix["newest_version"]),
    )
    session.add(row)
    session.flush()
    prefix_id = row.id
    for version in prefix["versions"]:
        _add_version(
            session, tenant, cipher, archive, key, prefix["fingerprint"], prefix_id, version
        )
    for alias, number in prefix["aliases"].items():
        check_alias(alias)
        session.add(AliasRow(prefix_id=prefix_id, alias=alias, version=number, tenant_id=tenant))
    session.flush()
    session.expunge_all()
    return len(numbers)


def _add_version(
    session: Session,
    tenant: int,
    cipher: TenantCipher,
    archive: zipfile.ZipFile,
    key: PrefixKey,
    fingerprint: str,
    prefix_id: int,
    version: dict[str, Any],
) -> None:
    number = int(version["version"])
    name = f"{key} version {number}"
    payload = archive.read(_entry(version["content_hash"]).filename)  # as it was checked before
    ids = {"prefix_id": prefix_id, "version": number, "tenant_id": tenant}
    fields = {field: version[field] for field in _VERSION_FIELDS if field != "version"}
    if not isinstance(fields["num_forgotten"], int):
        raise ValueError(f"{name} has num_forgotten {fields['num_forgotten']!r}")
    created_at = datetime.fromisoformat(version["created_at"]).astimezone(UTC)
    details = dict(version["details"])
    session.add(VersionRow(**ids, **fields, created_at=created_at, details=details))
    session.flush()
    from controlprefix.prefixes.user_code import UserCode, is_user_code

    if key.kind == "user" and is_user_code(payload, name):
        code = UserCode.from_bytes(payload, name=name)
        decoder = version_links.find_decoder(session, tenant, code.decoder_hash)
        version_links.link_to_decoder(session, tenant, decoder, prefix_id, number)
    version_links.add_sources(session, tenant, prefix_id, number, version["sources"])
    stored, key_id = cipher.encrypt(payload, version_id(key, fingerprint, number))
    session.add(PayloadRow(**ids, payload=stored, key_id=key_id))
    session.flush()
    session.expunge_all()


def _entry(expected_hash: str, copy: int = 0) -> zipfile.ZipInfo:
    suffix = f"-{copy}" if copy else ""
    return zipfile.ZipInfo(f"payloads/{expected_hash.removeprefix('sha256:')}{suffix}")
