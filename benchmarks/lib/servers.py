"""Servers as processes of their own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from controlprefix.model.loading import packaged_model

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


class Process:
    """A program that may be killed and started again.

    Args:
        command: Its command line.
        log: Where its output is added.
        url: What it answers with 200 when it has started; left out, it is not waited for.
        environment: Further environment variables.
    """

    def __init__(
        self, command: Sequence[str], log: Path, url: str | None = None, **environment: str
    ) -> None:
        self.command, self.log, self.url, self.environment = command, log, url, environment
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            SystemExit: If it ends or does not answer; says what it printed last.
        """
        with self.log.open("a") as output:
            self.running = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.url is not None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url, timeout=60).status_code == 200:
                    break
            if self.running.poll() is not None or time.monotonic() > deadline:
                printed = self.log.read_text()[-3000:]
                raise SystemExit(f"{self.command[2]} did not start:\n{printed}")
            time.sleep(0.5)

    def stop(self) -> float:
        """Ask it to end, and kill it if it does not; returns the seconds that it took."""
        if self.running is None:
            return 0.0
        start = time.monotonic()
        self.running.terminate()
        try:
            self.running.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        return time.monotonic() - start

    def kill(self) -> None:
        """Kill it without notice."""
        if self.running is not None:
            self.running.kill()
            self.running.wait()


@contextmanager
def server(
    command: Sequence[str], port: int, log: Path, *, path: str = "/health", **environment: str
) -> Iterator[str]:
    """Run a server; the block starts when it answers, and gets its URL.

    Args:
        command: Its command line.
        port: The port that it listens on.
        log: Where its output is written.
        path: What it answers with 200 when it has started.
        environment: Further environment variables.
    """
    url = f"http://127.0.0.1:{port}"
    process = Process(command, log, f"{url}{path}", **environment)
    try:
        process.start()
        yield url
    finally:
        process.stop()


def vllm_server(
    port: int, folder: Path, log: Path, *options: str, dtype: str = "bfloat16"
) -> contextlib.AbstractContextManager[str]:
    """vLLM with SmolLM2 and the connector of this library, which reads slots in `folder`."""
    transfer = {
        "kv_connector": "ControlPrefixConnector",
        "kv_connector_module_path": "controlprefix.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(folder)},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(packaged_model("smollm2")), "--served-model-name", "smollm2"]
    command += ["--port", str(port), "--dtype", dtype, "--max-model-len", "512"]
    command += ["--block-size", "32", "--kv-transfer-config", json.dumps(transfer), *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return server(command, port, log, **environment)
