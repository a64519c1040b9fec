"""Bytes from elsewhere: typed errors, and nothing allocated that the bytes do not hold."""

import contextlib
import json
import os
import re
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import ControlPrefix, ControlPrefixError, Prefix, PrefixFormatError, StoreError
from controlprefix.prefixes import Geometry, PrefixDecoder, PrefixKey, UserCode, file_format
from controlprefix.prefixes.key import content_hash
from controlprefix.prefixes.original_files import read_original
from controlprefix.store import PrefixStore
from controlprefix.users.text_features import TextFeatures
from controlprefix.vllm.prefix_folder import PrefixFolder

from databases import own_server
from helpers import coded, decoder, engine

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4)
READERS: tuple[Callable[[bytes], object], ...] = (
    Prefix.from_bytes,
    UserCode.from_bytes,
    PrefixDecoder.from_bytes,
)


def payloads() -> list[bytes]:
    user_decoder = decoder()
    prefix = Prefix.random(GEOMETRY, num_slots=3, seed=1)
    return [
        prefix.to_bytes(),
        prefix.to_bytes("int8"),
        user_decoder.to_bytes(),
        coded(user_decoder).to_bytes(),
    ]


def bomb(header: dict[str, Any], **tensors: torch.Tensor) -> bytes:
    """A file with a valid hash, as an attacker can make one."""
    return file_format.write(header, tensors or {"x": torch.zeros(1, 1)}, "bomb")


def geometry_of(num_layers: int, *shape: int) -> dict[str, Any]:
    return {"model": "m", "fingerprint": "", "sites": {"decoder": [list(shape)] * num_layers}}


def peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the memory of this process grew at most."""

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        match = re.search(rf"{name}:\s+(\d+)", text)
        assert match is not None
        return int(match[1]) << 10

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("this system does not measure the peak of a part of a process")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.parametrize(
    "network",
    [
        {"width": 30_000, "hidden_size": 40_000, "num_features": 1},
        {"width": 1, "hidden_size": 1, "num_features": 1 << 24},
        {"width": 0, "hidden_size": 1, "num_features": 1},
        {"width": "a", "hidden_size": 1, "num_features": 1},
        {"width": True, "hidden_size": 1, "num_features": 1},
        {},
        [],
        7,
    ],
)
def test_a_decoder_that_declares_more_than_it_holds(network: Any) -> None:
    tensors = {
        "sites.decoder.initial": torch.zeros(1, 16),
        "sites.decoder.scale": torch.zeros(16),
        "sites.decoder.network.hidden.0.weight": torch.zeros(1, 1),
        "predictor.feature_mean": torch.zeros(1),
        "predictor.weights": torch.zeros(1, 1),
    }
    geometry: Any
    for geometry in (geometry_of(1, 2, 4, 4), geometry_of(0, 2, 4, 4), {"sites": {}}, [], None):
        data = bomb({"geometry": geometry, "network": network}, **tensors)

        def read(data: bytes = data) -> None:
            with pytest.raises(PrefixFormatError):
                PrefixDecoder.from_bytes(data)

        assert peak_growth(read) < 100 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "header",
    [
        {"geometry": geometry_of(20_000, (1 << 20) - 1, 1, 1), "int8": "float32"},
        {"geometry": geometry_of(20_000, 1, (1 << 20) - 1, 1)},
        {"geometry": geometry_of(1, 2, 4, 4), "dial": [[0, 10**400]]},
        {"geometry": geometry_of(1, 2, 4, 4), "dial": 7},
        {"geometry": geometry_of(1, 2, 4, -4)},
        {"geometry": {"model": 1, "fingerprint": [], "sites": {"moon": [[1, 1, 1]]}}},
        {"geometry": geometry_of(1, 2, 4, 4), "int8": ["float32"]},
    ],
)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 16),
        torch.zeros(()),
        torch.zeros(3, 16, dtype=torch.int8),
        torch.zeros(0, 16, dtype=torch.float8_e4m3fn),
        torch.zeros(3, 16).to(torch.float8_e4m3fn),
        torch.zeros(3, 16, dtype=torch.bool),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_a_prefix_that_is_none(header: dict[str, Any], tensor: torch.Tensor) -> None:
    data = bomb(header, decoder=tensor)

    def read() -> None:
        for reader in READERS:
            with pytest.raises(PrefixFormatError):
                reader(data)

    assert peak_growth(read) < 100 << 20


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes_are_a_typed_error_or_read(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(payloads()))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        change = data.draw(st.sampled_from(["flip", "cut", "insert", "size"]))
        if change == "flip":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del damaged[at:]
            damaged += b"\0"
        elif change == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=8))
        else:
            damaged[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    for reader in READERS:
        with contextlib.suppress(PrefixFormatError):
            reader(bytes(damaged))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    cp = engine()
    cp.put("task", "email", Prefix.random(cp.geometry, num_slots=2, seed=1))
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=2, seed=2))
    cp.store.export_to(tmp_path / "export.zip")
    assert (tmp_path / "export.zip").stat().st_mode & 0o077 == 0
    return tmp_path / "export.zip"


def rewritten(source: Path, target: Path, change: Callable[[Any], None], method: int = 0) -> Path:
    """An export with another manifest."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", method) as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename == "manifest.json":
                manifest = json.loads(data)
                change(manifest)
                data = json.dumps(manifest).encode()
            other.writestr(entry.filename, data)
    return target


def nothing_is_imported(path: Path) -> None:
    store = PrefixStore("sqlite://", tenant="t")
    with pytest.raises(PrefixFormatError, match="nothing was changed"):
        store.import_from(path)
    assert not list(store.verify())


@pytest.mark.slow
def test_an_export_that_claims_more_than_it_holds(exported: Path, tmp_path: Path) -> None:
    def fill(manifest: Any) -> None:
        manifest["filler"] = "x" * (60 << 20)

    packed = rewritten(exported, tmp_path / "a.zip", fill, zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 1 << 20
    assert peak_growth(lambda: nothing_is_imported(packed)) < 100 << 20

    def repeat(manifest: Any) -> None:
        (version,) = manifest["prefixes"][0]["versions"]
        versions = [{**version, "version": i} for i in range(1, 2000)]
        manifest["prefixes"][0] |= {"versions": versions, "newest_version": 1999}

    nothing_is_imported(rewritten(exported, tmp_path / "b.zip", repeat))


def test_a_payload_is_read_before_anything_is_written(exported: Path, tmp_path: Path) -> None:
    """A bomb with the right hash does not wait in the store for its first reader."""
    header = {"geometry": geometry_of(20_000, (1 << 20) - 1, 1, 1), "int8": "float32"}
    payload = bomb(header, decoder=torch.zeros(3, 16))
    name = content_hash(payload)

    def replace(manifest: Any) -> None:
        (version,) = manifest["prefixes"][1]["versions"]
        version |= {"content_hash": name, "size_bytes": len(payload)}

    path = rewritten(exported, tmp_path / "c.zip", replace)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"payloads/{name.removeprefix('sha256:')}", payload)
    nothing_is_imported(path)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_damaged_exports_are_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    cp = engine()
    cp.put("task", "email", Prefix.random(cp.geometry, num_slots=1, seed=1))
    cp.store.export_to(folder / "export.zip")
    damaged = bytearray((folder / "export.zip").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / "damaged.zip").write_bytes(damaged)
    store = PrefixStore("sqlite://", tenant="t")
    try:
        store.import_from(folder / "damaged.zip")
    except ControlPrefixError:
        assert not list(store.verify())
    else:  # what was changed is not of the content
        (stored,) = store.for_model(cp.geometry.fingerprint).versions(PrefixKey("task", "email"))
        assert stored.content_hash == cp.version_info("task", "email").content_hash
        assert all(intact for _, _, intact in store.verify())


def test_a_checkpoint_that_grows_when_it_is_read(tmp_path: Path) -> None:
    """Tensors whose values share bytes, compressed entries, and what is no checkpoint at all."""
    path, geometry = tmp_path / "x.ckpt", Geometry.from_dict(geometry_of(1, 2, 4, 4))
    anchor = "control_trans.0.weight"
    wide = torch.zeros(1, dtype=torch.float16).expand(1 << 15, 1 << 15)
    for content in (
        {anchor: wide},
        {"state_dict": {anchor: torch.zeros(2, 2)}, "hyper_parameters": [1]},
        {anchor: torch.zeros(2, 2)},
        {anchor: torch.zeros(2), "wte.weight": torch.zeros(3)},
        {1: torch.zeros(2), anchor: torch.zeros(2, 2)},
    ):
        torch.save(content, path)
        with pytest.raises(PrefixFormatError):
            read_original(path, geometry, task="t")
    torch.save({anchor: torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(PrefixFormatError, match="compressed"):
        read_original(path, geometry, task="t")


def test_a_decoder_whose_codes_are_wider_than_its_tensors() -> None:
    whole = decoder()
    tensors = dict(whole.state_dict())
    tensors["sites.decoder.initial"] = torch.zeros(30_000, 32)
    header, _ = file_format.read(whole.to_bytes(), "x")
    data = file_format.write(header, tensors, "x")
    with pytest.raises(PrefixFormatError, match="embeddings has the shape"):
        PrefixDecoder.from_bytes(data)


def test_a_bad_file_in_vllms_folder_is_an_error_of_its_request(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path)
    for data in (b"", bomb({"geometry": geometry_of(1, 2, 4, 4)}, decoder=torch.zeros(()))):
        folder.file("abc").write_bytes(data)
        with pytest.raises(StoreError, match="cannot be read"):
            folder.read("abc")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "values"),
    [
        ("UPDATE controlprefix_versions SET details = '{'", {}),
        ("UPDATE controlprefix_versions SET created_at = 'garbage'", {}),
        ("UPDATE controlprefix_payloads SET payload = 'text'", {}),
        ("UPDATE controlprefix_payloads SET payload = x'00'", {}),
    ],
)
def test_damaged_cells_are_named_and_verify_goes_on(
    tmp_path: Path, statement: str, values: dict[str, Any]
) -> None:
    path = tmp_path / "prefixes.db"
    cp = engine(store=f"sqlite:///{path}")
    for name in ("a", "b"):
        cp.put("task", name, Prefix.random(cp.geometry, num_slots=1, seed=1))
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as connection:
        connection.execute(statement + " WHERE prefix_id = 1", values)
    connection.close()
    with PrefixStore(f"sqlite:///{path}") as store:
        assert [intact for _, _, intact in store.verify()] == [False, True]
    again = ControlPrefix.from_pretrained(
        cp.model, tokenizer=cp.tokenizer, store=f"sqlite:///{path}"
    )
    with contextlib.suppress(ControlPrefixError):
        again.versions("task", "a")
    with contextlib.suppress(ControlPrefixError):  # it is not served, unless it is what was stored
        assert again.get("task", "a").digest == cp.get("task", "a").digest
    assert again.get("task", "b").num_slots == 1


def test_a_store_that_cannot_be_written_is_found_out_before_training(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.db"
    PrefixStore(f"sqlite:///{path}").close()
    with PrefixStore(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        with pytest.raises(StoreError, match="readonly"):
            store.require_writable([])
    with PrefixStore(f"sqlite:///{path}") as store:
        store.require_writable([])
        assert not list(store.audit_log())
    assert sqlite3.connect(path).execute("SELECT count(*) FROM controlprefix_audit").fetchone() == (
        0,
    )


def test_a_decoder_from_elsewhere_does_not_choose_what_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = TextFeatures("trusted/model")
    assert TextFeatures.by_name(own.name).name == own.name
    elsewhere = own.name.replace("trusted", "evil")
    with pytest.raises(ControlPrefixError, match="CONTROLPREFIX_EMBEDDERS=evil/model"):
        TextFeatures.by_name(elsewhere)
    monkeypatch.setenv("CONTROLPREFIX_EMBEDDERS", "other,evil/model")
    assert TextFeatures.by_name(elsewhere).name == elsewhere


@pytest.mark.slow
def test_postgresql_keeps_nothing_of_a_forgotten_user_after_a_purge(tmp_path: Path) -> None:
    data = tmp_path / "data"
    secret = "a sentence that only anastasia wrote"

    def files_with(text: str) -> list[str]:
        files = (path for path in (data / "base").rglob("*") if path.is_file())
        return [path.name for path in files if text.encode() in path.read_bytes()]

    with own_server(data) as (server, url):
        server.psql("GRANT pg_checkpoint TO app")
        cp = engine(store=url)
        cp.enroll("anastasia", [secret], keep_texts=True)
        cp.enroll("bo", ["another sentence of bo"], keep_texts=True)
        server.psql("CHECKPOINT")
        assert files_with(secret)
        cp.forget_user("anastasia")
        cp.store.purge()
        assert not files_with(secret)
        assert cp.names("user") == ["bo"]
        cp.store.close()


def test_purge_of_a_store_that_is_not_there_says_so(tmp_path: Path) -> None:
    with PrefixStore(str(tmp_path / "missing.db"), create=False) as store:
        with pytest.raises(StoreError, match=r"missing.db \(no such file\)' has no file to purge"):
            store.purge()
    assert not list(tmp_path.iterdir())


def test_purge_empties_the_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.db"
    cp = engine(store=f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        cp.enroll("anastasia", ["a sentence that only anastasia wrote"], keep_texts=True)
        cp.forget_user("anastasia")
        log = path.with_name("prefixes.db-wal")
        assert b"only anastasia wrote" in log.read_bytes()
        cp.store.purge()
        assert b"only anastasia wrote" not in log.read_bytes() + path.read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_connections_of_its_own(tmp_path: Path) -> None:
    cp = engine(store=f"sqlite:///{tmp_path / 'prefixes.db'}")
    cp.put("task", "a", Prefix.random(cp.geometry, num_slots=1, seed=1))
    child = os.fork()
    if child == 0:
        ok = cp.names("task") == ["a"]
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cp.names("task") == ["a"]


def test_names_that_a_url_would_change_are_refused_and_accents_are_one_user() -> None:
    cp = engine()
    prefix = Prefix.random(cp.geometry, num_slots=1, seed=1)
    for name in (".", "..", "a/../b", "a//b", "/a", "a/", " a", "a ", "a\ufffdb"):
        with pytest.raises(ControlPrefixError, match="cannot stand in a URL"):
            cp.put("user", name, prefix)
    cp.put("user", "zoe\u0301", prefix)
    assert cp.names("user") == ["zo\u00e9"]
    assert cp.get("user", "zo\u00e9").num_slots == 1
    cp.forget_user("zoe\u0301")
    assert cp.names("user") == []


def test_a_forgotten_user_is_named_in_nothing_that_others_have(tmp_path: Path) -> None:
    """And tasks and labels that learned from them are marked."""
    path = tmp_path / "prefixes.db"
    cp = engine(store=f"sqlite:///{path}")
    rows = [
        {
            "prompt": "q",
            "completion": "a b c",
            "task": "mail",
            "user": user,
            "attributes": {"t": "x"},
        }
        for user in ("anastasia", "bo")
        for _ in range(2)
    ]
    cp.train(
        rows,
        learn=["task", "user", "attributes"],
        num_slots=1,
        steps=1,
        validation=0,
        progress=False,
    )
    cp.forget_user("anastasia")
    assert path.read_bytes().count(b"anastasia") == 1  # the line of the audit log
    for kind, name in (("task", "mail"), ("attribute", "t=x")):
        (info,) = cp.versions(kind, name)  # type: ignore[arg-type]
        assert info.num_forgotten == 1
