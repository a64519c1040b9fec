"""Images that requests name by URL: from allowed origins alone, within limits."""

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from controlprefix import ControlPrefix, Request, RequestError
from controlprefix.model import FrozenModel
from controlprefix.serving import image_downloads
from controlprefix.serving.image_downloads import origin_of, require_origins
from controlprefix.store import PrefixStore

from helpers import random_prefix
from image_models import image_model, picture, png
from servers import Served


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://a.example/x.png", "https://a.example"),
        ("HTTPS://A.Example:443/x.png", "https://a.example"),
        ("http://a.example:8080/x", "http://a.example:8080"),
        ("http://[::1]:9/x", "http://[::1]:9"),
        ("https://a.example.evil/x", "https://a.example.evil"),
        ("https://a.example@evil/x", None),
        ("https://a.example:x/", None),
        ("file:///etc/passwd", None),
        ("ftp://a.example/x", None),
        ("//a.example/x", None),
        ("", None),
    ],
)
def test_origins(url: str, origin: str | None) -> None:
    assert origin_of(url) == origin


def test_what_is_no_origin_is_refused() -> None:
    assert require_origins(["https://A.example/"]) == {"https://a.example"}
    for wrong in (
        "a.example",
        "*",
        "https://*.example",
        "https://a.example/images",
        "https://a.example?x=1",
        "https://a.example#x",
        "file:///",
    ):
        with pytest.raises(RequestError, match="no origin of images"):
            require_origins([wrong])


class Pictures(BaseHTTPRequestHandler):
    """Serves an image, and what goes wrong with one."""

    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        if self.path == "/missing.png":
            self.send_error(404)
            return
        content = b"no image" if self.path == "/text.png" else png(picture(0))
        self.send_response(200)
        if self.path == "/cut.png":
            self.send_header("Content-Length", str(len(content) + 1))
        self.end_headers()
        for byte in content if self.path == "/slow.png" else [content]:
            self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
            if self.path == "/slow.png" and self.server.stopped.wait(0.05):  # type: ignore[attr-defined]
                return

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def pictures() -> Iterator[str]:
    Pictures.paths = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        server.stopped = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.stopped.set()  # type: ignore[attr-defined]
        server.shutdown()


@pytest.mark.slow
def test_images_are_downloaded_from_allowed_origins_alone(
    tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, processor = image_model("llava")
    frozen = FrozenModel(model, tokenizer, processor=processor)
    url = f"sqlite:///{tmp_path}/prefixes.db"
    cp = ControlPrefix(frozen, PrefixStore(url))
    cp.put("user", "ana", random_prefix(model, 3))
    image = png(picture(0))
    expected = cp.generate(
        Request(prompt="What?", images=[image], user="ana", max_new_tokens=6)
    ).text
    served = Served(url, frozen, open_tenant="default", image_origins=[pictures])
    elsewhere = pictures.replace("127.0.0.1", "localhost")
    try:

        def ask(source: str) -> str:
            parts = [
                {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": source}},
            ]
            messages: Any = [{"role": "user", "content": parts}]
            answer = served.client().chat.completions.create(
                model="tiny", messages=messages, extra_body={"user": "ana"}, max_tokens=6,
                temperature=0,
            )  # fmt: skip
            return str(answer.choices[0].message.content)

        assert ask(f"{pictures}/a.png") == expected
        parts: Any = [{"type": "input_image", "image_url": f"{pictures}/a.png"}]
        parts.append({"type": "input_text", "text": "What?"})
        answer = served.client().responses.create(
            model="tiny", input=[{"role": "user", "content": parts}], extra_body={"user": "ana"},
            max_output_tokens=6, temperature=0,
        )  # fmt: skip
        assert answer.output_text == expected
        message = {"role": "user", "content": parts}
        body = {"user": "ana", "messages": [message], "chosen": "a", "rejected": "b"}
        assert httpx.post(f"{served.base}/v1/feedback", json=body).status_code == 201
        (feedback,) = cp.store.feedback("ana")
        assert base64.b64encode(image).decode() in feedback

        for source in (f"{elsewhere}/a.png", pictures.replace("http", "https") + "/a.png"):
            Pictures.paths.clear()
            with pytest.raises(openai.BadRequestError, match="from their origin"):
                ask(source)
            assert not Pictures.paths
        for name, reason in (
            ("moved", "answered 302"),
            ("missing", "answered 404"),
            ("text", "cannot be read"),
            ("cut", "cannot be downloaded"),
        ):
            with pytest.raises(openai.BadRequestError, match=reason):
                ask(f"{pictures}/{name}.png")
        assert "/a.png" not in Pictures.paths
        assert ask(f"{pictures}/ä b.png") == expected
        monkeypatch.setattr(served.gateway.image_downloads, "_max_bytes", 10)
        with pytest.raises(openai.BadRequestError, match="10 bytes in all"):
            ask(f"{pictures}/a.png")
        monkeypatch.setattr(served.gateway.image_downloads, "_max_bytes", 1 << 20)
        monkeypatch.setattr(image_downloads, "_TIMEOUT_S", 0.5)
        with pytest.raises(openai.BadRequestError, match=r"within 0 s|within 1 s"):
            ask(f"{pictures}/slow.png")
        monkeypatch.setattr(image_downloads, "_MAX_REQUESTS", 0)
        with pytest.raises(openai.InternalServerError, match="download images already"):
            ask(f"{pictures}/a.png")
        assert not served.gateway.image_downloads._num_requests
        assert not served.gateway.image_downloads._turns
    finally:
        served.close()
