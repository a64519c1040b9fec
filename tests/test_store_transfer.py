"""Exports and imports: bit for bit, all or nothing."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from controlprefix import (
    PrefixFormatError,
    StoreError,
)
from controlprefix.store import (
    NewVersion,
    PrefixKey,
    PrefixStore,
    transfer,
)

from helpers import raw
from stores import ANA, BO, F, new


@pytest.fixture
def store(empty_store: PrefixStore) -> PrefixStore:
    return empty_store


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


def test_an_export_that_no_import_would_read_is_refused(
    store: PrefixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put([new()])
    stored_bytes = sum(info.current.size_bytes for info in store.prefixes())
    assert stored_bytes
    monkeypatch.setattr(transfer, "_MAX_TOTAL_BYTES", stored_bytes - 1)
    with pytest.raises(StoreError, match="copy the database instead"):
        store.export_to(tmp_path / "large.zip")
    assert not (tmp_path / "large.zip").exists()
