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

import httpx

_START_S = 240


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
