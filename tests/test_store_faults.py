"""Writers at once, kills, full disks and restarts: nothing is lost or half-written."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from controlprefix import (
    Prefix,
    StoreError,
    UnknownNameError,
)
from controlprefix.store import (
    NewVersion,
    PrefixKey,
    PrefixStore,
    Profile,
)

from databases import own_server, restart
from helpers import payload_of, prefix_of, raw
from stores import ANA, BO, GEOMETRY, F, new

KILLS = int(os.environ.get("CONTROLPREFIX_KILLS", "30"))


def test_what_is_forgotten_is_overwritten_in_a_file(tmp_path: Path) -> None:
    secret = b"ana-was-here-" * 3
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        store.put([NewVersion(ANA, new().value, {"note": secret.decode()})])
        assert secret in (tmp_path / "prefixes.db").read_bytes()
        store.forget(ANA)
    assert secret not in (tmp_path / "prefixes.db").read_bytes()


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


@pytest.mark.slow
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
        restart(server, down_s=3)
        before = reads[0]
        assert store.put([new(seed=2)]) == [2]
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert reads[0] > before


@pytest.mark.slow
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
