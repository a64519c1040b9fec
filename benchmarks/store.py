"""The store at size: latency of cold and warm reads, and versions published per second.

Two populations per database: many users with small payloads (about the size of a user code), and
fewer with int8 prefixes of 16 slots of a 135 M model. Rows are inserted in bulk, without the
library, and read through it. PostgreSQL runs from the wheel that the tests use.
"""

import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from controlprefix import Geometry, Prefix
from controlprefix.prefixes import StorageDtype, content_hash
from controlprefix.store import NewVersion, PrefixKey, PrefixStore
from controlprefix.store.tables import PayloadRow, PrefixRow, VersionRow

from lib.results import arguments, save
from lib.stores import LARGE, SMALL, latency, payloads, postgresql, resolver_for

CHUNK = 500


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, tuple[str, Callable[[], int]]]]:
    """Name -> its URL, and a function that returns its bytes on disk."""
    file = folder / "prefixes.db"
    with postgresql(folder / "postgres") as (url, server):

        def size_on_server() -> int:
            return int(server.psql("SELECT pg_database_size('store')").split()[2])

        yield {
            "SQLite": (f"sqlite:///{file}", lambda: file.stat().st_size),
            "PostgreSQL": (url, size_on_server),
        }


def fill(
    store: PrefixStore, geometry: Geometry, num: int, contents: list[bytes], num_slots: int
) -> float:
    """Insert `num` users with a version each, and return the seconds that it took."""
    start, created_at = time.perf_counter(), datetime.now(UTC)
    for first in range(0, num, CHUNK):

        def write(session: Any, tenant: int, first: int = first) -> None:
            numbers = range(first, min(first + CHUNK, num))
            prefix_rows = [
                {
                    "tenant_id": tenant,
                    "kind": "user",
                    "name": f"user{i}",
                    "fingerprint": geometry.fingerprint,
                    "model_name": "m",
                    "current_version": 1,
                    "newest_version": 1,
                }
                for i in numbers
            ]
            ids = session.scalars(
                sa.insert(PrefixRow).returning(PrefixRow.id, sort_by_parameter_order=True),
                prefix_rows,
            ).all()
            keys = [{"prefix_id": id_, "version": 1, "tenant_id": tenant} for id_ in ids]
            rows = list(zip(keys, (contents[i % len(contents)] for i in numbers), strict=True))
            fields = {"num_slots": num_slots, "dtype": "x", "created_at": created_at, "details": {}}
            session.execute(
                sa.insert(VersionRow),
                [
                    {**key, **fields, "content_hash": content_hash(p), "size_bytes": len(p)}
                    for key, p in rows
                ],
            )
            session.execute(
                sa.insert(PayloadRow),
                [{**key, "payload": payload} for key, payload in rows],
            )

        store._database.run(write, write=True)
    return time.perf_counter() - start


def measure(
    url: str, geometry: Geometry, num: int, dtype: StorageDtype, slots: int, times: int
) -> dict[str, Any]:
    """All figures of one population on one database."""
    contents = payloads(geometry, dtype, slots)
    rng = random.Random(0)

    def random_user() -> PrefixKey:
        return PrefixKey("user", f"user{rng.randrange(num)}")

    with PrefixStore(url, tenant=dtype) as store:
        seconds = fill(store, geometry, num, contents, slots)
        resolver = resolver_for(store, geometry)
        warm = {random_user() for _ in range(32)}
        resolver.current(warm)
        warm_user = next(iter(warm))
        prefix = Prefix.random(geometry, num_slots=slots, seed=99)
        return {
            "users": num,
            "payload bytes": len(contents[0]),
            "rows inserted in bulk per second": round(num / seconds),
            "fetch of 1, cold, ms": latency(lambda: resolver.current({random_user()}), 4 * times),
            "fetch of 32, cold, ms": latency(
                lambda: resolver.current({random_user() for _ in range(32)}), times
            ),
            "fetch of 1, warm, ms": latency(lambda: resolver.current({warm_user}), 4 * times),
            "fetch of 32, warm, ms": latency(lambda: resolver.current(warm), 4 * times),
            "put, ms": latency(
                lambda: store.put([NewVersion(random_user(), prefix, dtype=dtype)]), times
            ),
            "versions published per second, 4 writers": publish_rate(store, prefix, dtype, times),
        }


def publish_rate(store: PrefixStore, prefix: Prefix, dtype: StorageDtype, times: int) -> float:
    """Versions per second that four threads publish, each for its own users."""

    def work(writer: int) -> None:
        for i in range(times):
            key = PrefixKey("user", f"new{writer}-{i}")
            store.put([NewVersion(key, prefix, dtype=dtype)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(4 * times / (time.perf_counter() - start), 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", type=int, default=1_000_000, help="users with small payloads")
    parser.add_argument("--large", type=int, default=20_000, help="users with full prefixes")
    parser.add_argument("--times", type=int, default=60, help="repetitions of each operation")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    cases: list[tuple[str, Geometry, int, StorageDtype, int]] = [
        ("small", SMALL, options.small, "float32", 1),
        ("large", LARGE, options.large, "int8", 16),
    ]
    results: dict[str, Any] = {}
    try:
        with databases(folder) as urls:
            for name, (url, size) in urls.items():
                for population, geometry, num, dtype, slots in cases:
                    before = size() if population == "large" else 0
                    figures = measure(url, geometry, num, dtype, slots, options.times)
                    figures["MB on disk"] = round((size() - before) / 1e6)
                    figures["MB of peak memory so far"] = round(
                        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
                    )
                    results[f"{name}, {population}"] = figures
                    Console().print(f"{name}, {population}: done")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table("", *results)
    for measure_name in next(iter(results.values())):
        cells = [
            "{p50} (p99 {p99})".format(**cell) if isinstance(cell, dict) else f"{cell:,}"
            for cell in (column[measure_name] for column in results.values())
        ]
        table.add_row(measure_name, *cells)
    Console(width=140).print(table)
    save(options.results, "store", {"store": results})


if __name__ == "__main__":
    main()
