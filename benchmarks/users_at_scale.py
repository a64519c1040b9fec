"""A PostgreSQL store with millions of users: reads, writes, forgetting, size and vacuum.

Users have a version each, of the size of a user code. The server makes the rows itself, without the
library; all measurements are through it. PostgreSQL runs from the wheel that the tests use, with
its own defaults.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from controlprefix import Prefix
from controlprefix.prefixes import content_hash
from controlprefix.store import NewVersion, PrefixKey, PrefixStore

from lib.results import arguments, save
from lib.stores import SMALL, latency, payloads, postgresql, resolver_for
from lib.tables import header, line

PREFIXES, VERSIONS, PAYLOADS = (
    f"controlprefix_{name}" for name in ("prefixes", "versions", "payloads")
)


def fill(server: Any, first: int, last: int) -> None:
    """Let the server insert users `first` to `last`, without checks of rows."""
    contents = "; ".join(
        f"INSERT INTO contents VALUES ({i}, '{content_hash(data)}', '\\x{data.hex()}'::bytea)"
        for i, data in enumerate(payloads(SMALL, "float32", 1))
    )
    new = f"{PREFIXES} p JOIN contents c ON c.i = p.id % 8 WHERE p.name >= '{first:09d}'"
    server.psql(
        f"""\\c store
        SET session_replication_role = replica;
        CREATE TEMP TABLE contents (i int, hash text, data bytea); {contents};
        INSERT INTO {PREFIXES}
            (tenant_id, kind, name, fingerprint, model_name, current_version, newest_version)
            SELECT t.id, 'user', lpad(i::text, 9, '0'), '{SMALL.fingerprint}', 'm', 1, 1
            FROM generate_series({first}, {last - 1}) i, controlprefix_tenants t;
        INSERT INTO {VERSIONS} (prefix_id, version, tenant_id, content_hash, size_bytes,
            num_slots, dtype, created_at, details)
            SELECT p.id, 1, p.tenant_id, c.hash, length(c.data), 1, 'float32', now(), '{{}}'
            FROM {new};
        INSERT INTO {PAYLOADS} (prefix_id, version, tenant_id, payload)
            SELECT p.id, 1, p.tenant_id, c.data FROM {new};"""
    )


def size_of(server: Any, function: str) -> float:
    """GB of the tables of versions by one of PostgreSQL's functions."""
    terms = " + ".join(f"{function}('{name}')" for name in (PREFIXES, VERSIONS, PAYLOADS))
    return round(int(server.psql(f"\\c store\nSELECT {terms}").split()[-3]) / 1e9, 3)


def vacuum(server: Any) -> float:
    """Seconds that vacuum of all tables takes."""
    started = time.perf_counter()
    server.psql("\\c store\nVACUUM ANALYZE")
    return round(time.perf_counter() - started, 1)


def measure(store: PrefixStore, num: int, times: int) -> dict[str, Any]:
    """Latencies with so many users."""
    rng = random.Random(0)
    resolver = resolver_for(store, SMALL)
    prefix = Prefix.random(SMALL, num_slots=1, seed=99)

    def user() -> PrefixKey:
        return PrefixKey("user", f"{rng.randrange(num):09d}")

    return {
        "fetch of 1, cold, ms": latency(lambda: resolver.current({user()}), 4 * times),
        "fetch of 32, cold, ms": latency(
            lambda: resolver.current({user() for _ in range(32)}), times
        ),
        "a page of 100 names, ms": latency(
            lambda: store.for_model(SMALL.fingerprint).names("user", after=user().name, limit=100),
            times,
        ),
        "put, ms": latency(lambda: store.put([NewVersion(user(), prefix)]), times),
        "forget, ms": latency(lambda: store.forget(user()), times),
    }


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    columns = results["measured"]
    lines = [header("users", *(f"{int(num):,}" for num in columns))]
    for name in next(iter(columns.values())):
        cells = (column[name] for column in columns.values())
        lines.append(
            line(
                name,
                *(
                    f"{cell['p50']:.2f} ({cell['p99']:.2f})"
                    if isinstance(cell, dict)
                    else f"{cell:,}"
                    for cell in cells
                ),
            )
        )
    return "\n\n".join(
        [
            "# Millions of users in PostgreSQL",
            f"Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}. Medians and 99th percentiles; *cold* is read from the database, "
            "checked, and converted to float32.",
            "\n".join(lines),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--users", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--times", type=int, default=60, help="repetitions of each operation")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    measured: dict[str, Any] = {}
    try:
        with postgresql(folder / "postgres") as (url, server), PrefixStore(url) as store:
            store.keep_texts("nobody", ["a text"])  # makes the tenant
            first = 0
            for num in sorted(options.users):
                started = time.perf_counter()
                fill(server, first, num)
                seconds = time.perf_counter() - started
                measured[str(num)] = {
                    "rows inserted per second": round((num - first) / seconds),
                    "vacuum after that, s": vacuum(server),
                    "GB of tables": size_of(server, "pg_table_size"),
                    "GB of indexes": size_of(server, "pg_indexes_size"),
                    **measure(store, num, options.times),
                    "vacuum after these changes, s": vacuum(server),
                }
                first = num
                Console().print(measured[str(num)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save(options.results, "users-at-scale", {"measured": measured}, page)


if __name__ == "__main__":
    main()
