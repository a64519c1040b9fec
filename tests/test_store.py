"""The store: versions, tenants, and nothing half-written."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from controlprefix import (
    Geometry,
    Prefix,
    PrefixFormatError,
    StoreError,
    UnknownNameError,
)
from controlprefix.store import NewVersion, PrefixKey, PrefixStore

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
ANA = PrefixKey("user", "ana")
F = GEOMETRY.fingerprint


def new(key: PrefixKey = ANA, seed: int = 0, geometry: Geometry = GEOMETRY) -> NewVersion:
    return NewVersion(key, Prefix.random(geometry, num_slots=3, seed=seed), {"seed": seed})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/prefixes.db"


@pytest.fixture
def store(url: str) -> PrefixStore:
    return PrefixStore(url)


def test_put_then_get_returns_equal_tensors_after_reopening(url: str) -> None:
    with PrefixStore(url) as first:
        assert first.put([new(seed=1)]) == [1]
        assert first.put([new(seed=2)]) == [2]
    with PrefixStore(url) as again:
        current, earlier = again.get(ANA, F), again.get(ANA, F, version=1)
    assert (current.ref.version, earlier.ref.version) == (2, 1)
    for found, seed in ((current, 2), (earlier, 1)):
        assert torch.equal(found.prefix.slots["decoder"], new(seed=seed).prefix.slots["decoder"])
        assert found.prefix.geometry == GEOMETRY


def test_versions_say_what_is_current_and_rollback_moves_it(store: PrefixStore) -> None:
    for seed in (1, 2, 3):
        store.put([new(seed=seed)])
    store.rollback(ANA, F, to=1)
    found = store.versions(ANA, F)
    assert [(v.version, v.current, v.details["seed"]) for v in found] == [
        (1, True, 1),
        (2, False, 2),
        (3, False, 3),
    ]
    assert store.get(ANA, F).ref.version == 1
    assert store.put([new(seed=4)]) == [4]  # numbers are never used twice
    assert store.get(ANA, F).ref.version == 4
    with pytest.raises(UnknownNameError, match="user 'ana' has no version 9; it has: 1, 2, 3, 4"):
        store.rollback(ANA, F, to=9)


def test_forget_removes_every_version_for_every_model(store: PrefixStore, tmp_path: Path) -> None:
    other = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="0" * 64)
    secret = b"ana-was-here-" * 3
    store.put([new(seed=1)])
    store.put([NewVersion(ANA, new(geometry=other).prefix, {"note": secret.decode()})])
    store.put([new(PrefixKey("user", "bo"))])
    assert secret in (tmp_path / "prefixes.db").read_bytes()
    assert store.forget(ANA) == 2
    assert store.names("user", F) == ["bo"]
    with pytest.raises(UnknownNameError, match="no user 'ana' in the store; known: bo"):
        store.get(ANA, F)
    with pytest.raises(UnknownNameError, match="known: bo"):
        store.forget(ANA)
    store.close()
    assert secret not in (tmp_path / "prefixes.db").read_bytes()


def test_a_tenant_cannot_name_see_or_remove_anothers_rows(url: str) -> None:
    mine, theirs = PrefixStore(url, tenant="mine"), PrefixStore(url, tenant="theirs")
    mine.put([new(seed=1)])
    assert theirs.names("user", F) == []
    assert theirs.prefixes() == []
    assert theirs.current([ANA], F) == {}
    for attempt in (
        lambda: theirs.get(ANA, F),
        lambda: theirs.versions(ANA, F),
        lambda: theirs.rollback(ANA, F, to=1),
        lambda: theirs.forget(ANA),
    ):
        with pytest.raises(UnknownNameError, match="no user 'ana' in the store; known: none"):
            attempt()
    assert theirs.put([new(seed=2)]) == [1]
    theirs.forget(ANA)
    assert mine.get(ANA, F).ref.version == 1


def test_publishing_several_is_all_or_nothing(store: PrefixStore) -> None:
    broken = new(PrefixKey("user", "bo"))
    broken.prefix.slots["decoder"][0, 0] = float("nan")
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
    assert store.get(quote, F).ref.version == 1


def test_another_models_prefix_is_refused_by_name(store: PrefixStore) -> None:
    store.put([new()])
    with pytest.raises(UnknownNameError, match="user 'ana' has no prefix for this model, only"):
        store.get(ANA, "0" * 64)


def test_damaged_bytes_are_named_and_the_earlier_version_is_offered(
    store: PrefixStore, tmp_path: Path
) -> None:
    for seed in (1, 2):
        store.put([new(seed=seed)])
    with sqlite3.connect(tmp_path / "prefixes.db") as raw:
        raw.execute(
            "update prefix_versions set payload = zeroblob(length(payload)) where version = 2"
        )
    with pytest.raises(PrefixFormatError, match="user 'ana' version 2 is damaged .* to version 1"):
        store.get(ANA, F)
    store.rollback(ANA, F, to=1)
    assert store.get(ANA, F).ref.version == 1


def test_stores_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        PrefixStore(f"sqlite:///{tmp_path}/missing/prefixes.db")
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        PrefixStore(f"sqlite:///{tmp_path}/text.db")
    for bad in ("prefixes.db", "nosuch://x"):
        with pytest.raises(StoreError, match="give an SQLAlchemy URL"):
            PrefixStore(bad)


def test_a_store_that_cannot_be_written_keeps_what_it_has(url: str, tmp_path: Path) -> None:
    with PrefixStore(url) as store:
        store.put([new(seed=1)])
    read_only = PrefixStore(f"sqlite:///file:{tmp_path}/prefixes.db?mode=ro&uri=true")
    with pytest.raises(StoreError, match="cannot write the store .* readonly"):
        read_only.put([new(seed=2)])
    assert read_only.get(ANA, F).ref.version == 1


def test_a_later_schema_is_refused(url: str, tmp_path: Path) -> None:
    PrefixStore(url).close()
    with sqlite3.connect(tmp_path / "prefixes.db") as raw:
        raw.execute("update controlprefix_store set schema_version = 99")
    with pytest.raises(StoreError, match="has schema 99; this version reads up to 1, so upgrade"):
        PrefixStore(url)


def test_concurrent_writers_lose_no_version(url: str) -> None:
    stores = [PrefixStore(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda i: stores[i % 4].put([new(seed=i)])[0], range(24)))
    assert sorted(numbers) == list(range(1, 25))
    details = [v.details["seed"] for v in stores[0].versions(ANA, F)]
    assert sorted(details) == list(range(24))


def test_a_writer_killed_at_any_moment_leaves_whole_versions(url: str, tmp_path: Path) -> None:
    """A process publishes pairs in a loop and is killed; both or neither of a pair are there."""
    PrefixStore(url).close()
    script = textwrap.dedent(
        f"""
        from controlprefix import Geometry, Prefix
        from controlprefix.store import NewVersion, PrefixKey, PrefixStore
        geometry = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
        store = PrefixStore({url!r})
        print("ready", flush=True)
        seed = 0
        while True:
            seed += 1
            prefix = Prefix.random(geometry, num_slots=200, seed=seed)
            store.put([NewVersion(PrefixKey("user", n), prefix, {{"seed": seed}}) for n in "ab"])
        """
    )
    published = 0
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ}
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.15 + 0.07 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with PrefixStore(url) as store:
            current = store.current([PrefixKey("user", "a"), PrefixKey("user", "b")], F)
            assert len({ref.version for ref in current.values()}) == 1
            newest = current[PrefixKey("user", "a")].version
            assert newest > published
            published = newest
            pair = [store.get(PrefixKey("user", n), F).prefix.slots["decoder"] for n in "ab"]
            assert torch.equal(*pair)
            assert [v.version for v in store.versions(PrefixKey("user", "a"), F)] == list(
                range(1, newest + 1)
            )
