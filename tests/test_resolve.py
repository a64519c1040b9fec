"""From names to prefixes: shared queries, never stale results, bounded memory."""

import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import Prefix, PrefixFormatError, UnknownNameError
from controlprefix.inference.resolver import PrefixCaches, Resolver
from controlprefix.request import Request
from controlprefix.store import NewVersion, PrefixCache, PrefixKey, PrefixStore, SingleFlight
from controlprefix.store.model_store import ModelStore

from helpers import frozen

FROZEN = frozen("llama")
GEOMETRY = FROZEN.geometry
ANA, BO = PrefixKey("user", "ana"), PrefixKey("user", "bo")


def prefix(seed: int, num_slots: int = 3) -> Prefix:
    return Prefix.random(GEOMETRY, num_slots=num_slots, seed=seed)


@pytest.fixture
def store(url: str) -> Iterator[PrefixStore]:
    with PrefixStore(url) as opened:
        opened.put([NewVersion(ANA, prefix(1)), NewVersion(BO, prefix(2))])
        yield opened


@pytest.fixture
def queries(store: PrefixStore) -> list[str]:
    return count_queries(store)


def count_queries(store: PrefixStore) -> list[str]:
    """The statements sent to the database from now on that read prefixes."""
    sent: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM controlprefix_prefixes" in statement:
            sent.append(statement)

    sqlalchemy.event.listen(store._database._engine, "before_cursor_execute", note)
    return sent


def resolver(store: PrefixStore, cache_bytes: int = 1 << 20) -> Resolver:
    return Resolver(FROZEN, store, caches=PrefixCaches(cache_bytes))


def test_a_mixed_batch_takes_one_query_cold_and_warm(
    store: PrefixStore, queries: list[str]
) -> None:
    names = [f"u{i}" for i in range(20)]
    store.put([NewVersion(PrefixKey("user", name), prefix(i)) for i, name in enumerate(names)])
    store.put([NewVersion(PrefixKey("task", "note"), prefix(99))])
    requests = [Request(prompt="-", task="note", user=name) for name in names]
    result = resolver(store)
    queries.clear()
    cold = result.resolve(requests)
    assert len(queries) == 1
    warm = result.resolve(requests)
    # SQLite says that nothing changed; PostgreSQL is asked.
    assert len(queries) == (1 if store.url.startswith("sqlite") else 2)
    for i, (before, now) in enumerate(zip(cold, warm, strict=True)):
        assert [part.part.prefix for part in before.parts] == [
            part.part.prefix for part in now.parts
        ]
        assert now.parts[1].part.prefix.digest == prefix(i).digest
    # All rows have the very same task prefix, so that assembly keeps it once.
    assert len({id(resolved.parts[0].part.prefix) for resolved in warm}) == 1


def test_many_threads_that_need_a_user_not_in_memory_share_a_few_queries(
    store: PrefixStore, queries: list[str]
) -> None:
    result, answers = resolver(store), []
    start = threading.Barrier(200)

    def ask() -> None:
        start.wait()
        answers.append(result.current({ANA})[ANA].value)

    threads = [threading.Thread(target=ask) for _ in range(200)]
    queries.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(answer) for answer in answers}) == 1
    assert len(answers) == 200
    assert len(queries) < 20  # far fewer than threads; those that came later query again


def test_changes_of_another_store_handle_are_seen_at_once(store: PrefixStore, url: str) -> None:
    result = resolver(store)
    ask = [Request(prompt="-", user="ana")]
    with PrefixStore(url) as other:
        for seed in (5, 6):
            other.put([NewVersion(ANA, prefix(seed))])
            (resolved,) = result.resolve(ask)
            assert resolved.parts[0].part.prefix.digest == prefix(seed).digest
            assert resolved.parts[0].used.version == seed - 3
        other.for_model(GEOMETRY.fingerprint).rollback(ANA, to=1)
        assert result.resolve(ask)[0].parts[0].used.version == 1
        other.forget(ANA)
    with pytest.raises(UnknownNameError, match="no user 'ana'"):
        result.resolve(ask)
    assert result._caches.prefixes.size_bytes == 0  # nor is it kept in memory


def test_one_damaged_prefix_fails_its_own_request_alone(store: PrefixStore, url: str) -> None:
    if url.startswith("postgresql"):
        pytest.skip("damaged the same way as in SQLite")
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("UPDATE controlprefix_payloads SET payload = 'x' WHERE prefix_id = 1")
        )
    engine.dispose()
    result = resolver(store)
    outcomes: dict[str, list[object]] = {"ana": [], "bo": []}
    start = threading.Barrier(40)

    def ask(name: str) -> None:
        start.wait()
        try:
            outcomes[name].append(
                result.current({PrefixKey("user", name)})[PrefixKey("user", name)]
            )
        except PrefixFormatError as error:
            outcomes[name].append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in ("ana", "bo") * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(outcome, PrefixFormatError) for outcome in outcomes["ana"])
    assert all(not isinstance(outcome, Exception) for outcome in outcomes["bo"])
    assert [len(of) for of in outcomes.values()] == [20, 20]


def test_a_query_that_is_already_running_is_not_joined() -> None:
    """Its snapshot may predate the later caller."""
    single_flight: SingleFlight[int] = SingleFlight()
    begun, go_on = threading.Event(), threading.Event()
    value, answers = [1], []

    def query(keys: Collection[PrefixKey]) -> Mapping[PrefixKey, int]:
        calls = value[0]
        begun.set()
        go_on.wait(10)
        return dict.fromkeys(keys, calls)

    def ask() -> None:
        answers.append(single_flight.fetch([ANA], query)[ANA])

    first = threading.Thread(target=ask)
    first.start()
    begun.wait(10)
    value[0] = 2
    later = [threading.Thread(target=ask) for _ in range(3)]
    for thread in later:
        thread.start()
    go_on.set()
    for thread in (first, *later):
        thread.join()
    assert sorted(answers) == [1, 2, 2, 2]


_MOVES = st.lists(
    st.tuples(st.sampled_from(["put", "get", "forget"]), st.integers(0, 5), st.integers(1, 4)),
    max_size=40,
)


@given(moves=_MOVES)
@settings(max_examples=60, deadline=None)
def test_the_cache_stays_within_its_bytes_and_drops_the_least_recently_used(
    moves: list[tuple[str, int, int]],
) -> None:
    item = prefix(0, 1).size_bytes
    cache: PrefixCache[PrefixKey] = PrefixCache(8 * item)
    saved: dict[PrefixKey, tuple[str, int]] = {}  # by name, least recently used first
    for move, who, slots in moves:
        key = PrefixKey("user", f"u{who}")
        if move == "put":
            cache.put(key, f"{who}/{slots}", prefix(who, slots))
            saved.pop(key, None)
            saved[key] = (f"{who}/{slots}", slots)
            while sum(size for _, size in saved.values()) > 8:
                del saved[next(iter(saved))]
        elif move == "get":
            if key in saved:
                saved[key] = saved.pop(key)
            expected = {key: saved[key][0]} if key in saved else {}
            assert {k: entry.content_hash for k, entry in cache.get([key]).items()} == expected
        else:
            cache.forget(key)
            saved.pop(key, None)
        assert cache.size_bytes == item * sum(size for _, size in saved.values()) <= 8 * item
    everyone = [PrefixKey("user", f"u{i}") for i in range(6)]
    hashes = {key: entry.content_hash for key, entry in cache.get(everyone).items()}
    assert hashes == {key: content for key, (content, _) in saved.items()}


def test_a_change_during_a_query_is_seen_by_the_next(
    store: PrefixStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, fetch = resolver(store), ModelStore.fetch

    def fetch_before_a_change(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(ModelStore, "fetch", fetch)
        fetched = fetch(*args, **kwargs)
        store.put([NewVersion(ANA, prefix(5))])
        return fetched

    monkeypatch.setattr(ModelStore, "fetch", fetch_before_a_change)
    assert [result.current({ANA})[ANA].version for _ in range(2)] == [1, 2]
