"""The store: versions, tenants, and nothing half-written."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from controlprefix import (
    Geometry,
    PrefixFormatError,
    RequestError,
    StoreError,
    UnknownNameError,
    VersionConflictError,
)
from controlprefix.store import (
    NewVersion,
    PrefixKey,
    PrefixStore,
    versions,
)

from helpers import payload_of, prefix_of, raw
from stores import ANA, BO, GEOMETRY, F, new


@pytest.fixture
def store(empty_store: PrefixStore) -> PrefixStore:
    return empty_store


def test_put_then_get_returns_equal_tensors_after_reopening(url: str) -> None:
    with PrefixStore(url) as first:
        assert first.put([new(seed=1)]) == [1]
        assert first.put([new(seed=2)]) == [2]
    with PrefixStore(url) as again:
        current, earlier = again.for_model(F).get(ANA), again.for_model(F).get(ANA, version=1)
    assert (current.version, earlier.version) == (2, 1)
    for result, seed in ((current, 2), (earlier, 1)):
        assert payload_of(result) == payload_of(new(seed=seed))
        assert prefix_of(result).geometry == GEOMETRY


def test_versions_say_what_is_current_and_rollback_moves_it(store: PrefixStore) -> None:
    for seed in (1, 2, 3):
        store.put([new(seed=seed)])
    store.for_model(F).rollback(ANA, to=1)
    result = store.for_model(F).versions(ANA)
    assert [(v.version, v.current, v.details["seed"]) for v in result] == [
        (1, True, 1),
        (2, False, 2),
        (3, False, 3),
    ]
    assert store.for_model(F).get(ANA).version == 1
    assert store.put([new(seed=4)]) == [4]  # numbers are never used twice
    assert store.for_model(F).get(ANA).version == 4
    with pytest.raises(UnknownNameError, match="user 'ana' has no version 9; it has: 1, 2, 3, 4"):
        store.for_model(F).rollback(ANA, to=9)


def test_forget_removes_every_version_for_every_model(store: PrefixStore) -> None:
    other = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="0" * 64)
    store.put([new(seed=1)])
    store.put([new(geometry=other)])
    store.for_model(F).alias(ANA, "canary", to=1)
    store.put([new(PrefixKey("user", "bo"))])
    assert store.forget(ANA) == 2
    assert store.for_model(F).names("user") == ["bo"]
    with pytest.raises(UnknownNameError, match="no user 'ana' in the store; enroll"):
        store.for_model(F).get(ANA)
    with pytest.raises(UnknownNameError, match="no user 'ana'"):
        store.forget(ANA)
    for table in ("prefixes", "versions", "payloads", "aliases"):
        (rows,) = raw(store.url, f"SELECT count(*) FROM controlprefix_{table}")
        assert rows[0] == (0 if table == "aliases" else 1), table
    entry, repeated = store.audit_log()
    assert store.audit_log(after=entry.number) == [repeated]
    assert (entry.action, entry.key, entry.num_versions) == ("forget", ANA, 2)
    assert (repeated.action, repeated.key, repeated.num_versions) == ("forget", ANA, 0)
    assert datetime.now(UTC) - entry.at.replace(tzinfo=UTC) < timedelta(minutes=5)


def test_publishing_several_is_all_or_nothing(store: PrefixStore) -> None:
    broken = new(PrefixKey("user", "bo"))
    prefix_of(broken).slots["decoder"][0, 0] = float("nan")
    with pytest.raises(PrefixFormatError):
        store.put([new(), broken])
    with pytest.raises(UnknownNameError, match="is not 1 to 255 printable"):
        store.put([new(), new(PrefixKey("user", ""))])
    assert store.prefixes() == []


def test_names_that_could_confuse_are_refused(store: PrefixStore) -> None:
    for bad in ("", "a" * 256, "ana\n", "ana\x00"):
        with pytest.raises(UnknownNameError):
            store.put([new(PrefixKey("user", bad))])
    with pytest.raises(UnknownNameError, match="attribute=label"):
        store.put([new(PrefixKey("attribute", "formal"))])
    with pytest.raises(UnknownNameError, match="unknown kind 'tone'"):
        store.put([new(PrefixKey("tone", "warm"))])  # type: ignore[arg-type]
    quote = PrefixKey("user", "o'brien; drop table prefixes --")
    store.put([new(quote)])
    assert store.for_model(F).get(quote).version == 1


def test_another_models_prefix_is_refused_by_name(store: PrefixStore) -> None:
    store.put([new()])
    with pytest.raises(UnknownNameError, match="user 'ana' has no prefix for this model, only"):
        store.for_model("0" * 64).get(ANA)


def test_damaged_bytes_are_named_and_the_newest_whole_version_is_offered(
    store: PrefixStore,
) -> None:
    for seed in (1, 2, 3):
        store.put([new(seed=seed)])
    raw(store.url, "UPDATE controlprefix_payloads SET payload = :p WHERE version > 1", p=b"\0" * 9)
    expected = "user 'ana' version 3 is damaged .* wrong hash; roll back to version 1"
    with pytest.raises(PrefixFormatError, match=expected):
        store.for_model(F).get(ANA)
    with pytest.raises(PrefixFormatError, match=expected):
        store.for_model(F).fetch([ANA])
    assert list(store.verify()) == [(ANA, 1, True), (ANA, 2, False), (ANA, 3, False)]
    store.for_model(F).rollback(ANA, to=1)
    assert store.for_model(F).get(ANA).version == 1
    raw(store.url, "DELETE FROM controlprefix_payloads")
    for read in (lambda: store.for_model(F).get(ANA), lambda: store.for_model(F).fetch([ANA])):
        with pytest.raises(PrefixFormatError, match="its bytes are gone; train it again"):
            read()


def test_fetch_sends_what_the_caller_does_not_have(store: PrefixStore) -> None:
    keys = [PrefixKey("user", n) for n in ("ana", "bo")] + [PrefixKey("task", "note")]
    store.put([new(key, seed=i) for i, key in enumerate(keys)])
    first = store.for_model(F).fetch([*keys, PrefixKey("user", "nobody")])
    assert first.keys() == set(keys)
    known_hashes = [first[keys[0]].content_hash]
    again = store.for_model(F).fetch(keys, known_hashes=known_hashes)
    assert [again[key].value is None for key in keys] == [True, False, False]
    assert [again[key][:2] for key in keys] == [first[key][:2] for key in keys]


def test_a_version_to_be_replaced_must_still_be_current(store: PrefixStore) -> None:
    def put(replaces: int) -> list[int]:
        return store.put([NewVersion(ANA, new().value, replaces=replaces), new(BO)])

    assert put(0) == [1, 1]
    assert put(1) == [2, 2]
    for stale in (0, 1):
        with pytest.raises(VersionConflictError, match="'ana': replaces is ., but version 2 is"):
            put(stale)
    assert [len(store.for_model(F).versions(key)) for key in (ANA, BO)] == [2, 2]  # all or nothing
    assert [v.parent_version for v in store.for_model(F).versions(ANA)] == [None, 1]
    store.for_model(F).rollback(ANA, to=1)
    with pytest.raises(VersionConflictError, match="'ana': replaces is 2, but version 1 is"):
        put(2)
    assert put(1) == [3, 3]


def test_aliases_name_versions_and_follow_moves(store: PrefixStore) -> None:
    for seed in (1, 2, 3):
        store.put([new(seed=seed)])
    store.for_model(F).alias(ANA, "production", to=1)
    store.for_model(F).alias(ANA, "canary", to=3)
    store.for_model(F).alias(ANA, "stable", to="production")
    assert store.for_model(F).get(ANA, version="stable").version == 1
    own = store.for_model(F)
    assert [v.aliases for v in own.versions(ANA)] == [("production", "stable"), (), ("canary",)]
    for version, expected in ((None, 2), (1, 0), ("canary", 2)):
        assert own.version_info(ANA, version=version) == own.versions(ANA)[expected]
    store.for_model(F).rollback(ANA, to="stable")
    assert store.for_model(F).get(ANA).version == 1
    store.for_model(F).alias(ANA, "stable", to=None)
    with pytest.raises(UnknownNameError, match="no version stable; it has: 1, 2, 3, canary, prod"):
        store.for_model(F).get(ANA, version="stable")
    with pytest.raises(UnknownNameError, match="no version 9; it has"):
        store.for_model(F).alias(ANA, "canary", to=9)
    with pytest.raises(UnknownNameError, match="no version 9; it has"):
        own.version_info(ANA, version=9)
    with pytest.raises(UnknownNameError, match="no user 'cleo'"):
        own.version_info(PrefixKey("user", "cleo"))
    with pytest.raises(UnknownNameError, match="alias '7' is a number"):
        store.for_model(F).alias(ANA, "7", to=1)


def test_prune_keeps_the_newest_the_current_and_the_aliased(store: PrefixStore) -> None:
    for seed in range(1, 7):
        store.put([new(seed=seed)])
    store.put([new(BO)])
    store.for_model(F).alias(ANA, "production", to=2)
    store.for_model(F).rollback(ANA, to=3)
    assert store.prune(keep=2) == 2
    assert [v.version for v in store.for_model(F).versions(ANA)] == [2, 3, 5, 6]
    assert store.put([new(seed=7)]) == [7]
    assert store.stats().num_versions == 6
    assert store.stats().num_prefixes == {"user": 2}
    assert store.stats().size_bytes == 6 * len(payload_of(new()))
    with pytest.raises(RequestError, match="keep is 0"):
        store.prune(keep=0)


def test_an_unknown_name_among_very_many_is_told_without_reading_them_all(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_MAX_NAMES_SEARCHED", 30)
    with PrefixStore(url) as store:
        store.put([new(PrefixKey("task", f"t{i:02}")) for i in range(50)])
        with pytest.raises(UnknownNameError, match=r"no task 't0'.*t\d+, … \(more than 30\)"):
            store.for_model(F).get(PrefixKey("task", "t0"))


def test_what_no_version_can_be_is_no_version(url: str) -> None:
    with PrefixStore(url) as store:
        store.put([new(ANA, seed=1)])
        own = store.for_model(F)
        for number in (10**24, 1 << 31, 0, -1):
            with pytest.raises(UnknownNameError, match="has no version"):
                own.get(ANA, version=number)
        assert store.audit_log(after=10**24) == []
        for details in ({"a": float("nan")}, {"a": object()}):
            with pytest.raises(StoreError, match="are not JSON"):
                store.put([replace(new(ANA, seed=1), details=details)])


def test_one_version_is_removed_and_the_newest_other_is_current(url: str) -> None:
    with PrefixStore(url) as store:
        for seed in (1, 2, 3):
            store.put([new(ANA, seed=seed)])
        fingerprint = F
        own = store.for_model(fingerprint)
        store.remove_version(ANA, fingerprint, 3)
        store.remove_version(ANA, fingerprint, 3)  # it is gone
        assert [(v.version, v.current) for v in own.versions(ANA)] == [(1, False), (2, True)]
        store.remove_version(ANA, fingerprint, 1)
        store.remove_version(ANA, fingerprint, 2)
        assert store.prefixes() == []


def test_any_number_of_keys_is_fetched(url: str) -> None:
    with PrefixStore(url) as store:
        store.put([new(ANA), new(BO)])
        keys = [ANA, *(PrefixKey("user", f"u{i}") for i in range(40_000)), BO]
        assert set(store.for_model(F).fetch(keys)) == {ANA, BO}
