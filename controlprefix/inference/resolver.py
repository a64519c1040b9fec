"""From the names in a request to the prefixes they stand for."""

from collections.abc import Collection, Hashable, Mapping, Sequence, Set
from typing import NamedTuple

import torch

from controlprefix.attributes import require_known, weighted_labels
from controlprefix.errors import RequestError
from controlprefix.prefixes.assembly import Part
from controlprefix.prefixes.geometry import Geometry
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.schedule import Course
from controlprefix.request import PartUsed, Request
from controlprefix.store import PrefixCache, PrefixKey, PrefixStore, Together, VersionRef

_MAX_SEEN = 10_000


class NamedPart(NamedTuple):
    """One part that a request names."""

    key: PrefixKey
    strength: float
    course: Course = ()


class ResolvedPart(NamedTuple):
    """One part that a request names, and the prefix found for it.

    Attributes:
        used: With the strength that is meant.
        part: Where it is not apart, at that strength; else as trained.
        apart: Its strength counts in the space of logits: see `guidance`.
    """

    used: PartUsed
    part: Part
    apart: bool = False


def named_parts(request: Request) -> list[NamedPart]:
    """The parts a request names, each with its strength."""
    named = [] if request.task is None else [(PrefixKey("task", request.task), "task", 1.0)]
    for one in weighted_labels(request.attributes):
        named.append((PrefixKey("attribute", one.name), one.attribute, one.weight))
    if request.user is not None:
        named.append((PrefixKey("user", request.user), "user", 1.0))
    return [
        NamedPart(key, weight * request.strengths.get(said, 1.0), request.schedules.get(said, ()))
        for key, said, weight in named
    ]


class Resolver:
    """Finds stored prefixes for one model, and keeps those in use in memory.

    Nothing outdated is ever used: what is current is asked at every call, unless the store
    can tell that nothing changed. Only what is not in memory is sent, and threads that ask
    at the same time share the question.

    Args:
        store: Where to look.
        geometry, device, dtype: Of the model.
        cache_bytes: Of the prefixes kept on that device.
        host_bytes: Of those kept beside them in the host's memory, where that is another:
            what no longer fits the device need not come from the database again.
    """

    def __init__(
        self,
        store: PrefixStore,
        geometry: Geometry,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache_bytes: int = 1 << 29,
        host_bytes: int | None = None,
    ) -> None:
        self._store = store
        self._geometry = geometry
        self._device, self._dtype = device, dtype
        self._cache = PrefixCache(cache_bytes)
        if host_bytes is None:
            host_bytes = 0 if device.type == "cpu" else 1 << 31
        self._host = PrefixCache(host_bytes)
        self._together: Together[Found] = Together()
        # What was current while the store was as this token says.
        self._seen: tuple[Hashable | None, dict[PrefixKey, VersionRef]] = (None, {})

    def resolve(
        self, requests: Sequence[Request], made: Mapping[PrefixKey, Prefix] | None = None
    ) -> list[list[ResolvedPart]]:
        """The prefixes that requests name, always the current versions: one query for all.

        Args:
            requests: Any number.
            made: Prefixes that no store has, by names that no store could have; version 0.

        Raises:
            UnknownNameError: Naming what exists and the nearest of it.
        """
        rows = [named_parts(request) for request in requests]
        keys = {part.key for row in rows for part in row}
        own = {
            key: Found(key, 0, prefix.to(device=self._device, dtype=self._dtype))
            for key, prefix in (made or {}).items()
            if key in keys
        }
        found = {**self.fetch(keys - own.keys()), **own}
        for named, request in zip(rows, requests, strict=True):
            for part in named:
                if part.key not in found:
                    raise self._unknown(part.key, request)
        return [
            [
                found[one.key].part(
                    _dialled(found[one.key], one, request),
                    one.course,
                    apart=request.mixing == "logits" and one.key.kind == "attribute",
                )
                for one in row
            ]
            for row, request in zip(rows, requests, strict=True)
        ]

    def fetch(self, keys: Set[PrefixKey]) -> dict[PrefixKey, "Found"]:
        """The current prefixes of those keys that have one.

        Raises:
            PrefixFormatError: If one is damaged in the store.
        """
        if not keys:
            return {}
        token, seen = self._seen
        if token is not None and keys <= seen.keys() and token == self._store.change_token():
            held = self._cache.held(keys)
            if all(seen[key].content_hash in held for key in keys):
                return {k: Found(k, seen[k].version, held[seen[k].content_hash]) for k in keys}
        return dict(self._together.ask(keys, self._fetch))

    def forget(self, key: PrefixKey) -> None:
        """Drop every version of a name from memory."""
        for cache in (self._cache, self._host):
            cache.forget(key)

    def _fetch(self, keys: Collection[PrefixKey]) -> dict[PrefixKey, "Found"]:
        token = self._store.change_token()  # before the question: what changes meanwhile is news
        held, on_host = self._cache.held(keys), self._host.held(keys)
        have = held.keys() | on_host.keys()
        fetched = self._store.fetch(keys, self._geometry.fingerprint, have=have)
        found = {}
        for key, (ref, sent) in fetched.items():
            if sent is not None:
                sent = sent.to(dtype=self._dtype).require_finite(str(key))
                self._host.put(key, ref.content_hash, sent)
            prefix = held.get(ref.content_hash)
            if prefix is None:
                prefix = (sent or on_host[ref.content_hash]).to(device=self._device)
                self._cache.put(key, ref.content_hash, prefix)
            found[key] = Found(key, ref.version, prefix)
        for key in set(keys) - fetched.keys():  # forgotten meanwhile, maybe by another process
            self.forget(key)
        before, seen = self._seen
        kept = seen if token == before and len(seen) < _MAX_SEEN else {}
        self._seen = (token, {**kept, **{key: one.ref for key, one in fetched.items()}})
        return found

    def _unknown(self, key: PrefixKey, request: Request) -> Exception:
        if key.kind == "attribute":
            known = self._store.names("attribute", self._geometry.fingerprint)
            require_known(weighted_labels(request.attributes), known)
        return self._store.unknown(key, self._geometry.fingerprint)


class Found(NamedTuple):
    """The current prefix of a name, as the model takes it."""

    key: PrefixKey
    version: int
    prefix: Prefix

    def part(self, strength: float, course: Course = (), *, apart: bool = False) -> ResolvedPart:
        """As one part of a request; a strength below 0 can only be had apart, and 0 is absent."""
        apart = (apart and strength != 0) or strength < 0
        kind, name = self.key
        used = PartUsed(kind=kind, name=name, version=self.version, strength=strength)
        return ResolvedPart(used, Part(self.prefix, 1.0 if apart else strength, course), apart)


def _dialled(found: Found, asked: NamedPart, request: Request) -> float:
    """The strength that is meant."""
    if not request.calibrated or asked.key.kind != "attribute":
        return asked.strength
    if not found.prefix.dial:
        raise RequestError(
            f"{asked.key} version {found.version} has no dial; calibrate it "
            "(controlprefix.evaluation.calibrate), or leave calibrated out"
        )
    return found.prefix.strength_at(asked.strength)
