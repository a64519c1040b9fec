"""Rebinding: prefixes that version 0.1.0 stored for this model, stored for it again."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from controlprefix.engine.control_prefix import ControlPrefix
from controlprefix.errors import (
    ForgottenError,
    GeometryMismatchError,
    StoreError,
    UnknownNameError,
)
from controlprefix.model.fingerprint import first_fingerprint
from controlprefix.prefixes import KINDS, Geometry, Kind, Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import ModelStore, NewVersion, VersionRef


def rebind(cp: ControlPrefix) -> list[PrefixKey]:
    """Store the current versions of an older store's prefixes for this model's fingerprint.

    Version 0.1.0 computed the fingerprint from parameter names too. What it stored is used only
    if this model has that fingerprint: then all weights are the same. Names that have a version
    for this model already are left alone, so it may be repeated; old versions stay.

    Args:
        cp: The model, and the store.

    Returns:
        What was stored.

    Raises:
        GeometryMismatchError: If nothing in the store was made for this model.
        StoreError: If the store cannot be written, or this model has another decoder of a name
            that codes need.
        VersionConflictError: If something of a name was stored meanwhile; repeat it then.
    """
    removal_number = cp.store.last_removal_number()
    fingerprint = first_fingerprint(cp.model)
    models = {info.fingerprint: info.model_name for info in cp.store.prefixes()}
    if fingerprint not in models:
        names = ", ".join(f"{name} ({value[:12]})" for value, name in models.items())
        raise GeometryMismatchError(
            f"nothing in the store was made for these weights by version 0.1.0, which gave them "
            f"the fingerprint {fingerprint[:12]}; the store has: {names or 'nothing'}"
        )
    earlier, own = cp.store.for_model(fingerprint), cp.store.for_model(cp.geometry.fingerprint)
    others: list[Kind] = [kind for kind in KINDS if kind != "decoder"]
    keys = [
        PrefixKey(kind, name)
        for kind in others
        for name in sorted(set(earlier.names(kind)) - set(own.names(kind)))
    ]
    values = {key: stored.value for key, stored in earlier.fetch(keys).items()}
    used = {value.decoder_hash for value in values.values() if isinstance(value, UserCode)}
    hashes: dict[str, str] = {}  # of decoders, which codes name by their content
    stored: list[PrefixKey] = []
    for name in earlier.names("decoder"):
        key = PrefixKey("decoder", name)
        rebound = _rebound_hashes(own, key)
        if rebound is None and not used & {info.content_hash for info in earlier.versions(key)}:
            continue
        if rebound is None:
            raise StoreError(
                f"{key} exists for this model already, and stored codes need the older one of that "
                "name; export the newer one, remove it, and rebind again"
            )
        for info in sorted(earlier.versions(key), key=lambda info: (info.current, info.version)):
            if info.content_hash in rebound or not (info.current or info.content_hash in used):
                continue
            value = _rebound(earlier.get(key, version=info.version).value, cp.geometry, {})
            origin = {"from": fingerprint, "content_hash": info.content_hash}
            details = {**info.details, "rebound": origin}
            origin_version = VersionRef(fingerprint, info.version)
            new = NewVersion(key, value, details, derived_from=origin_version)
            (number,) = cp.store.put([new], removal_number=removal_number)
            rebound[info.content_hash] = own.get(key, version=number).content_hash
            stored += [key] * (key not in stored)
        hashes |= rebound
    new_versions = []
    for key, value in values.items():
        try:
            current = earlier.version_info(key)
        except UnknownNameError:  # forgotten meanwhile
            continue
        details = {**current.details, "rebound": {"from": fingerprint}}
        rebound_value = _rebound(value, cp.geometry, hashes)
        new_versions.append(
            NewVersion(
                key,
                rebound_value,
                details,
                dtype=current.storage_dtype,
                derived_from=VersionRef(fingerprint, current.version),
                replaces=0,
            )
        )
    if new_versions:
        with contextlib.suppress(ForgottenError):  # all of them were
            stored += cp.store.put_unless_forgotten(new_versions, removal_number)
    return stored


def _rebound_hashes(own: ModelStore, key: PrefixKey) -> dict[str, str] | None:
    """Content hashes of a decoder's older versions, and those of their rebound versions.

    None if the model has a decoder of that name that was not rebound.
    """
    if not own.exists(key):
        return {}
    versions = own.versions(key)
    if not all("content_hash" in info.details.get("rebound", {}) for info in versions):
        return None
    return {info.details["rebound"]["content_hash"]: info.content_hash for info in versions}


def _rebound(value: Any, geometry: Geometry, decoder_hashes: Mapping[str, str]) -> Any:
    """A stored value for this model."""
    if isinstance(value, UserCode):
        return replace(value, decoder_hash=decoder_hashes[value.decoder_hash])
    assert isinstance(value, (Prefix, PrefixDecoder))
    own = replace(value.geometry, fingerprint=geometry.fingerprint, shift=None)
    geometry.require(own, "a stored prefix")
    if isinstance(value, Prefix):
        return replace(value, geometry=own)
    value.geometry = own
    return value
