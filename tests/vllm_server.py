"""A real vLLM server of a small model, in a process of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from controlprefix import ControlPrefix, Prefix, Request
from controlprefix.vllm.runner import VllmRunner

from models import build, byte_tokenizer

_START_S = 240
SLOTS = {"ana": 5, "bo": 20, "cleo": 32, "dan": 45}  # blocks have 32 tokens
CHAT = byte_tokenizer(chat=True)


def transfer(folder: str, **settings: str) -> dict[str, object]:
    """The `--kv-transfer-config` of vLLM, for our connector."""
    return {
        "kv_connector": "ControlPrefixConnector",
        "kv_connector_module_path": "controlprefix.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": folder, **settings},
    }


@contextlib.contextmanager
def served(
    model: Path,
    prefixes: Path | None,
    *options: str,
    log: Path,
    dtype: str = "float32",
    threads: str = "0",
    **settings: str,
) -> Iterator[str]:
    """While inside, vLLM serves the model in that folder; without prefixes, as it is.

    `settings` are those of the connector.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "tiny", "--dtype", dtype),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--block-size", "32", "--enforce-eager", "--max-model-len", "256"),
        *(
            ("--kv-transfer-config", json.dumps(transfer(str(prefixes), **settings)))
            if prefixes
            else ()
        ),
        *options,
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": threads,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + _START_S
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def engine(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> ControlPrefix:
    """A small model, saved for vLLM too, and a store with a prefix of each kind."""
    torch.manual_seed(0)
    more: dict[str, Any] = {} if name == "llama" else {"sliding_window": 64}
    model = build(name, head_dim=32, dtype=dtype, **more)
    model.save_pretrained(folder / "model")
    CHAT.save_pretrained(folder / "model")
    cp = ControlPrefix.from_pretrained(model, tokenizer=CHAT, store=f"sqlite:///{folder}/store.db")
    for i, (user, count) in enumerate(SLOTS.items()):
        cp.put("user", user, Prefix.random(cp.geometry, num_slots=count, scale=1.0, seed=i))
    for i, task in enumerate(("email", "poem")):
        cp.put("task", task, Prefix.random(cp.geometry, num_slots=40, scale=1.0, seed=10 + i))
    cp.put("attribute", "tone=warm", Prefix.random(cp.geometry, num_slots=8, scale=1.0, seed=20))
    return cp


def requests(**more: Any) -> list[Request]:
    """Users and tasks of all sizes, strengths, and none of them."""
    fields: list[dict[str, Any]] = [
        {},
        *({"user": user} for user in SLOTS),
        *({"task": task, "user": user} for task in ("email", "poem") for user in SLOTS),
        {"task": "email"},
        {"task": "email", "attributes": {"tone": "warm"}, "user": "bo"},
        {"user": "ana", "strengths": {"user": 3.0}},
        {"user": "ana", "strengths": {"user": 0.0}},
    ]
    return [
        Request(prompt="tell me a story " * (1 + i % 3), **item, **{"max_new_tokens": 24, **more})
        for i, item in enumerate(fields)
    ]


def texts_of(cp: ControlPrefix, runner: VllmRunner, request_list: list[Request]) -> list[str]:
    tickets = [runner.submit(cp.resolve(item)) for item in request_list]
    return [ticket.result().text for ticket in tickets]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
