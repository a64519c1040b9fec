"""Rebinding: prefixes that version 0.1.0 stored for this model, stored for it again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from controlprefix.engine.control_prefix import ControlPrefix
from controlprefix.errors import GeometryMismatchError
from controlprefix.model.fingerprint import first_fingerprint
from controlprefix.prefixes import KINDS, Geometry, Kind, Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import ModelStore, NewVersion


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
        StoreError: If the store cannot be written.
    """
    fingerprint = first_fingerprint(cp.model)
    models = {info.fingerprint: info.model_name for info in cp.store.prefixes()}
    if fingerprint not in models:
        names = ", ".join(f"{name} ({value[:12]})" for value, name in models.items())
        raise GeometryMismatchError(
            f"nothing in the store was made for these weights by version 0.1.0, which gave them "
            f"the fingerprint {fingerprint[:12]}; the store has: {names or 'nothing'}"
        )
    earlier, own = cp.store.for_model(fingerprint), cp.store.for_model(cp.geometry.fingerprint)
    decoder_hashes: dict[str, str] = {}
    stored: list[PrefixKey] = []
    decoders: tuple[Kind, ...] = ("decoder",)
    for kinds in (decoders, tuple(kind for kind in KINDS if kind != "decoder")):
        new_versions = []
        for kind in kinds:
            for name in set(earlier.names(kind)) - set(own.names(kind)):
                key = PrefixKey(kind, name)
                value = _rebound(earlier.get(key).value, cp.geometry, decoder_hashes)
                details = {**_details(earlier, key), "rebound": {"from": fingerprint}}
                new_versions.append(NewVersion(key, value, details))
        cp.store.put(new_versions)
        stored += [new.key for new in new_versions]
        for name in earlier.names("decoder"):  # codes name their decoder by its content
            key = PrefixKey("decoder", name)
            decoder_hashes[earlier.get(key).content_hash] = own.get(key).content_hash
    return stored


def _details(store: ModelStore, key: PrefixKey) -> Mapping[str, Any]:
    return next(info.details for info in store.versions(key) if info.current)


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
