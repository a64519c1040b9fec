"""Resolver: from the names in requests to prefixes on the model's device."""

import copy
import threading
from collections.abc import Collection, Hashable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Self

from cachetools import LRUCache

from controlprefix.attributes import AttributeSpace, require_known
from controlprefix.attributes.ordinal import as_number, by_attribute, interpolate
from controlprefix.cancellation import raise_if_stopped
from controlprefix.completion import PartUsed, StandIn
from controlprefix.errors import PrefixFormatError, RequestError, UnknownNameError
from controlprefix.inference.relevance import relevance_of
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest
from controlprefix.inference.unseen_labels import MakePrefix, replace_unseen
from controlprefix.labels import weighted_labels
from controlprefix.model import FrozenModel
from controlprefix.model.condensed_text import prefix_from_text
from controlprefix.prefixes import Part, Prefix, PrefixDecoder, PrefixKey, Schedule, UserCode
from controlprefix.request import AnyRequest, NamedPart, Request
from controlprefix.store import CachedPrefix, PrefixCache, PrefixStore, SingleFlight, StoredVersion

_MAX_CURRENT = 10_000  # names whose current version is remembered
_MAX_TEXT_SLOTS = 1024  # of a request, made from the texts of unseen labels
_MAX_DECODERS = 4  # decoders of user codes kept in memory


class PrefixCaches:
    """What resolvers of one model keep in memory; they may share it, each for its tenant.

    Args:
        max_bytes: Limit of the prefixes kept on the model's device.
    """

    def __init__(self, max_bytes: int = 1 << 29) -> None:
        self.prefixes: PrefixCache[tuple[str, PrefixKey]] = PrefixCache(max_bytes)
        self.decoders: LRUCache[tuple[str, str], PrefixDecoder] = LRUCache(_MAX_DECODERS)
        self.lock = threading.Lock()  # for the decoders

    def forget(self, tenant: str, key: PrefixKey) -> None:
        """Drop a name of a tenant; a decoder with the others."""
        self.prefixes.forget((tenant, key))
        if key.kind == "decoder":
            with self.lock:
                self.decoders.clear()


class Resolver:
    """Finds the prefixes that requests name, for one model and one tenant.

    Results are never stale: which versions are current is queried at every call, unless the
    store can tell that nothing changed. Only bytes that are not in memory are sent, and
    threads that call at the same time share a query. User codes are decoded here.

    Args:
        frozen: The model.
        store: The tenant's store.
        attributes: Default labels and descriptions of attributes, if there are any.
        caches: What is kept in memory; left out, its own.

    Attributes:
        attributes: As given.
        distill: Stores a prefix under a label's key that does what a text says; None where
            `unseen="distill"` is refused.
    """

    distill: MakePrefix | None = None

    def __init__(
        self,
        frozen: FrozenModel,
        store: PrefixStore,
        attributes: AttributeSpace | None = None,
        *,
        caches: PrefixCaches | None = None,
    ) -> None:
        self.attributes = attributes
        self._frozen = frozen
        self._tenant = store.tenant
        self._store = store.for_model(frozen.fingerprint)
        self._last_removal_number = store.last_removal_number
        self._caches = caches or PrefixCaches()
        self._single_flight: SingleFlight[StoredVersion] = SingleFlight()
        # The versions that were current while the store had this change token.
        self._current: tuple[Hashable | None, dict[PrefixKey, StoredVersion]] = (None, {})

    def last_removal_number(self) -> int:
        """See `PrefixStore.last_removal_number`."""
        return self._last_removal_number()

    def without_defaults(self) -> Self:
        """The same resolver without default labels."""
        bare = copy.copy(self)
        if self.attributes is not None:
            bare.attributes = self.attributes.without_defaults()
        return bare

    def with_default_labels(self, requests: Sequence[AnyRequest]) -> list[AnyRequest]:
        """Add the default labels of the attributes that requests leave out.

        Raises:
            UnknownNameError, RequestError: If the attribute space does not allow one.
        """
        if self.attributes is None:
            return list(requests)
        # Labels that are not in the space may get a stand-in, unless they are refused.
        return [
            request.model_copy(
                update={
                    "attributes": self.attributes.with_default_labels(
                        request.attributes, strict=request.unseen == "refuse"
                    )
                }
            )
            for request in requests
        ]

    def resolve(self, requests: Sequence[AnyRequest]) -> list[ResolvedRequest[AnyRequest]]:
        """Resolve requests: default labels, stand-ins for unseen labels, and current prefixes.

        Raises:
            UnknownNameError: With what exists and the nearest match.
            RequestError: If a request cannot be carried out as written. Of several requests,
                either error names the first that it is about.
        """
        try:
            return self._resolve(requests)
        except (UnknownNameError, RequestError) as error:
            if len(requests) > 1 and (place := self._place_of_error(requests)):
                error.args = (f"{place}: {error}",)
            raise

    def _place_of_error(self, requests: Sequence[Request]) -> str:
        """The place of the first request that cannot be resolved by itself; empty if all can."""
        for number, request in enumerate(requests, 1):
            try:
                self._resolve([request])
            except (UnknownNameError, RequestError):
                return request.place(number)
        return ""

    def _resolve(self, requests: Sequence[AnyRequest]) -> list[ResolvedRequest[AnyRequest]]:
        requests = self.with_default_labels(requests)
        stand_ins: list[tuple[StandIn, ...]] = [()] * len(requests)
        text_prefixes: list[dict[PrefixKey, Prefix]] = [{} for _ in requests]
        if any(request.unseen != "refuse" for request in requests):
            trained = {PrefixKey("attribute", name) for name in self._store.names("attribute")}
            if self.attributes is not None:
                trained &= self.attributes.keys()

            by_text: dict[str, Prefix] = {}

            def make_prefix(own: dict[PrefixKey, Prefix], key: PrefixKey, text: str) -> None:
                raise_if_stopped()
                num_tokens = len(self._frozen.request_tokenizer.text_ids(text))
                if num_tokens + sum(p.num_slots for p in own.values()) > _MAX_TEXT_SLOTS:
                    raise RequestError(
                        f"the texts of this request's unseen labels have more than "
                        f"{_MAX_TEXT_SLOTS:,} tokens, each of which becomes a slot; name fewer "
                        "labels, shorten their descriptions, or store their prefixes"
                    )
                if text not in by_text:
                    by_text[text] = self._placed(prefix_from_text(self._frozen, text))
                own[key] = by_text[text]

            replaced = [
                replace_unseen(
                    request, trained, self.attributes, partial(make_prefix, own), self.distill
                )
                for request, own in zip(requests, text_prefixes, strict=True)
            ]
            requests = [request for request, _ in replaced]
            stand_ins = [notes for _, notes in replaced]
        requests, stand_ins = self._interpolate(requests, stand_ins)
        prefixes = self._prefixes_for(requests, text_prefixes)
        relevance: list[dict[PrefixKey, tuple[float, bool]]] = [{} for _ in requests]
        if any(request.when == "relevant" for request in requests):
            relevance = relevance_of(requests, prefixes, self._decode)
        return [
            ResolvedRequest(
                request,
                tuple(
                    _resolve_part(part, own[part.key], request, gates.get(part.key))
                    for part in request.named_parts
                ),
                self._tenant,
                notes,
            )
            for request, own, gates, notes in zip(
                requests, prefixes, relevance, stand_ins, strict=True
            )
        ]

    def current(self, keys: Set[PrefixKey]) -> dict[PrefixKey, StoredVersion]:
        """The current versions of those keys that exist, decoded, on the model's device.

        Raises:
            PrefixFormatError: If one is damaged in the store.
        """
        if not keys:
            return {}
        token, current = self._current
        if token is not None and keys <= current.keys() and token == self._store.change_token():
            cached = self._cached(keys)
            if all(
                key in cached and cached[key].content_hash == current[key].content_hash
                for key in keys
            ):
                return {key: current[key]._replace(value=cached[key].prefix) for key in keys}
        return dict(self._single_flight.fetch(keys, self._query))

    def get(self, key: PrefixKey, *, version: int | str | None = None) -> Prefix:
        """One stored version, decoded; see `ModelStore.get`.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        stored = self._store.get(key, version=version)
        return self.decoded(key, stored)

    def decoded(self, key: PrefixKey, stored: StoredVersion) -> Prefix:
        """A stored version's prefix; a user code is decoded.

        Raises:
            PrefixFormatError: If it is a code and its decoder is not in the store.
            RequestError: If it is a decoder.
        """
        value = stored.value
        if isinstance(value, UserCode):
            name = f"{key} version {stored.version}"
            return self._decoder(value.decoder_hash, name).decode(value)
        if not isinstance(value, Prefix):
            raise RequestError(f"{key} is a decoder of user codes, not a prefix")
        return value

    def forget(self, key: PrefixKey) -> None:
        """Drop a name from memory."""
        self._caches.forget(self._tenant, key)

    def _cached(self, keys: Collection[PrefixKey]) -> dict[PrefixKey, CachedPrefix]:
        entries = self._caches.prefixes.get((self._tenant, key) for key in keys)
        return {key: entry for (_, key), entry in entries.items()}

    def _interpolate(
        self, requests: list[AnyRequest], stand_ins: list[tuple[StandIn, ...]]
    ) -> tuple[list[AnyRequest], list[tuple[StandIn, ...]]]:
        """Numbers without a prefix as mixtures of the trained numbers beside them."""
        has_numbers = any(
            as_number(label) is not None
            for request in requests
            for _, label, _ in weighted_labels(request.attributes)
        )
        if not has_numbers:
            return requests, stand_ins
        keys = {PrefixKey("attribute", name) for name in self._store.names("attribute")}
        labels = by_attribute(keys if self.attributes is None else keys & self.attributes.keys())
        results, notes = [], []
        for request, own_notes in zip(requests, stand_ins, strict=True):
            attributes, replaced = interpolate(request.attributes, labels)
            update = {"attributes": attributes} if replaced else {}
            results.append(request.model_copy(update=update))
            mixtures = [
                StandIn(label=label, how="interpolated", used=used, similarity=1.0)
                for label, used in replaced.items()
            ]
            notes.append((*own_notes, *mixtures))
        return results, notes

    def _prefixes_for(
        self, requests: Sequence[Request], text_prefixes: Sequence[Mapping[PrefixKey, Prefix]]
    ) -> list[Mapping[PrefixKey, StoredVersion]]:
        """The prefixes of each request: those of texts are its own, the others are stored."""
        stored = self.current(
            {
                part.key
                for request, own in zip(requests, text_prefixes, strict=True)
                for part in request.named_parts
                if part.key not in own
            }
        )
        prefixes: list[Mapping[PrefixKey, StoredVersion]] = []
        for request, own in zip(requests, text_prefixes, strict=True):
            from_texts = {key: StoredVersion(0, "", prefix) for key, prefix in own.items()}
            for part in request.named_parts:
                if part.key not in stored and part.key not in from_texts:
                    raise self._unknown(part.key, request)
            prefixes.append({**stored, **from_texts} if from_texts else stored)
        return prefixes

    def _query(self, keys: Collection[PrefixKey]) -> dict[PrefixKey, StoredVersion]:
        token = self._store.change_token()  # before the query: a later change is not missed
        cached = {entry.content_hash: entry.prefix for entry in self._cached(keys).values()}
        fetched = self._store.fetch(keys, known_hashes=cached.keys())
        result: dict[PrefixKey, StoredVersion] = {}
        for key, stored in fetched.items():
            if stored.value is None:
                prefix = cached[stored.content_hash]
            else:
                decoded = self.decoded(key, stored).to(dtype=self._frozen.dtype)
                prefix = self._placed(decoded.require_finite(str(key)))
            self._caches.prefixes.put((self._tenant, key), stored.content_hash, prefix)
            result[key] = stored._replace(value=prefix)
        for key in set(keys) - fetched.keys():  # forgotten since, maybe by another process
            self.forget(key)
        previous_token, current = self._current
        entries = current if token == previous_token and len(current) < _MAX_CURRENT else {}
        references = {key: stored._replace(value=None) for key, stored in fetched.items()}
        self._current = (token, {**entries, **references})
        return result

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._frozen.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _placed(self, prefix: Prefix) -> Prefix:
        return prefix.to(device=self._frozen.device, dtype=self._frozen.dtype)

    def _decoder(self, decoder_hash: str, name: str) -> PrefixDecoder:
        with self._caches.lock:
            decoder = self._caches.decoders.get((self._tenant, decoder_hash))
        if decoder is None:
            decoder = self._store.decoder_by_hash(decoder_hash)
            if decoder is None:
                raise PrefixFormatError(
                    f"{name} is a code of decoder {decoder_hash[:19]}, which is not in the store; "
                    "train or enroll the user again"
                )
            with self._caches.lock:
                self._caches.decoders[self._tenant, decoder_hash] = decoder
        return decoder

    def _unknown(self, key: PrefixKey, request: Request) -> Exception:
        if key.kind == "attribute":
            trained = [PrefixKey("attribute", name) for name in self._store.names("attribute")]
            require_known(weighted_labels(request.attributes), trained)
        return self._store.unknown_name(key)


def part_at_strength(
    key: PrefixKey, stored: StoredVersion, strength: float, schedule: Schedule = ()
) -> ResolvedPart:
    """A stored prefix as a part; strengths below 0 of joint ones are applied in logit space."""
    assert isinstance(stored.value, Prefix)
    used = PartUsed(kind=key.kind, name=key.name, version=stored.version, strength=strength)
    if strength < 0 and stored.value.form == "joint":
        return ResolvedPart(used, Part(stored.value, 1.0, schedule), in_logit_space=True)
    return ResolvedPart(used, Part(stored.value, strength, schedule))


def _resolve_part(
    named: NamedPart,
    stored: StoredVersion,
    request: Request,
    relevance: tuple[float, bool] | None,
) -> ResolvedPart:
    key, strength, schedule = named
    if relevance is not None:
        similarity, is_meant = relevance
        resolved = _resolve_part(
            NamedPart(key, strength if is_meant else 0.0, schedule), stored, request, None
        )
        used = resolved.used.model_copy(update={"relevance": round(similarity, 4)})
        return replace(resolved, used=used)
    is_label = key.kind == "attribute"
    if request.calibrated and is_label:
        prefix = stored.value
        assert isinstance(prefix, Prefix)
        if not prefix.dial and strength not in (0.0, 1.0):  # of which each dial makes the same
            raise RequestError(
                f"{key} version {stored.version} has no dial; calibrate it "
                "(controlprefix.evaluation.calibrate), or leave calibrated out"
            )
        strength = prefix.strength_at(strength) if prefix.dial else strength
    resolved = part_at_strength(key, stored, strength, schedule)
    if request.mixing == "logits" and is_label and strength != 0:  # 0 is absent in either way
        part = Part(resolved.part.prefix, 1.0, schedule)
        return ResolvedPart(resolved.used, part, in_logit_space=True)
    return resolved
