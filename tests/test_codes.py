"""Codes: a few numbers in the store, the prefix when read, and ties that are never broken."""

import math
from collections.abc import Iterator

import pytest
import torch
from sqlalchemy.engine import make_url

from controlprefix import Geometry, Prefix, PrefixFormatError, StoreError, UnknownNameError
from controlprefix.prefixes.user_code import Code, CodedPrefix, PrefixDecoder
from controlprefix.store import NewVersion, PrefixKey, PrefixStore, profiles, tenant_of
from controlprefix.training.initialization import scale_of

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
F = GEOMETRY.fingerprint
ANA, BO, USERS = PrefixKey("user", "ana"), PrefixKey("user", "bo"), PrefixKey("decoder", "users")


def decoder(seed: int = 0) -> PrefixDecoder:
    start = Prefix.random(GEOMETRY, num_slots=3, scale=1.0, seed=seed)
    made = PrefixDecoder(start, scale_of(start), width=8, hidden=16, features=5, seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():  # away from where it begins, at which codes say nothing
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed)
            )
    return made.frozen()


def coded(by: PrefixDecoder, seed: int = 1) -> CodedPrefix:
    numbers = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    return by.decode(UserCode(by.content_hash, numbers))


def put_both(store: PrefixStore, by: PrefixDecoder) -> None:
    store.put([NewVersion(USERS, by, sources=("ana", "bo", "cy"))])
    store.put([NewVersion(ANA, coded(by))])


@pytest.fixture
def store(url: str) -> Iterator[PrefixStore]:
    with PrefixStore(url) as opened:
        yield opened


def test_a_code_begins_where_its_decoder_does() -> None:
    start = Prefix.random(GEOMETRY, num_slots=3, scale=1.0, seed=0)
    fresh = PrefixDecoder(start, scale_of(start), width=8, hidden=16)
    slots = fresh.slots(torch.randn(3, 8))
    assert torch.equal(slots["decoder"], start.slots["decoder"])


@pytest.mark.parametrize("dtype", [None, "int8", "float32", "bfloat16"])
def test_a_code_survives_its_bytes(dtype: str | None) -> None:
    by = decoder()
    prefix = coded(by)
    data = prefix.to_bytes(dtype)  # type: ignore[arg-type]
    back = by.decode(UserCode.from_bytes(data))
    tolerance = {"float32": 0.0, "bfloat16": 0.02}.get(str(dtype), 0.05)
    assert torch.allclose(back.code.numbers, prefix.code.numbers, atol=tolerance)
    assert torch.allclose(back.slots["decoder"], prefix.slots["decoder"], atol=10 * tolerance)
    assert len(data) < len(Prefix(GEOMETRY, prefix.slots).to_bytes())


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
        decoder(seed=2).decode(coded(by).code)


def test_what_is_read_of_a_code_is_the_prefix(store: PrefixStore) -> None:
    by = decoder()
    put_both(store, by)
    (info,) = store.versions(ANA, F)
    assert (info.dtype, info.num_slots) == ("int8", 3)
    assert info.size_bytes < 600
    expected = by.decode(UserCode.from_bytes(coded(by).to_bytes())).slots["decoder"]
    with PrefixStore(store.url) as fresh:
        for found in (fresh.get(ANA, F).prefix, fresh.fetch([ANA], F)[ANA].prefix):
            assert found is not None
            assert torch.equal(found.slots["decoder"], expected)


def test_a_code_keeps_to_its_own_version_of_the_decoder(store: PrefixStore) -> None:
    by = decoder()
    put_both(store, by)
    before = store.get(ANA, F).prefix.slots["decoder"]
    store.put([NewVersion(USERS, decoder(seed=2))])
    store.put([NewVersion(USERS, decoder(seed=3))])
    assert store.prune(keep=1) == 1  # the second: the first is in use, the third current
    with PrefixStore(store.url) as fresh:
        assert torch.equal(fresh.get(ANA, F).prefix.slots["decoder"], before)
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
    with pytest.raises(UnknownNameError, match="cannot be stored as decoder 'users'"):
        store.put([NewVersion(USERS, Prefix.random(GEOMETRY, num_slots=1))])


def test_another_tenant_has_no_use_of_a_decoder(url: str) -> None:
    with PrefixStore(url, tenant="mine") as mine, PrefixStore(url, tenant="theirs") as theirs:
        by = decoder()
        put_both(mine, by)
        with pytest.raises(StoreError, match="no decoder"):
            theirs.put([NewVersion(ANA, coded(by))])
        theirs.put([NewVersion(USERS, by)])
        put_both(theirs, by)
        mine.forget(ANA)
        assert theirs.get(ANA, F).ref.version == 1
        assert [one.num_forgotten for one in theirs.versions(USERS, F)] == [0, 0]


def test_forgetting_a_user_marks_what_was_learned_from_them(store: PrefixStore) -> None:
    put_both(store, decoder())
    store.keep_profile("bo", "e", [1.0, 0.0], num_texts=3)
    store.forget(ANA)
    store.forget(BO)  # who has no prefix, but a profile, and a part in the decoder
    (info,) = store.versions(USERS, F)
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
        monkeypatch.setattr(profiles, "_numbers", lambda *_: pytest.fail("read and compared here"))

    class OneKey:
        def current_key(self, tenant: str) -> str:
            return "k"

        def key(self, tenant: str, key_id: str) -> bytes:
            return b"k" * 32

    keys = OneKey() if how == "encrypted" else None
    with PrefixStore(url, keys=keys) as store, PrefixStore(url, tenant="theirs") as theirs:
        theirs.keep_profile("spy", "e", [1.0, 0.0], num_texts=1)
        for i, user in enumerate("abcdefg"):
            store.keep_profile(user, "e", [math.cos(i / 3), math.sin(i / 3)], num_texts=1)
        store.keep_profile("a", "other", [0.0, 1.0], num_texts=1)
        store.keep_profile("g", "e", [math.cos(0.1), math.sin(0.1)], num_texts=1)
        found = store.similar_users("e", [2.0, 0.0], most=3, without=["b"])
        assert [one.user for one in found] == ["a", "g", "c"]
        cosines = [1.0, math.cos(0.1), math.cos(2 / 3)]
        assert [one.similarity for one in found] == pytest.approx(cosines, abs=1e-5)


def test_an_export_carries_codes_and_decoders(url: str, tmp_path: object) -> None:
    path = f"{tmp_path}/tenant.zip"
    with PrefixStore(url, tenant="mine") as mine, PrefixStore(url, tenant="copy") as copy:
        put_both(mine, decoder())
        mine.put([NewVersion(PrefixKey("attribute", "a=b"), coded(decoder(), seed=4))])
        before = mine.get(ANA, F).prefix.slots["decoder"]
        mine.export_to(path)
        copy.import_from(path)
        assert torch.equal(copy.get(ANA, F).prefix.slots["decoder"], before)
        with pytest.raises(StoreError, match="2 stored user codes need it"):
            copy.forget(USERS)
        copy.forget(PrefixKey("user", "ana"))
        assert copy.versions(USERS, F)[0].num_forgotten == 1


def test_api_keys_open_their_own_tenant_alone(url: str) -> None:
    with PrefixStore(url, tenant="mine/ü") as mine, PrefixStore(url, tenant="theirs") as theirs:
        key = mine.create_api_key("web")
        assert tenant_of(key) == "mine/ü"
        assert mine.name_of_api_key(key) == "web"
        assert theirs.name_of_api_key(key) is None
        assert mine.name_of_api_key(key + "x") is None
        forged = theirs.create_api_key("web").replace(key.split(".")[1], "x")
        assert mine.name_of_api_key(forged) is None
        with pytest.raises(StoreError, match="an API key 'web' already"):
            mine.create_api_key("web")
        assert [one.name for one in mine.api_keys()] == ["web"]
        mine.revoke_api_key("web")
        assert mine.name_of_api_key(key) is None
        with pytest.raises(UnknownNameError, match="no API key 'web'; known: none"):
            mine.revoke_api_key("web")
    for no_key in ("", "cp", "cp.x", "sk-123", "cp.%%%.secret", "cp..", "cp.gA.x"):
        assert tenant_of(no_key) is None
