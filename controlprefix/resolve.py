"""From the names in a request to the prefixes they stand for."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from controlprefix.assembly import Part
from controlprefix.attributes import require_known, weighted_labels
from controlprefix.geometry import Geometry
from controlprefix.prefix import Prefix
from controlprefix.request import PartUsed, Request
from controlprefix.store import PrefixKey, PrefixStore, VersionRef

_CACHE_BYTES = 1 << 29


class NamedPart(NamedTuple):
    """One part that a request names."""

    key: PrefixKey
    strength: float


class ResolvedPart(NamedTuple):
    """One part that a request names, and the prefix found for it."""

    used: PartUsed
    part: Part


def named_parts(request: Request) -> list[NamedPart]:
    """The parts a request names, each with its strength."""
    strengths = request.strengths
    named = []
    if request.task is not None:
        named.append(NamedPart(PrefixKey("task", request.task), strengths.get("task", 1.0)))
    for one in weighted_labels(request.attributes):
        strength = one.weight * strengths.get(one.attribute, 1.0)
        named.append(NamedPart(PrefixKey("attribute", one.name), strength))
    if request.user is not None:
        named.append(NamedPart(PrefixKey("user", request.user), strengths.get("user", 1.0)))
    return named


class Resolver:
    """Finds stored prefixes for one model, and keeps those in use in memory.

    Args:
        store: Where to look.
        geometry, device, dtype: Of the model.
    """

    def __init__(
        self,
        store: PrefixStore,
        geometry: Geometry,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._store = store
        self._geometry = geometry
        self._device, self._dtype = device, dtype
        # By name and content, least recently used first.
        self._cache: OrderedDict[tuple[PrefixKey, str], Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(self, requests: Sequence[Request]) -> list[list[ResolvedPart]]:
        """The prefixes that requests name, always the current versions: one query for all.

        Raises:
            UnknownNameError: Naming what exists and the nearest of it.
        """
        rows = [named_parts(request) for request in requests]
        refs = self._store.current({n.key for row in rows for n in row}, self._geometry.fingerprint)
        for named, request in zip(rows, requests, strict=True):
            for part in named:
                if part.key not in refs:
                    raise self._unknown(part.key, request)
        return self.load(rows, refs)

    def load(
        self, rows: Sequence[Sequence[NamedPart]], refs: dict[PrefixKey, VersionRef]
    ) -> list[list[ResolvedPart]]:
        """The prefixes of parts whose versions are known."""
        loaded = {key: self._load(key, ref) for key, ref in refs.items()}
        return [
            [
                ResolvedPart(
                    PartUsed(
                        kind=key.kind, name=key.name, version=loaded[key][1], strength=strength
                    ),
                    Part(loaded[key][0], strength),
                )
                for key, strength in row
            ]
            for row in rows
        ]

    def forget(self, key: PrefixKey) -> None:
        """Drop every version of a name from memory."""
        with self._lock:
            for cached in [entry for entry in self._cache if entry[0] == key]:
                del self._cache[cached]

    def _unknown(self, key: PrefixKey, request: Request) -> Exception:
        if key.kind == "attribute":
            known = self._store.names("attribute", self._geometry.fingerprint)
            require_known(weighted_labels(request.attributes), known)
        return self._store.unknown(key, self._geometry.fingerprint)

    def _load(self, key: PrefixKey, ref: VersionRef) -> tuple[Prefix, int]:
        with self._lock:
            if (cached := self._cache.get((key, ref.content_hash))) is not None:
                self._cache.move_to_end((key, ref.content_hash))
                return cached, ref.version
        stored = self._store.get(key, self._geometry.fingerprint, version=ref.version)
        prefix = stored.prefix.to(device=self._device, dtype=self._dtype).require_finite(str(key))
        with self._lock:
            self._cache[(key, stored.ref.content_hash)] = prefix
            while sum(p.size_bytes for p in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return prefix, stored.ref.version
