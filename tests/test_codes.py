"""Codes: a few numbers in the store, the prefix when read, and ties that are never broken."""

import math
from collections.abc import Iterator

import pytest
import torch
from sqlalchemy.engine import make_url

from controlprefix import Prefix, PrefixFormatError, StoreError, UnknownNameError
from controlprefix.prefixes.user_code import CodePredictor, PrefixDecoder, UserCode
from controlprefix.store import NewVersion, PrefixKey, PrefixStore, Profile, profiles, tenant_of
from controlprefix.training.initialization import scale_of

from helpers import coded, decoder
from stores import ANA, BO, GEOMETRY, F

USERS = PrefixKey("decoder", "users")


def prefix_of(store: PrefixStore, key: PrefixKey) -> Prefix:
    """The prefix that a stored code decodes to."""
    code = store.for_model(F).get(key).value
    assert isinstance(code, UserCode)
    by = store.for_model(F).decoder_by_hash(code.decoder_hash)
    assert by is not None
    return by.decode(code)


def put_both(store: PrefixStore, by: PrefixDecoder) -> None:
    store.put([NewVersion(USERS, by, sources=("ana", "bo", "cy"))])
    store.put([NewVersion(ANA, coded(by))])


@pytest.fixture
def store(url: str) -> Iterator[PrefixStore]:
    with PrefixStore(url) as opened:
        yield opened


def test_a_code_begins_where_its_decoder_does() -> None:
    start = Prefix.random(GEOMETRY, num_slots=3, scale=1.0, seed=0)
    fresh = PrefixDecoder(start, scale_of(start), width=8, hidden_size=16)
    slots = fresh.slots(torch.randn(3, 8))
    assert torch.equal(slots["decoder"], start.slots["decoder"])


@pytest.mark.parametrize("dtype", [None, "int8", "float32", "bfloat16"])
def test_a_code_survives_its_bytes(dtype: str | None) -> None:
    by = decoder()
    code = coded(by)
    data = code.to_bytes(dtype)  # type: ignore[arg-type]
    back = UserCode.from_bytes(data)
    tolerance = {"float32": 0.0, "bfloat16": 0.02}.get(str(dtype), 0.05)
    assert torch.allclose(back.values, code.values, atol=tolerance)
    slots = by.decode(code).slots
    assert torch.allclose(by.decode(back).slots["decoder"], slots["decoder"], atol=10 * tolerance)
    assert len(data) < len(by.decode(code).to_bytes())


def test_texts_that_are_added_to_a_code_count_as_much_as_the_first() -> None:
    by = decoder()
    generator = torch.Generator().manual_seed(3)
    predictor = by.predictor
    predictor.weights.copy_(torch.randn(predictor.weights.shape, generator=generator))
    predictor.mean_code.copy_(torch.randn(predictor.mean_code.shape, generator=generator))
    predictor.pseudo_count.fill_(4.0)
    features = torch.randn(9, predictor.num_features, generator=generator)
    code, count = by.predict_code(features[:2]), 2
    for new in (features[2:3], features[3:9]):
        code = by.merged_code(code, count, by.predict_code(new), len(new))
        count += len(new)
    torch.testing.assert_close(code.values, by.predict_code(features).values)


def test_bytes_that_are_no_code_or_no_decoder_are_refused() -> None:
    by = decoder()
    damaged = bytearray(by.to_bytes())
    damaged[-1] ^= 1
    with pytest.raises(PrefixFormatError, match="damaged"):
        PrefixDecoder.from_bytes(bytes(damaged))
    with pytest.raises(PrefixFormatError, match="not a decoder"):
        PrefixDecoder.from_bytes(coded(by).to_bytes())
    with pytest.raises(PrefixFormatError, match="not a user code"):
        UserCode.from_bytes(by.to_bytes())
    with pytest.raises(PrefixFormatError, match="not a prefix"):
        Prefix.from_bytes(coded(by).to_bytes())
    with pytest.raises(PrefixFormatError, match="NaN"):
        UserCode(by.content_hash, torch.full((3, 8), math.nan)).to_bytes()
    with pytest.raises(PrefixFormatError, match="cannot be read by decoder"):
        decoder(seed=2).decode(coded(by))


def test_what_is_read_of_a_code_is_the_prefix(store: PrefixStore) -> None:
    by = decoder()
    put_both(store, by)
    (info,) = store.for_model(F).versions(ANA)
    assert (info.dtype, info.num_slots) == ("int8", 3)
    assert info.size_bytes < 600
    expected = by.decode(UserCode.from_bytes(coded(by).to_bytes())).slots["decoder"]
    with PrefixStore(store.url) as fresh:
        assert torch.equal(prefix_of(fresh, ANA).slots["decoder"], expected)
        fetched = fresh.for_model(F).fetch([ANA])[ANA].value
        assert isinstance(fetched, UserCode)
        assert torch.equal(by.decode(fetched).slots["decoder"], expected)


def test_a_code_keeps_to_its_own_version_of_the_decoder(store: PrefixStore) -> None:
    by = decoder()
    put_both(store, by)
    before = prefix_of(store, ANA).slots["decoder"]
    store.put([NewVersion(USERS, decoder(seed=2))])
    store.put([NewVersion(USERS, decoder(seed=3))])
    assert store.prune(keep=1) == 1  # the second: the first is in use, the third current
    with PrefixStore(store.url) as fresh:
        assert torch.equal(prefix_of(fresh, ANA).slots["decoder"], before)
        with pytest.raises(StoreError, match="1 stored user codes need it"):
            fresh.forget(USERS)
        fresh.forget(ANA)
        assert fresh.prune(keep=1) == 1
        assert fresh.forget(USERS) == 1


def test_a_code_without_its_decoder_is_not_stored(store: PrefixStore) -> None:
    with pytest.raises(StoreError, match="no decoder sha256:"):
        store.put([NewVersion(ANA, coded(decoder()))])
    assert store.prefixes() == []
    with pytest.raises(UnknownNameError, match="cannot be stored as user 'ana'"):
        store.put([NewVersion(ANA, decoder())])
    with pytest.raises(UnknownNameError, match="cannot be stored as attribute 'a=b'"):
        store.put([NewVersion(PrefixKey("attribute", "a=b"), coded(decoder()))])
    with pytest.raises(UnknownNameError, match="cannot be stored as decoder 'users'"):
        store.put([NewVersion(USERS, Prefix.random(GEOMETRY, num_slots=1))])


def test_another_tenant_has_no_use_of_a_decoder(url: str) -> None:
    with PrefixStore(url, tenant="mine") as own_store, PrefixStore(url, tenant="theirs") as other:
        by = decoder()
        put_both(own_store, by)
        with pytest.raises(StoreError, match="no decoder"):
            other.put([NewVersion(ANA, coded(by))])
        other.put([NewVersion(USERS, by)])
        put_both(other, by)
        own_store.forget(ANA)
        assert other.for_model(F).get(ANA).version == 1
        assert [version.num_forgotten for version in other.for_model(F).versions(USERS)] == [0, 0]


def test_forgetting_a_user_marks_what_was_learned_from_them(store: PrefixStore) -> None:
    put_both(store, decoder())
    store.keep_profile("bo", Profile("e", [1.0, 0.0], num_texts=3))
    store.forget(ANA)
    store.forget(BO)  # who has no prefix, but a profile, and a part in the decoder
    (info,) = store.for_model(F).versions(USERS)
    assert info.num_forgotten == 2
    assert store.similar_users("e", [1.0, 0.0]) == []
    for user in (ANA, BO):
        with pytest.raises(UnknownNameError, match="no user"):
            store.forget(user)


@pytest.mark.parametrize("how", ["in memory", "encrypted", "pgvector"])
def test_similar_users_come_first(
    url: str, how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "pgvector":
        if url.startswith("sqlite"):
            pytest.skip("PostgreSQL's")
        server = request.getfixturevalue("postgres")  # the role of the tests may not
        server.psql(f'\\connect "{make_url(url).database}"\nCREATE EXTENSION vector')
        monkeypatch.setattr(
            profiles, "_read_values", lambda *_: pytest.fail("read and compared here")
        )

    class OneKey:
        def current_key_id(self, tenant: str) -> str:
            return "k"

        def key(self, tenant: str, key_id: str) -> bytes:
            return b"k" * 32

    keys = OneKey() if how == "encrypted" else None
    with (
        PrefixStore(url, encryption_keys=keys) as store,
        PrefixStore(url, tenant="theirs") as other,
    ):
        other.keep_profile("spy", Profile("e", [1.0, 0.0], num_texts=1))
        for i, user in enumerate("abcdefg"):
            store.keep_profile(user, Profile("e", [math.cos(i / 3), math.sin(i / 3)], num_texts=1))
        store.keep_profile("a", Profile("other", [0.0, 1.0], num_texts=1))
        store.keep_profile("g", Profile("e", [math.cos(0.1), math.sin(0.1)], num_texts=1))
        # An earlier model under the same name had larger embeddings.
        store.keep_profile("early", Profile("e", [1.0, 0.0, 0.0], num_texts=1))
        result = store.similar_users("e", [2.0, 0.0], limit=3, exclude=["b"])
        assert [item.user for item in result] == ["a", "g", "c"]
        cosines = [1.0, math.cos(0.1), math.cos(2 / 3)]
        assert [item.similarity for item in result] == pytest.approx(cosines, abs=1e-5)


def test_an_export_carries_codes_and_decoders(url: str, tmp_path: object) -> None:
    path = f"{tmp_path}/tenant.zip"
    with PrefixStore(url, tenant="mine") as own_store, PrefixStore(url, tenant="copy") as copy:
        put_both(own_store, decoder())
        own_store.put([NewVersion(BO, coded(decoder(), seed=4))])
        before = prefix_of(own_store, ANA).slots["decoder"]
        own_store.export_to(path)
        copy.import_from(path)
        assert torch.equal(prefix_of(copy, ANA).slots["decoder"], before)
        with pytest.raises(StoreError, match="2 stored user codes need it"):
            copy.forget(USERS)
        copy.forget(ANA)
        assert copy.for_model(F).versions(USERS)[0].num_forgotten == 1


def test_api_keys_open_their_own_tenant_alone(url: str) -> None:
    with PrefixStore(url, tenant="mine/ü") as own_store, PrefixStore(url, tenant="theirs") as other:
        key = own_store.create_api_key("web")
        assert tenant_of(key) == "mine/ü"
        assert own_store.name_of_api_key(key) == "web"
        assert other.name_of_api_key(key) is None
        assert own_store.name_of_api_key(key + "x") is None
        forged = other.create_api_key("web").replace(key.split(".")[1], "x")
        assert own_store.name_of_api_key(forged) is None
        with pytest.raises(StoreError, match="an API key 'web' already"):
            own_store.create_api_key("web")
        assert [api_key.name for api_key in own_store.api_keys()] == ["web"]
        own_store.revoke_api_key("web")
        assert own_store.name_of_api_key(key) is None
        with pytest.raises(UnknownNameError, match="no API key 'web'; known: none"):
            own_store.revoke_api_key("web")
    for no_key in ("", "cp", "cp.x", "sk-123", "cp.%%%.secret", "cp..", "cp.gA.x"):
        assert tenant_of(no_key) is None


def test_an_unusual_text_does_not_lead_far_away() -> None:
    predictor = CodePredictor(num_features=2, code_size=3)
    predictor.feature_std.fill_(0.5)
    shrunk = predictor.shrunk_features(torch.tensor([[100.0, -1.0]]))
    assert shrunk.tolist() == [2.0, -1.0]  # half of 4 deviations, and of 2
