"""Prefixes as folders and on the Hub; removing what is no longer wanted."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from controlprefix import GeometryMismatchError, Prefix, PrefixFormatError, StoreError
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.folder import load_folder

from helpers import QUICK, engine, greetings


@pytest.mark.slow
def test_a_folder_holds_the_prefix_its_name_and_a_card(tmp_path: Path) -> None:
    cp = engine()
    cp.train(greetings(), **QUICK)
    cp.export("attribute", "formality=formal", tmp_path / "formal")
    key, prefix, details = load_folder(tmp_path / "formal")
    assert key == PrefixKey("attribute", "formality=formal")
    assert prefix.digest == cp.get("attribute", "formality=formal").digest
    assert details["training"]["steps"] == QUICK["steps"]
    card = (tmp_path / "formal" / "README.md").read_text()
    for line in (
        "library_name: controlprefix",
        "# A prefix for attribute 'formality=formal'",
        "| slots | 4 |",
        f"| seed | {QUICK['seed']} |",
        "attributes={'formality': 'formal'}",
    ):
        assert line in card
    other = engine()
    other.put(*key, prefix, details=details)
    with pytest.raises(GeometryMismatchError):
        engine("gpt2").put(*key, prefix)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    cp = engine()
    cp.put("task", "t", Prefix.random(cp.geometry, num_slots=2))
    cp.export("task", "t", tmp_path)
    (tmp_path / "prefix.json").write_text('{"kind": "task"}')
    with pytest.raises(PrefixFormatError, match="cannot read"):
        load_folder(tmp_path)
    (tmp_path / "prefix.safetensors").unlink()
    with pytest.raises(StoreError, match="cannot read the prefix file"):
        load_folder(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as uploading and downloading small files needs."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self._json({"url": f"{self._url}/me/formal", "name": "me/formal", "id": "x"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            modes = [{"path": file["path"], **how} for file in files]
            self._json({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{self._url}/me/formal/commit/abc", "commitOid": "abc"}
            self._json({"success": True, **commit, "hookOutput": ""})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        if re.fullmatch(r"/api/models/me/formal(/revision/\w+)?(\?.*)?", self.path):
            files = [{"rfilename": name} for name in self.files]
            self._json({"id": "me/formal", "sha": "a" * 40, "siblings": files})
        elif "/tree/" in self.path:
            self._json(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": n}
                    for n, c in self.files.items()
                ]
            )
        else:
            self._file()

    do_HEAD = do_GET

    @property
    def _url(self) -> str:
        return f"http://{self.headers['Host']}"

    def _file(self) -> None:
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """The files of a stub of the Hub that huggingface_hub talks to."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("constants.ENDPOINT", "hf_api.ENDPOINT", "file_download.ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.{name}", url, raising=False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
        raising=False,
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub.files
    server.shutdown()


@pytest.mark.slow
def test_a_prefix_goes_to_the_hub_and_comes_back(hub: dict[str, bytes]) -> None:
    cp = engine()
    prefix = Prefix.random(cp.geometry, num_slots=3, seed=1)
    cp.put("task", "letters", prefix, details={"made": {"by": "me"}, "hub": "me/copied"})
    url = cp.push_to_hub("task", "letters", "me/formal", token="t")
    assert url.endswith("/me/formal/commit/abc")
    assert {"prefix.safetensors", "prefix.json", "README.md"} <= set(hub)
    other = engine()
    key, version = other.pull_from_hub("me/formal", token="t")
    assert (key, version) == (PrefixKey("task", "letters"), 1)
    stored = other.get("task", "letters")
    assert torch.equal(stored.slots["decoder"], prefix.slots["decoder"])
    (info,) = other.versions("task", "letters")
    assert info.details == {"hub": "me/formal", "made": {"by": "me"}}


@pytest.mark.slow
def test_a_hub_that_refuses_is_one_clear_error(hub: dict[str, bytes]) -> None:
    cp = engine()
    with pytest.raises(StoreError, match="cannot download 'you/missing'"):
        cp.pull_from_hub("you/missing", token="t")
    cp.put("task", "t", Prefix.random(cp.geometry, num_slots=2))
    with pytest.raises(StoreError, match="cannot upload to 'a/b/c'"):
        cp.push_to_hub("task", "t", "a/b/c", token="t")
    assert cp.names("task") == ["t"]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = engine()
    cp.put("task", "t", Prefix.random(cp.geometry, num_slots=2))

    def unreachable(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no route")  # as huggingface_hub's HTTP library raises

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    with pytest.raises(StoreError, match="cannot upload to 'me/t': no route"):
        cp.push_to_hub("task", "t", "me/t")
