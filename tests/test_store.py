"""The store: versions, tenants, and nothing half-written."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from controlprefix import (
    Geometry,
    Prefix,
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
    Profile,
    StoreStats,
    upgrade,
    versions,
)
from controlprefix.store.revisions import HEAD, REVISION_TABLE
from controlprefix.store.tables import Base
from controlprefix.store.urls import full_url, redacted

from databases import own_server, restart
from helpers import coded, decoder, payload_of, prefix_of, raw

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
ANA, BO = PrefixKey("user", "ana"), PrefixKey("user", "bo")
F = GEOMETRY.fingerprint


def new(key: PrefixKey = ANA, seed: int = 0, geometry: Geometry = GEOMETRY) -> NewVersion:
    return NewVersion(key, Prefix.random(geometry, num_slots=3, seed=seed), {"seed": seed})


@pytest.fixture
def store(url: str) -> Iterator[PrefixStore]:
    with PrefixStore(url) as opened:
        yield opened


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
    (entry,) = store.audit()
    assert store.audit(after=entry.number) == []
    assert (entry.action, entry.key, entry.num_versions) == ("forget", ANA, 2)
    assert datetime.now(UTC) - entry.at.replace(tzinfo=UTC) < timedelta(minutes=5)


def test_what_is_forgotten_is_overwritten_in_a_file(tmp_path: Path) -> None:
    secret = b"ana-was-here-" * 3
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        store.put([NewVersion(ANA, new().value, {"note": secret.decode()})])
        assert secret in (tmp_path / "prefixes.db").read_bytes()
        store.forget(ANA)
    assert secret not in (tmp_path / "prefixes.db").read_bytes()


def test_a_tenant_cannot_name_see_or_remove_anothers_rows(url: str) -> None:
    own_store, other = PrefixStore(url, tenant="mine"), PrefixStore(url, tenant="theirs")
    own_store.put([new(seed=1)])
    assert other.for_model(F).names("user") == []
    assert other.prefixes() == []
    assert other.for_model(F).fetch([ANA]) == {}
    assert other.stats() == StoreStats({}, 0, 0)
    assert other.prune(keep=1) == 0
    assert list(other.verify()) == []
    for attempt in (
        lambda: other.for_model(F).get(ANA),
        lambda: other.for_model(F).versions(ANA),
        lambda: other.for_model(F).rollback(ANA, to=1),
        lambda: other.for_model(F).alias(ANA, "canary", to=1),
        lambda: other.forget(ANA),
    ):
        with pytest.raises(UnknownNameError, match="no user 'ana' in the store; enroll"):
            attempt()
    assert other.put([new(seed=2)]) == [1]
    other.forget(ANA)
    assert own_store.for_model(F).get(ANA).version == 1
    assert own_store.audit() == []
    own_store.close()
    other.close()


def test_postgresql_itself_shows_a_session_no_other_tenants_rows(url: str) -> None:
    """Even SQL that forgets to say whose rows it wants."""
    if url.startswith("sqlite"):
        pytest.skip("SQLite has no row security")
    with PrefixStore(url, tenant="mine") as own_store, PrefixStore(url, tenant="theirs") as other:
        for store in (own_store, other):
            store.put([new(seed=1)])
            store.for_model(F).alias(ANA, "canary", to=1)
            store.put([new(PrefixKey("user", "bo"))])
            store.forget(PrefixKey("user", "bo"))
            store.keep_samples("ana", ["a text"])
            store.keep_profile("ana", Profile("e", [1.0], num_texts=1))
            store.create_api_key("main")
            store.add_job("train_user", "ana", {"texts": ["a text"]}, F)
            by = decoder()
            store.put([NewVersion(PrefixKey("decoder", "users"), by, sources=["ana"])])
            store.put([NewVersion(PrefixKey("user", "cy"), coded(by))])
    several = {"prefixes": 3, "versions": 3, "payloads": 3}
    # The queue has no more than ids, tenants' names and fingerprints: all workers see it.
    queue = raw(url, "SELECT * FROM controlprefix_queue", "nobody")
    assert len(queue) == 2
    assert "ana" not in str(queue)
    for table in Base.metadata.tables.keys() - {"controlprefix_queue"}:
        for tenant, rows in (("mine", 1), ("theirs", 1), ("nobody", 0), ("", 0)):
            (result,) = raw(url, f"SELECT count(*) FROM {table}", tenant)
            rows *= several.get(table.removeprefix("controlprefix_"), 1)
            assert result[0] == rows, (table, tenant)
    assert raw(url, "UPDATE controlprefix_versions SET size_bytes = 0 RETURNING 1", "nobody") == []
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match="row-level security"):
        raw(
            url,
            "INSERT INTO controlprefix_audit (tenant_id, at, action, kind, name, num_versions)"
            " VALUES (1, now(), 'x', 'user', 'x', 0), (2, now(), 'x', 'user', 'x', 0)",
            "mine",
        )
    # A row with its own tenant, but for a prefix that belongs to the other one.
    query = "SELECT prefix_id, tenant_id FROM controlprefix_aliases"
    ((their_prefix, _),) = raw(url, query, "theirs")
    ((_, own_tenant),) = raw(url, query, "mine")
    statement = "INSERT INTO controlprefix_aliases (prefix_id, alias, version, tenant_id)"
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match="row-level security"):
        raw(url, f"{statement} VALUES ({their_prefix}, 'x', 1, {own_tenant})", "mine")


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
        with pytest.raises(VersionConflictError, match="'ana' is at version 2, not at"):
            put(stale)
    assert [len(store.for_model(F).versions(key)) for key in (ANA, BO)] == [2, 2]  # all or nothing
    assert [v.parent_version for v in store.for_model(F).versions(ANA)] == [None, 1]
    store.for_model(F).rollback(ANA, to=1)
    with pytest.raises(VersionConflictError, match="'ana' is at version 1, not at 2"):
        put(2)
    assert put(1) == [3, 3]


def test_aliases_name_versions_and_follow_moves(store: PrefixStore) -> None:
    for seed in (1, 2, 3):
        store.put([new(seed=seed)])
    store.for_model(F).alias(ANA, "production", to=1)
    store.for_model(F).alias(ANA, "canary", to=3)
    store.for_model(F).alias(ANA, "stable", to="production")
    assert store.for_model(F).get(ANA, version="stable").version == 1
    assert [v.aliases for v in store.for_model(F).versions(ANA)] == [
        ("production", "stable"),
        (),
        ("canary",),
    ]
    store.for_model(F).rollback(ANA, to="stable")
    assert store.for_model(F).get(ANA).version == 1
    store.for_model(F).alias(ANA, "stable", to=None)
    with pytest.raises(UnknownNameError, match="no version stable; it has: 1, 2, 3, canary, prod"):
        store.for_model(F).get(ANA, version="stable")
    with pytest.raises(UnknownNameError, match="no version 9; it has"):
        store.for_model(F).alias(ANA, "canary", to=9)
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


def test_export_and_import_round_trip_bit_for_bit(url: str, tmp_path: Path) -> None:
    with PrefixStore(url, tenant="mine") as own_store:
        for seed in (1, 2, 3):
            own_store.put([new(seed=seed), NewVersion(BO, new(seed=seed).value, dtype="int8")])
        own_store.for_model(F).alias(ANA, "canary", to=2)
        own_store.for_model(F).rollback(BO, to=1)
        own_store.put([new(PrefixKey("task", "note"))])
        assert own_store.export_to(tmp_path / "one.zip") == 7
        with pytest.raises(StoreError, match="task 'note' exists already|user .* exists already"):
            own_store.import_from(tmp_path / "one.zip")
        assert own_store.stats().num_versions == 7
    with PrefixStore(url, tenant="theirs") as other_tenant:
        assert other_tenant.import_from(tmp_path / "one.zip") == 7
        other_tenant.export_to(tmp_path / "two.zip")
        assert other_tenant.for_model(F).versions(ANA)[1].aliases == ("canary",)
        assert other_tenant.for_model(F).get(BO).version == 1
        assert other_tenant.put([new()]) == [4]
    with PrefixStore(f"sqlite:///{tmp_path}/other.db") as other:
        other.import_from(tmp_path / "one.zip")
        other.export_to(tmp_path / "three.zip")
    item, two, three = ((tmp_path / f"{n}.zip").read_bytes() for n in ("one", "two", "three"))
    assert item == two == three


@pytest.mark.slow
def test_a_damaged_export_imports_nothing(store: PrefixStore, tmp_path: Path) -> None:
    store.put([new(), new(BO, seed=2)])
    store.export_to(tmp_path / "good.zip")
    good = (tmp_path / "good.zip").read_bytes()
    for where in range(0, len(good), len(good) // 60):
        damaged = bytearray(good)
        damaged[where] ^= 0xFF
        (tmp_path / "bad.zip").write_bytes(damaged)
        with PrefixStore("sqlite://") as fresh:
            try:
                fresh.import_from(tmp_path / "bad.zip")
            except PrefixFormatError:
                assert fresh.prefixes() == []
            else:  # bytes that mean nothing, such as a time in the zip's own directory
                for key in (ANA, BO):
                    assert fresh.for_model(F).get(key)[:2] == store.for_model(F).get(key)[:2]
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(PrefixFormatError, match="not an export of controlprefix"):
        store.import_from(tmp_path / "bad.zip")
    with pytest.raises(StoreError, match="No such file"):
        store.import_from(tmp_path / "missing.zip")
    raw(store.url, "UPDATE controlprefix_payloads SET payload = :p", p=b"x")
    with pytest.raises(PrefixFormatError, match="damaged in the store"):
        store.export_to(tmp_path / "never.zip")
    assert not list(tmp_path.glob("*never.zip*"))


def test_stores_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        PrefixStore(f"sqlite:///{tmp_path}/missing/prefixes.db")
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        PrefixStore(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(StoreError, match="give a path, or an SQLAlchemy URL"):
        PrefixStore("nosuch://x")


def test_a_store_is_a_path_or_a_url_in_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(f"{tmp_path}/prefixes.db") as store:
        store.put([new(seed=1)])
        assert store.label == f"{tmp_path}/prefixes.db"
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as same:
        assert same.for_model(F).get(ANA).version == 1
    monkeypatch.chdir(tmp_path)
    with PrefixStore("prefixes.db") as relative:
        assert relative.label == f"{tmp_path}/prefixes.db"
        assert relative.for_model(F).get(ANA).version == 1
    for url in ("postgres://me:secret@host:1/db", "postgresql://me:secret@host:1/db"):
        assert full_url(url) == "postgresql+psycopg://me:secret@host:1/db"
    with pytest.raises(StoreError, match="check that the server runs") as caught:
        PrefixStore("postgres://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.db"
    with PrefixStore(str(path), create=False) as store:
        assert store.prefixes() == []
        assert store.label == f"{path} (no such file)"
        with pytest.raises(UnknownNameError) as caught:
            store.for_model(F).get(ANA)
    assert f"the store is {path} (no such file)" in caught.value.__notes__
    assert str(path) not in str(caught.value)  # which a server sends to its clients
    assert not path.exists()
    PrefixStore(str(path)).close()
    with PrefixStore(str(path), create=False) as store:
        assert store.label == str(path)


def test_a_store_that_cannot_be_written_keeps_what_it_has(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    with PrefixStore(url) as store:
        store.put([new(seed=1)])
    read_only = PrefixStore(f"sqlite:///file:{tmp_path}/prefixes.db?mode=ro&uri=true")
    with pytest.raises(StoreError, match="cannot write the store .* readonly"):
        read_only.put([new(seed=2)])
    assert read_only.for_model(F).get(ANA).version == 1


def test_concurrent_writers_lose_no_version(url: str) -> None:
    PrefixStore(url, tenant="first").close()
    stores = [PrefixStore(url) for _ in range(4)]  # none of them has a tenant's row yet
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda i: stores[i % 4].put([new(seed=i)])[0], range(24)))
    assert sorted(numbers) == list(range(1, 25))
    details = [v.details["seed"] for v in stores[0].for_model(F).versions(ANA)]
    assert sorted(details) == list(range(24))
    for store in stores:
        store.close()


@pytest.mark.slow
def test_many_readers_and_writers_at_once_see_whole_versions_that_only_grow(url: str) -> None:
    """Each version's numbers say its seed, so a torn or mixed one would show."""
    users = [PrefixKey("user", f"u{i}") for i in range(4)]
    with PrefixStore(url) as store:
        store.put([new(user, seed=0) for user in users])

        def write(who: int) -> None:
            for seed in range(1, 4):
                store.put([new(user, seed=10 * who + seed) for user in users])

        def read(_: int) -> None:
            last = dict.fromkeys(users, 0)
            for _ in range(2):
                for user, item in store.for_model(F).fetch(users).items():
                    assert item.value is not None
                    assert item.version >= last[user]
                    last[user] = item.version
                    seed = store.for_model(F).get(user, version=item.version)
                    assert payload_of(seed) == payload_of(item)

        with ThreadPoolExecutor(100) as pool:
            work = [pool.submit(write, i) for i in range(12)]
            work += [pool.submit(read, i) for i in range(188)]
            for item in work:
                item.result()
        for user in users:
            result = store.for_model(F).versions(user)
            assert [v.version for v in result] == list(range(1, 38))
            for v in result:
                stored = prefix_of(store.for_model(F).get(user, version=v.version))
                expected = prefix_of(new(user, seed=v.details["seed"]))
                assert torch.equal(stored.slots["decoder"], expected.slots["decoder"])


def test_an_unknown_name_among_very_many_is_told_without_reading_them_all(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_MAX_NAMES_SEARCHED", 30)
    with PrefixStore(url) as store:
        store.put([new(PrefixKey("task", f"t{i:02}")) for i in range(50)])
        with pytest.raises(UnknownNameError, match=r"no task 't0'.*t\d+, … \(more than 30\)"):
            store.for_model(F).get(PrefixKey("task", "t0"))


def test_writers_of_the_same_names_in_other_orders_do_not_block_each_other(url: str) -> None:
    stores = [PrefixStore(url) for _ in range(2)]

    def write(i: int) -> None:
        for _ in range(10):
            stores[i].put([new(key) for key in ((ANA, BO) if i else (BO, ANA))])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [len(stores[0].for_model(F).versions(key)) for key in (ANA, BO)] == [20, 20]
    for store in stores:
        store.close()


KILLS = int(os.environ.get("CONTROLPREFIX_KILLS", "30"))


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_versions(url: str) -> None:
    """Processes publish pairs in a loop and are killed; both or neither of a pair are there.

    `CONTROLPREFIX_KILLS=500 pytest -k killed` does it more often.
    """
    PrefixStore(url).close()
    script = textwrap.dedent(
        f"""
        import os, random, signal, time
        from controlprefix import Geometry, Prefix
        from controlprefix.store import NewVersion, PrefixKey, PrefixStore
        geometry = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
        prefixes = [Prefix.random(geometry, num_slots=200, seed=i) for i in range(5)]
        draw = random.Random(0)

        def write(ready):
            store = PrefixStore({url!r})
            while True:
                os.write(ready, b"!")
                prefix = prefixes[random.randrange(5)]
                store.put([NewVersion(PrefixKey("user", n), prefix) for n in "ab"])

        for i in range({KILLS}):
            opened, ready = os.pipe()
            child = os.fork()
            if not child:
                write(ready)
            for _ in range(1 + (i % 4 > 0)):  # three of four children publish at least once
                os.read(opened, 1)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(opened)
            os.close(ready)
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    a, b = PrefixKey("user", "a"), PrefixKey("user", "b")
    with PrefixStore(url) as store:
        assert all(whole for *_, whole in store.verify())
        numbers = [[v.version for v in store.for_model(F).versions(key)] for key in (a, b)]
        assert numbers[0] == numbers[1] == list(range(1, len(numbers[0]) + 1))
        assert len(numbers[0]) > KILLS / 2  # they did get to write
        hashes = [[v.content_hash for v in store.for_model(F).versions(key)] for key in (a, b)]
        assert hashes[0] == hashes[1]
        assert [store.for_model(F).fetch([a, b])[key].version for key in (a, b)] == [
            len(numbers[0])
        ] * 2


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        store.put([new(seed=1)])
        engine = store._database._engine
        pages = raw(store.url, "PRAGMA page_count")[0][0]

        @sqlalchemy.event.listens_for(engine, "begin")
        def limited(connection: Any) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")

        large = Prefix.random(GEOMETRY, num_slots=2000, seed=2)
        with pytest.raises(StoreError, match="full; nothing was changed"):
            store.put([NewVersion(BO, new().value), NewVersion(ANA, large)])
        sqlalchemy.event.remove(engine, "begin", limited)
        assert store.for_model(F).names("user") == ["ana"]
        assert store.for_model(F).get(ANA).version == 1


@pytest.mark.slow
def test_a_server_that_restarts_under_load_is_waited_for(tmp_path: Path) -> None:
    with own_server(tmp_path / "data") as (server, url), PrefixStore(url) as store:
        store.put([new(seed=1)])
        stop, errors, reads = threading.Event(), [], [0]

        def work() -> None:
            while not stop.is_set():
                try:
                    assert store.for_model(F).get(ANA).version >= 1
                    reads[0] += 1
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        restart(server)
        before = reads[0]
        assert store.put([new(seed=2)]) == [2]
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert reads[0] > before


@pytest.mark.slow
def test_a_service_role_reads_and_writes_rows_and_nothing_else(tmp_path: Path) -> None:
    with own_server(tmp_path / "data") as (server, owner):
        role = 'Service "1"'  # any name that PostgreSQL takes
        quoted = role.replace('"', '""')
        server.psql(f"CREATE ROLE \"{quoted}\" LOGIN PASSWORD 'x' NOSUPERUSER NOBYPASSRLS")
        service = make_url(owner).set(username=role, password="x")
        service_url = service.render_as_string(hide_password=False)
        with pytest.raises(StoreError, match="permission denied"), PrefixStore(service_url):
            pass
        assert upgrade(owner, service_role=role) == (None, HEAD)
        assert upgrade(owner, service_role=role) == (HEAD, HEAD)
        with PrefixStore(owner, tenant="a") as first:
            first.put([new(seed=7)])
        with PrefixStore(service_url, tenant="b") as store:
            assert not store.ignores_row_security
            assert store.put([new(), new(BO)]) == [1, 1]
            assert store.put([new(seed=2)]) == [2]
            store.for_model(F).rollback(ANA, to=1)
            assert store.name_of_api_key(store.create_api_key("web")) == "web"
            store.keep_samples("ana", ["a text"])
            assert store.forget(ANA) == 2
            assert store.prune(keep=1) == 0
            assert [entry.key for entry in store.audit()] == [ANA]
        engine = sqlalchemy.create_engine(service)
        tables = [table.name for table in Base.metadata.sorted_tables]
        attempts = [
            *(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in tables),
            *(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY" for table in tables),
            *(f"DROP TABLE {table}" for table in tables),
            *(f"TRUNCATE {table} CASCADE" for table in tables),
            "DROP POLICY controlprefix_prefixes_own ON controlprefix_prefixes",
            "ALTER POLICY controlprefix_prefixes_own ON controlprefix_prefixes USING (true)",
            "CREATE POLICY mine ON controlprefix_prefixes USING (true)",
            "SET ROLE app",
            f'ALTER ROLE "{quoted}" BYPASSRLS',
            f"UPDATE {REVISION_TABLE} SET version_num = '0001'",
            "CREATE TABLE mine (id int)",
        ]
        for statement in attempts:
            with engine.connect() as connection, pytest.raises(ProgrammingError) as error:
                connection.exec_driver_sql(statement)
            assert "permission denied" in str(error.value) or "must be owner" in str(error.value), (
                statement
            )
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT * FROM controlprefix_versions").all() == []
        engine.dispose()
    with pytest.raises(StoreError, match="not on PostgreSQL"):
        upgrade(f"sqlite:///{tmp_path}/x.db", service_role="x")


def test_an_export_of_one_content_in_many_versions_is_imported(url: str, tmp_path: Path) -> None:
    with PrefixStore(url) as store:
        for _ in range(20):
            store.put([new(ANA, seed=1)])
        assert store.export_to(tmp_path / "a.zip") == 20
        other = store.for_tenant("copy")
        assert other.import_from(tmp_path / "a.zip") == 20
        assert other.export_to(tmp_path / "b.zip") == 20
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"newest_version": (1 << 31) - 1},
        {"current_version": -1},
        {"fingerprint": "e" * 64},
        {"versions": {"version": -5}},
        {"versions": {"num_slots": -5}},
        {"versions": {"created_at": "9999-12-31T23:59:59-12:00"}},
    ],
)
def test_an_import_of_nonsense_is_refused(url: str, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.zip"
    with PrefixStore(url) as store:
        store.put([new(ANA, seed=1)])
        store.export_to(path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        manifest = json.loads(entries["manifest.json"])
        (entry,) = manifest["prefixes"]
        entry["versions"][0] |= change.get("versions", {})
        entry |= {name: value for name, value in change.items() if name != "versions"}
        entries["manifest.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        other = store.for_tenant("copy")
        with pytest.raises(PrefixFormatError, match="nothing was changed"):
            other.import_from(path)
        assert other.prefixes() == []


def test_an_import_lists_no_content_under_another_model(url: str, tmp_path: Path) -> None:
    """Also where the same content is listed rightly before."""
    path = tmp_path / "a.zip"
    with PrefixStore(url) as store:
        store.put([new(ANA, seed=1), new(BO, seed=1)])
        store.export_to(path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        manifest = json.loads(entries["manifest.json"])
        manifest["prefixes"][1]["fingerprint"] = "e" * 64
        entries["manifest.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        with pytest.raises(PrefixFormatError, match="another model than it was made for"):
            store.for_tenant("copy").import_from(path)


def test_writers_that_meet_a_removal_store_or_say_so(url: str) -> None:
    """`put`, `get`, `forget`, `prune` and profiles of the same names, all at once."""
    keys = [PrefixKey("user", f"u{i}") for i in range(3)]
    profile = Profile("e", (0.5, 0.5), 1)
    with PrefixStore(url) as store:
        stop = time.monotonic() + 3
        own = store.for_model(F)

        def put(i: int) -> None:
            store.put([replace(new(key, seed=1), profile=profile) for key in keys[:: 1 - 2 * i]])

        def read(_: int) -> None:
            for key in keys:
                with contextlib.suppress(UnknownNameError):
                    own.get(key)

        def remove(i: int) -> None:
            with contextlib.suppress(UnknownNameError):
                store.forget(keys[i])
            store.prune(keep=1)

        def keep_doing(work: Any, i: int) -> None:
            while time.monotonic() < stop:
                work(i)

        with ThreadPoolExecutor(6) as pool:
            futures = [
                pool.submit(keep_doing, work, i) for work in (put, read, remove) for i in (0, 1)
            ]
            for future in futures:
                future.result()
        assert all(intact for _, _, intact in store.verify())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@ssW0rd@localhost:1/db",
        "postgresql://u:p@ss:W0rd@localhost:1/db",
        "postgresql://localhost:abc/db?password=W0rd",
        "postgresql://u:a%40W0rd@localhost:1/db",
        "postgresql:/u:W0rd@localhost/db",
    ],
)
def test_no_part_of_a_password_is_shown(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("controlprefix.store.database._MAX_ATTEMPTS", 2)
    with pytest.raises(StoreError) as error:
        PrefixStore(url).stats()
    assert "W0rd" not in str(error.value)
    assert "W0rd" not in caplog.text


def test_times_are_utc_wherever_the_server_is(url: str) -> None:
    zone = {"options": "-c timezone=Asia/Tokyo"} if "postgresql" in url else {}
    there = make_url(url).update_query_dict(zone).render_as_string(hide_password=False)
    with PrefixStore(there) as store:
        store.put([new(ANA, seed=1)])
        (info,) = store.prefixes()
        store.forget(ANA)
        (entry,) = store.audit()
        assert entry.at.utcoffset() == info.current.created_at.utcoffset() == timedelta(0)


def test_what_no_version_can_be_is_no_version(url: str) -> None:
    with PrefixStore(url) as store:
        store.put([new(ANA, seed=1)])
        own = store.for_model(F)
        for number in (10**24, 1 << 31, 0, -1):
            with pytest.raises(UnknownNameError, match="has no version"):
                own.get(ANA, version=number)
        assert store.audit(after=10**24) == []
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


def test_a_write_whose_commit_broke_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Session.commit

    def breaking(session: Session) -> None:
        commit(session)
        raise OperationalError("COMMIT", {}, Exception("gone"), connection_invalidated=True)

    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "commit", breaking)
            with pytest.raises(StoreError, match="broke while a change was committed"):
                store.put([new()])
        assert len(store.for_model(F).versions(ANA)) == 1


def test_sqlite_overwrites_what_is_forgotten_whatever_it_was_built_with(tmp_path: Path) -> None:
    def off(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA secure_delete = OFF")

    sqlalchemy.event.listen(sqlalchemy.Pool, "connect", off)
    try:
        with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
            query = sqlalchemy.text("PRAGMA secure_delete")
            assert store._database.run(lambda session, _: session.scalar(query)) == 1
    finally:
        sqlalchemy.event.remove(sqlalchemy.Pool, "connect", off)


def test_a_quoted_password_is_shown_in_neither_form() -> None:
    url = "postgresql://me:s%40crets@host/name"
    assert redacted("no s%40crets, no s@crets for me", url) == "no ***, no *** for me"
