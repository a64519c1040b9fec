"""A server of this process for tests, and a store with two prefixes each."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import uvicorn

from controlprefix import ControlPrefix, Prefix, Request
from controlprefix.model import FrozenModel
from controlprefix.serving import Server, create_app
from controlprefix.serving.connections import config_for
from controlprefix.store import PrefixStore

from helpers import frozen
from models import build, byte_tokenizer

MODEL = build("llama")
TOKENIZER = byte_tokenizer(chat=True)
CHAT = "/v1/chat/completions"
Keys = dict[str, dict[str, str]]  # of a tenant, the headers of its requests
MESSAGES: Any = [{"role": "user", "content": "Tell Sam."}]


def fill(url: str, tenant: str, scale: float) -> None:
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(url, tenant=tenant))
    for seed, (kind, part) in enumerate(
        (("task", "email"), ("attribute", "tone=warm"), ("user", "ana"))
    ):
        prefix = Prefix.random(cp.geometry, num_slots=3, scale=scale, seed=seed)
        cp.put(kind, part, prefix)  # type: ignore[arg-type]
    cp.store.close()


def expected(store: str, tenant: str = "mine", **fields: Any) -> str:
    """What the library alone generates."""
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant=tenant))
    try:
        return cp.generate(Request(**fields)).text
    finally:
        cp.store.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Served:
    """A server of this process, on a port of its own."""

    def __init__(self, url: str, model: FrozenModel | None = None, **options: Any) -> None:
        self.url = url
        model = model or frozen(MODEL, TOKENIZER)
        self.gateway = Server(model, url, name="tiny", **options)
        self.batcher: Any = self.gateway._runner
        config = config_for(
            create_app(self.gateway), host="127.0.0.1", port=0, limits=self.gateway.limits
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base}/v1", api_key=key, max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def chat(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields}
    return httpx.post(f"{served.base}/v1/chat/completions", json=body, timeout=60)


def complete(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, **fields}
    return httpx.post(f"{served.base}/v1/completions", json=body, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    data = [
        line.removeprefix("data: ")
        for line in response.text.splitlines()
        if line.startswith("data: ") and line != "data: [DONE]"
    ]
    return [json.loads(line) for line in data]


# --- fields --------------------------------------------------------------------------------------


def ask(served: Served, key: dict[str, str], **fields: Any) -> httpx.Response:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "temperature": 0,
        **fields,
    }
    return httpx.post(served.base + CHAT, json=body, headers=key, timeout=60)
