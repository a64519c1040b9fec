"""Stores of version 0.1.0, whose fingerprints had parameter names in them."""

from dataclasses import replace

import pytest

from controlprefix import ControlPrefix, GeometryMismatchError, Prefix, StoreError, embeddings
from controlprefix.engine.rebinding import rebind
from controlprefix.model.fingerprint import first_fingerprint
from controlprefix.prefixes import PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import NewVersion

from helpers import Letters, engine


def older_store(cp: ControlPrefix) -> dict[PrefixKey, Prefix]:
    """Prefixes as version 0.1.0 stored them for this model."""
    geometry = replace(cp.geometry, fingerprint=first_fingerprint(cp.model), shift=None)
    keys = [PrefixKey("task", "t"), PrefixKey("user", "ana"), PrefixKey("attribute", "tone=warm")]
    prefixes = {
        key: Prefix.random(geometry, num_slots=3, seed=i, scale=1.0) for i, key in enumerate(keys)
    }
    cp.store.put([NewVersion(key, prefix, {"made": "once"}) for key, prefix in prefixes.items()])
    return prefixes


def test_prefixes_of_an_older_store_steer_again() -> None:
    cp = engine()
    prefixes = older_store(cp)
    assert cp.names("task") == []
    assert set(rebind(cp)) == set(prefixes)
    for key, prefix in prefixes.items():
        stored = cp.get(*key)
        assert stored.slots["decoder"].equal(prefix.slots["decoder"])
        (info,) = cp.versions(*key)
        assert info.details["made"] == "once"
        assert info.details["rebound"]["from"] == first_fingerprint(cp.model)
    cp.generate("Hi", task="t", user="ana", attributes={"tone": "warm"}, max_new_tokens=2)
    assert rebind(cp) == []  # a second time there is nothing left


def test_decoders_and_codes_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
    cp = engine()
    texts = {f"u{i}": [f"text {i} of mine"] * 2 for i in range(3)}
    cp.learn_decoder(texts, num_slots=2, width=4, steps=1, progress=False)
    cp.enroll("ana", ["words of ana"], decoder="users")
    expected = cp.get("user", "ana")
    other = engine()
    geometry = replace(other.geometry, fingerprint=first_fingerprint(other.model), shift=None)
    own = cp.store.for_model(cp.geometry.fingerprint)
    decoder = own.get(PrefixKey("decoder", "users")).value
    assert isinstance(decoder, PrefixDecoder)
    decoder.geometry = geometry
    other.store.put([NewVersion(PrefixKey("decoder", "users"), decoder)])
    earlier = other.store.for_model(geometry.fingerprint)
    content_hash = earlier.get(PrefixKey("decoder", "users")).content_hash
    code = own.get(PrefixKey("user", "ana")).value
    assert isinstance(code, UserCode)
    older = replace(code, decoder_hash=content_hash)
    other.store.put([NewVersion(PrefixKey("user", "ana"), older)])
    assert set(rebind(other)) == {PrefixKey("decoder", "users"), PrefixKey("user", "ana")}
    assert other.get("user", "ana").slots["decoder"].equal(expected.slots["decoder"])


@pytest.mark.slow
def test_codes_keep_to_their_version_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
    cp, key = engine(), PrefixKey("decoder", "users")
    texts = {f"u{i}": [f"text {i} of mine"] * 2 for i in range(3)}
    own = cp.store.for_model(cp.geometry.fingerprint)
    other = engine()
    geometry = replace(other.geometry, fingerprint=first_fingerprint(other.model), shift=None)
    earlier = other.store.for_model(geometry.fingerprint)
    expected = {}
    for seed, user in enumerate(("ana", "bo")):  # each with another version of the decoder
        cp.learn_decoder(texts, num_slots=2, width=4, steps=1, seed=seed, progress=False)
        cp.enroll(user, [f"words of {user}"], decoder="users")
        expected[user] = cp.get("user", user)
        decoder, code = own.get(key).value, own.get(PrefixKey("user", user)).value
        assert isinstance(decoder, PrefixDecoder)
        assert isinstance(code, UserCode)
        decoder.geometry = geometry
        other.store.put([NewVersion(key, decoder)])
        older = replace(code, decoder_hash=earlier.get(key).content_hash)
        other.store.put([NewVersion(PrefixKey("user", user), older)])
    other.learn_decoder(texts, num_slots=2, width=4, steps=1, seed=5, progress=False)
    with pytest.raises(StoreError, match="exists for this model already"):
        rebind(other)  # codes would be read by a decoder that they are not of
    assert other.names("user") == []
    fresh = engine()
    for number in (1, 2):
        value = earlier.get(key, version=number).value
        assert value is not None
        fresh.store.put([NewVersion(key, value)])
    for user_key in (PrefixKey("user", "ana"), PrefixKey("user", "bo")):
        value = earlier.get(user_key).value
        assert value is not None
        fresh.store.put([NewVersion(user_key, value)])
    assert set(rebind(fresh)) == {key, PrefixKey("user", "ana"), PrefixKey("user", "bo")}
    assert rebind(fresh) == []
    for user, prefix in expected.items():
        assert fresh.get("user", user).slots["decoder"].equal(prefix.slots["decoder"])


def test_prefixes_of_another_model_are_not_taken() -> None:
    cp = engine()
    older_store(cp)
    store = cp.store
    changed = engine()
    for parameter in changed.model.parameters():
        parameter.data.mul_(1.5)
    other = ControlPrefix.from_pretrained(
        changed.model, tokenizer=changed.tokenizer, store="sqlite://"
    )
    other.store = store
    with pytest.raises(GeometryMismatchError, match="nothing in the store was made for these"):
        rebind(other)
    assert store.for_model(other.geometry.fingerprint).names("task") == []
