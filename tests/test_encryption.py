"""Encrypted stores: unreadable without the key, rotated while in use, never mixed up."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from controlprefix import PrefixFormatError, StoreError, StoreKeyError
from controlprefix.store import JsonEncryptionKeys, PrefixStore, Profile
from controlprefix.store.encryption import KeyFile, TenantCipher

from helpers import Keys, payload_of, prefix_of
from stores import ANA, BO, F, new


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    built = Keys(tmp_path / "keys.json")
    built.use("k1")
    return built


@pytest.fixture
def store(url: str, keys: Keys) -> Iterator[PrefixStore]:
    with PrefixStore(url, tenant="mine", encryption_keys=keys) as opened:
        yield opened


def test_stored_bytes_show_nothing_and_come_back(tmp_path: Path, keys: Keys) -> None:
    file = tmp_path / "prefixes.db"
    payload = payload_of(new())
    numbers = prefix_of(new()).slots["decoder"].numpy().tobytes()
    with PrefixStore(f"sqlite:///{file}", tenant="plain") as plain:
        plain.put([new()])
    assert numbers in file.read_bytes()  # what the next lines must not find
    file.unlink()
    with PrefixStore(f"sqlite:///{file}", tenant="mine", encryption_keys=keys) as store:
        store.put([new()])
        assert payload_of(store.for_model(F).get(ANA)) == payload
        fetched = store.for_model(F).fetch([ANA])[ANA].value
        assert fetched is not None
        assert fetched.to_bytes() == payload
    assert numbers not in file.read_bytes()
    assert b"safetensors" not in file.read_bytes()


def test_without_the_key_or_with_another_it_says_so(store: PrefixStore, keys: Keys) -> None:
    store.put([new()])
    with PrefixStore(store.url, tenant="mine") as keyless:
        for read in (
            lambda: keyless.for_model(F).get(ANA),
            lambda: keyless.for_model(F).fetch([ANA]),
        ):
            with pytest.raises(
                StoreKeyError, match="encrypted with the key 'k1'; open the store w"
            ):
                read()
        assert keyless.for_model(F).versions(ANA)[0].num_slots == 3
    keys.keys["k1"] = base64.b64encode(os.urandom(32)).decode()
    keys.use("k1")
    with pytest.raises(StoreKeyError, match="version 1 for model .* cannot be decrypted"):
        store.for_model(F).get(ANA)
    assert [whole for *_, whole in store.verify()] == [False]
    keys.keys["k1"] = base64.b64encode(b"short").decode()
    keys.use("k1")
    with pytest.raises(StoreKeyError, match="is not 16, 24 or 32 bytes"):
        store.put([new()])
    keys.keys.clear()
    keys.use("k2")
    with pytest.raises(StoreKeyError, match="there is no key 'k1' for tenant 'mine'"):
        store.for_model(F).get(ANA)
    keys.path.write_text("{")
    with pytest.raises(StoreError, match="cannot read the encryption keys in"):
        store.put([new()])


def test_keys_are_rotated_while_the_store_is_in_use(store: PrefixStore, keys: Keys) -> None:
    for seed in range(3):
        store.put([new(seed=seed), new(BO, seed=seed + 10)])
    keys.use("k2")
    store.put([new(seed=3)])
    for version, seed in ((1, 0), (4, 3)):  # one of the old key, one of the new
        payload = payload_of(store.for_model(F).get(ANA, version=version))
        assert payload == payload_of(new(seed=seed))
    assert store.rotate_keys() == 6
    assert store.rotate_keys() == 0
    del keys.keys["k1"]
    keys.use("k2")
    assert all(whole for *_, whole in store.verify())
    assert payload_of(store.for_model(F).get(BO)) == payload_of(new(BO, 12))
    keys.use(None)
    store.put([new(BO, seed=20)])
    with PrefixStore(store.url, tenant="mine") as keyless:
        assert payload_of(keyless.for_model(F).get(BO)) == payload_of(new(seed=20))


def test_kept_texts_are_encrypted_rotated_and_forgotten(
    store: PrefixStore, keys: Keys, url: str
) -> None:
    secret = "meet me at the old mill"
    store.keep_texts("ana", [secret, "second"])
    store.keep_profile("ana", Profile("e", [1.0, 0.0], num_texts=2))
    store.put([new()])
    keys.use("k2")
    store.keep_texts("ana", ["third", secret, "third"])  # each once
    assert store.rotate_keys() == 1
    del keys.keys["k1"]
    keys.use("k2")
    assert store.user_texts("ana") == [secret, "second", "third"]
    assert store.user_texts("bo") == []
    assert store.similar_users("e", [1.0, 0.0]) == [("ana", 1.0)]
    assert store.keep_feedback("ana", [secret]) == 1
    assert store.feedback("ana") == [secret]
    if url.startswith("sqlite"):
        file = Path(url.removeprefix("sqlite:///"))
        assert secret.encode() not in file.read_bytes()
    with PrefixStore(url, tenant="theirs") as other:
        assert other.user_texts("ana") == []
        assert other.feedback("ana") == []
    store.forget(ANA)
    assert store.user_texts("ana") == []
    assert store.feedback("ana") == []
    store.keep_texts("bo", ["only a text"])
    assert store.forget(BO) == 0  # there is something to forget, though no version


def test_bytes_moved_to_another_place_do_not_open(store: PrefixStore) -> None:
    """Someone who can write the database cannot give a user another's prefix, or an old one."""
    store.put([new(seed=1), new(BO, seed=2)])
    store.put([new(seed=3)])
    first = "SELECT payload FROM controlprefix_payloads WHERE prefix_id = 1 AND version = 1"
    engine = sqlalchemy.create_engine(store.url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(
                sqlalchemy.text("SELECT set_config('controlprefix.tenant','1',true)")
            )
        connection.execute(
            sqlalchemy.text(
                f"UPDATE controlprefix_payloads SET payload = ({first})"
                " WHERE prefix_id = 2 OR version = 2"
            )
        )
    engine.dispose()
    for key in (ANA, BO):
        with pytest.raises((StoreKeyError, PrefixFormatError), match="cannot be decrypted"):
            store.for_model(F).get(key)
    assert payload_of(store.for_model(F).get(ANA, version=1)) == payload_of(new(seed=1))


def test_an_export_is_readable_and_is_encrypted_again_on_the_way_in(
    store: PrefixStore, keys: Keys, tmp_path: Path
) -> None:
    store.put([new(seed=1)])
    store.export_to(tmp_path / "one.zip")
    store.forget(ANA)
    store.import_from(tmp_path / "one.zip")
    assert payload_of(store.for_model(F).get(ANA)) == payload_of(new(seed=1))
    with PrefixStore(store.url, tenant="mine") as keyless:
        with pytest.raises(StoreKeyError):
            keyless.for_model(F).get(ANA)
    with PrefixStore(
        store.url, tenant="theirs", encryption_keys=keys
    ) as other:  # has no key: plain
        other.import_from(tmp_path / "one.zip")
        assert payload_of(other.for_model(F).get(ANA)) == payload_of(new(seed=1))


def test_a_tenant_without_a_key_is_warned_of(
    keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys.use("k1")
    with PrefixStore(f"sqlite:///{tmp_path}/x.db", tenant="mine", encryption_keys=keys) as store:
        store.keep_texts("ana", ["a text"])
        assert "stored in plain" not in caplog.text
        other = store.for_tenant("other")
        for _ in range(2):
            other.keep_texts("ana", ["a text"])
    assert caplog.text.count("no encryption key for tenant 'other': stored in plain") == 1


def test_bytes_moved_to_another_tenant_do_not_open(tmp_path: Path) -> None:
    """With one key for all, which alone does not hold tenants apart."""
    (tmp_path / "key").write_text(base64.b64encode(os.urandom(32)).decode())
    keys = KeyFile(tmp_path / "key")
    sealed, key_id = TenantCipher("mine", keys).encrypt(b"x", "user 'ana' version 1")
    assert TenantCipher("mine", keys).decrypt(sealed, key_id, "user 'ana' version 1") == b"x"
    with pytest.raises(StoreKeyError, match="cannot be decrypted"):
        TenantCipher("theirs", keys).decrypt(sealed, key_id, "user 'ana' version 1")


def test_a_key_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path, url = tmp_path / "keys.json", f"sqlite:///{tmp_path}/prefixes.db"
    for content, message in (
        ('{"mine": {"current": "k2", "keys": {"k1": "YQ=="}}}', "is not among its keys"),
        ("{", "Expecting"),
    ):
        path.write_text(content)
        with (
            PrefixStore(url, tenant="mine", encryption_keys=JsonEncryptionKeys(path)) as store,
            pytest.raises(StoreKeyError, match=message),
        ):
            store.put([new()])
    path.write_text('{"mine": {"current": "k1", "keys": {"k1": "YWJj"}}}')
    with (
        PrefixStore(url, tenant="mine", encryption_keys=JsonEncryptionKeys(path)) as store,
        pytest.raises(StoreKeyError, match="is not 16, 24 or 32 bytes"),
    ):
        list(store.verify())


def test_verifying_does_not_say_that_something_is_stored(
    url: str, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    with PrefixStore(url, tenant="other", encryption_keys=keys) as store:
        assert list(store.verify()) == []
    assert not caplog.messages
