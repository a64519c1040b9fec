"""Capacity: what is computed is what a store and a server take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from controlprefix import Prefix, RequestError
from controlprefix.capacity import CODE_WIDTH, StorageFormat, Workload, capacity
from controlprefix.cli import app
from controlprefix.prefixes import Geometry, PrefixKey, UserCode
from controlprefix.store import NewVersion, PrefixStore

GEOMETRY = Geometry.uniform(num_layers=12, num_kv_heads=3, head_dim=64, fingerprint="f" * 64)
LOAD = Workload(slot_values=12 * 3 * 64 * 2, slot_heads=12 * 3 * 2, weight_bytes=2 * 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("storage_format", ["int8", "bfloat16"])
def test_a_store_is_as_large_as_computed(tmp_path: Path, storage_format: StorageFormat) -> None:
    path = tmp_path / "prefixes.db"
    num_users = 60
    with PrefixStore(str(path)) as store:
        store.put(
            [
                NewVersion(
                    PrefixKey("user", f"u{i}"),
                    Prefix.random(GEOMETRY, num_slots=16, seed=i),
                    dtype="int8" if storage_format == "int8" else "bfloat16",
                )
                for i in range(num_users)
            ]
        )
    computed = capacity(replace(LOAD, users=num_users, storage_format=storage_format)).store_bytes
    assert computed == pytest.approx(path.stat().st_size, rel=0.12)


@pytest.mark.parametrize("num_slots", [16, 64])
def test_a_code_has_a_row_per_slot(num_slots: int) -> None:
    code = UserCode("a" * 64, torch.randn(num_slots, CODE_WIDTH)).to_bytes(dtype="int8")
    codes = replace(LOAD, users=1000, storage_format="code", num_slots=num_slots)
    assert capacity(codes).store_bytes == pytest.approx(1000 * (len(code) * 1.03 + 750), rel=0.02)


def test_the_measured_store_is_as_computed() -> None:
    """`docs/results/store.md`: 20,000 users of 16 slots in int8 take 3,915 to 4,046 MB."""
    smollm2 = Workload(
        slot_values=30 * 3 * 64 * 2, slot_heads=30 * 3 * 2, weight_bytes=270 * 10**6, users=20_000
    )
    assert 3.8e9 < capacity(smollm2).store_bytes < 4.1e9
    codes = capacity(replace(smollm2, users=10**6, storage_format="code")).store_bytes
    assert 1.9e9 < codes < 2.7e9  # a measured payload has 1,936 bytes


def test_more_requests_need_more() -> None:
    small = capacity(LOAD)
    assert (small.num_processes, small.advice[:9]) == (3, "processes")
    fast = capacity(replace(LOAD, tokens_per_second=1000))
    assert (fast.num_processes, fast.advice) == (1, "one process and SQLite")
    many = capacity(replace(LOAD, requests_per_second=100))
    assert many.advice.startswith("vLLM")
    assert many.process_bytes == small.process_bytes
    assert capacity(replace(LOAD, max_sequences=64)).process_bytes > small.process_bytes
    in_float32 = capacity(replace(LOAD, value_bytes=4))
    assert in_float32.prefix_bytes == 2 * small.prefix_bytes
    assert in_float32.store_bytes == small.store_bytes
    with pytest.raises(ValueError, match="above 0"):
        capacity(replace(LOAD, tokens_per_second=0))


def test_a_price_is_that_of_processes_and_of_the_store() -> None:
    load = replace(LOAD, users=10**6, storage_format="code", seconds_per_user=3.6)
    assert capacity(load).monthly_cost == capacity(load).cost_per_million == 0
    priced = capacity(replace(load, price_per_hour=2.0, price_per_gb=0.5))
    storing = priced.store_bytes / 1e9 * 0.5
    assert priced.monthly_cost == pytest.approx(3 * 730 * 2.0 + storing)
    assert priced.cost_per_million == pytest.approx(storing + 1000 * 2.0)


@pytest.mark.slow
def test_the_command(model_folder: Path) -> None:
    arguments = ["capacity", "--model", str(model_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--users", "1000", "--seconds-per-user", "3.6"])
    assert result.exit_code == 0, result.output
    assert "1.0 hours" in result.output
    assert "per month" not in result.output
    priced = CliRunner().invoke(app, [*arguments, "--price-per-hour", "1"])
    assert "2,190.00" in priced.output  # 3 processes
    assert "guide on capacity" in result.output
    invalid = CliRunner().invoke(app, [*arguments, "--storage-format", "int4"])
    assert invalid.exit_code != 0
    assert "bfloat16" in invalid.output


@pytest.mark.parametrize(
    ("field", "value"), [("storage_format", "float32"), ("tokens_per_second", float("nan"))]
)
def test_what_cannot_be_computed_is_refused(field: str, value: object) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(RequestError, match="storage_format is|must be finite"):
        capacity(replace(LOAD, **fields))
