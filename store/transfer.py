"""A tenant's prefixes as one file, and back: bit for bit, all or nothing.

The file is a zip: `manifest.json` says what there is, `payloads/<sha256>` hold the bytes.
Exporting what was imported gives the same file again.
"""

import hashlib
import json
import os
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from controlprefix.errors import ControlPrefixError, PrefixFormatError, StoreError
from controlprefix.prefixes.user_code import code_in
from controlprefix.store import codes
from controlprefix.store.database import Database
from controlprefix.store.encryption import Sealer
from controlprefix.store.records import PrefixKey, check_alias, check_key, check_name, place_of
from controlprefix.store.tables import AliasRow, PayloadRow, PrefixRow, VersionRow

FORMAT = 1
_MAX_MANIFEST_BYTES = _MAX_PAYLOAD_BYTES = 1 << 30
_OF_VERSION = (
    "version",
    "parent_version",
    "content_hash",
    "size_bytes",
    "num_slots",
    "dtype",
    "num_forgotten",
)


def export_tenant(database: Database, sealer: Sealer, path: Path) -> int:
    """Write all that a tenant has to a file.

    Returns:
        The number of versions.

    Raises:
        PrefixFormatError: If stored bytes are damaged; then there is no file.
        StoreError: If the file or the database cannot be used.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")

    def write(session: Session, tenant: int) -> int:
        with zipfile.ZipFile(unfinished, "w") as archive:
            manifest, written = _manifest(session, tenant), set()
            for key, fingerprint, prefix_id, version, claimed in _versions(session, tenant):
                if claimed in written:
                    continue
                place = place_of(key, fingerprint, version)
                row = session.get(PayloadRow, (prefix_id, version))
                payload = sealer.unseal(row.payload, row.key_id, place) if row else b""
                if _hash(payload) != claimed:
                    raise PrefixFormatError(
                        f"{place} is damaged in the store; roll back and prune, then export"
                    )
                archive.writestr(_entry(claimed), payload)
                session.expunge_all()  # not more than one in memory
                written.add(claimed)
            archive.writestr(
                zipfile.ZipInfo("manifest.json"), json.dumps(manifest, sort_keys=True, indent=1)
            )
        return sum(len(prefix["versions"]) for prefix in manifest["prefixes"])

    try:
        num_versions = database.run(write, whole_view=True)
        unfinished.replace(path)
        return num_versions
    except OSError as error:
        raise StoreError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def import_tenant(database: Database, sealer: Sealer, path: Path) -> int:
    """Add all that a file holds to a tenant that has none of these names.

    Returns:
        The number of versions.

    Raises:
        PrefixFormatError: If the file is damaged, or no export of ours.
        StoreError: If a name exists already, or the database cannot be written.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise StoreError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            manifest = _read_manifest(archive, path)

            def write(session: Session, tenant: int) -> int:
                # Decoders first: codes refer to them.
                order = sorted(manifest["prefixes"], key=lambda one: one["kind"] != "decoder")
                return sum(_add(session, tenant, sealer, archive, prefix) for prefix in order)

            return database.run(write, write=True)
    except ControlPrefixError:
        raise
    # A damaged place in the file may lead before its beginning: that is an OSError.
    except (
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OSError,
        OverflowError,
    ) as error:
        raise PrefixFormatError(
            f"{str(path)!r} is damaged or no export of controlprefix: {error}; nothing was changed"
        ) from error


def _in_utc(at: datetime) -> str:
    """SQLite gives times back without their zone, which is UTC."""
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


def _manifest(session: Session, tenant: int) -> dict[str, Any]:
    order = (PrefixRow.kind, PrefixRow.name, PrefixRow.fingerprint)
    prefixes = []
    for row in session.scalars(
        select(PrefixRow).where(PrefixRow.tenant_id == tenant).order_by(*order)
    ):
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
                        **{name: getattr(one, name) for name in _OF_VERSION},
                        "created_at": _in_utc(one.created_at),
                        "details": one.details,
                        "sources": codes.sources(session, row.id, one.version),
                    }
                    for one in session.scalars(versions.order_by(VersionRow.version))
                ],
            }
        )
    return {"format": FORMAT, "prefixes": prefixes}


def _versions(session: Session, tenant: int) -> list[tuple[PrefixKey, str, int, int, str]]:
    """Every version, in the order of the content: the same for the same content."""
    query = select(PrefixRow, VersionRow.version, VersionRow.content_hash)
    query = query.join(VersionRow, VersionRow.prefix_id == PrefixRow.id)
    query = query.where(PrefixRow.tenant_id == tenant).order_by(VersionRow.content_hash)
    return [
        (_key(row), row.fingerprint, row.id, version, claimed)
        for row, version, claimed in session.execute(query)
    ]


def _key(row: PrefixRow) -> PrefixKey:
    kind: Any = row.kind
    return PrefixKey(kind, row.name)


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    size = archive.getinfo("manifest.json").file_size
    if size > _MAX_MANIFEST_BYTES:
        raise PrefixFormatError(f"{str(path)!r} claims a manifest of {size:,} bytes")
    manifest = json.loads(archive.read("manifest.json"))
    if manifest["format"] > FORMAT:
        raise PrefixFormatError(
            f"{str(path)!r} was written in format {manifest['format']}; this version reads up to "
            f"{FORMAT}, so upgrade controlprefix"
        )
    assert isinstance(manifest, dict)
    return manifest


def _add(
    session: Session,
    tenant: int,
    sealer: Sealer,
    archive: zipfile.ZipFile,
    prefix: dict[str, Any],
) -> int:
    key = PrefixKey(prefix["kind"], prefix["name"])
    check_key(key)
    check_name("model fingerprint", prefix["fingerprint"])
    there = select(PrefixRow.id).where(
        PrefixRow.tenant_id == tenant,
        PrefixRow.fingerprint == prefix["fingerprint"],
        PrefixRow.kind == key.kind,
        PrefixRow.name == key.name,
    )
    if session.scalar(there) is not None:
        raise StoreError(
            f"{key} exists already; nothing was imported: import into a tenant that has none of "
            "these names, or forget it first"
        )
    numbers = [one["version"] for one in prefix["versions"]]
    named = {prefix["current_version"], *prefix["aliases"].values()}
    if not named <= set(numbers) or max(numbers) > prefix["newest_version"]:
        raise ValueError(f"{key} names versions that are not there")
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
    for one in prefix["versions"]:
        info = archive.getinfo(_entry(one["content_hash"]).filename)
        # Looked at before anything is read.
        if info.file_size != one["size_bytes"] or info.file_size > _MAX_PAYLOAD_BYTES:
            raise ValueError(f"{key} version {one['version']} has {info.file_size:,} bytes")
        payload = archive.read(info)
        if _hash(payload) != one["content_hash"]:
            raise ValueError(f"{key} version {one['version']} has the wrong hash")
        mine = {"prefix_id": row.id, "version": int(one["version"]), "tenant_id": tenant}
        about = {name: one[name] for name in _OF_VERSION if name != "version"}
        if not isinstance(about["num_forgotten"], int):
            raise ValueError(f"{key} version {one['version']} counts {about['num_forgotten']!r}")
        created = datetime.fromisoformat(one["created_at"])
        session.add(VersionRow(**mine, **about, created_at=created, details=dict(one["details"])))
        session.flush()
        code = code_in(payload, f"{key} version {mine['version']}")
        if code is not None:
            at = (row.id, mine["version"])
            codes.tie_to_decoder(session, tenant, prefix["fingerprint"], code.decoder, *at)
        codes.note_sources(session, tenant, row.id, mine["version"], one["sources"])
        place = place_of(key, prefix["fingerprint"], mine["version"])
        stored, key_id = sealer.seal(payload, place)
        session.add(PayloadRow(**mine, payload=stored, key_id=key_id))
        session.flush()
        session.expunge_all()
    for alias, version in prefix["aliases"].items():
        check_alias(alias)
        session.add(AliasRow(prefix_id=row.id, alias=alias, version=version, tenant_id=tenant))
    session.flush()
    session.expunge_all()
    return len(numbers)


def _entry(content_hash: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"payloads/{content_hash.removeprefix('sha256:')}")


def _hash(payload: bytes) -> str:
    return f"sha256:{hashlib.sha256(payload).hexdigest()}"
