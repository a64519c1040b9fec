"""vLLM in shards, behind one address, with adapters, in bfloat16, with sliding windows."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import torch
from safetensors.torch import save_file

from controlprefix import (
    ControlPrefix,
    EngineError,
    Prefix,
    Request,
)

from models import build
from vllm_server import CHAT, SLOTS, engine, metric, requests, served, texts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def cp(folder: Path) -> ControlPrefix:
    return engine(folder)


def test_a_server_without_the_connector_is_noticed_in_bfloat16_too(tmp_path: Path) -> None:
    cp = engine(tmp_path, dtype=torch.bfloat16)
    with (
        served(tmp_path / "model", None, log=tmp_path / "log", dtype="bfloat16") as url,
        pytest.raises(EngineError, match="connector"),
    ):
        cp.vllm_runner(url, tmp_path / "prefixes")


def test_in_two_shards_and_with_too_few_blocks_for_all(
    cp: ControlPrefix, folder: Path, tmp_path: Path
) -> None:
    options = ("--tensor-parallel-size", "2", "--num-gpu-blocks-override", "12")
    request = requests(max_new_tokens=100)
    expected = [item.text for item in cp.generate(request)]
    log = tmp_path / "log"
    with served(folder / "model", folder / "prefixes", *options, log=log, threads="0|1") as url:
        runner = cp.vllm_runner(url, folder / "prefixes")
        assert texts_of(cp, runner, request) == expected
        assert metric(url, "vllm:num_preemptions_total") > 0
        runner.close()


def test_two_engines_behind_one_address(cp: ControlPrefix, folder: Path, tmp_path: Path) -> None:
    options = ("--data-parallel-size", "2")
    request = requests()
    expected = [item.text for item in cp.generate(request)]
    log = tmp_path / "log"
    with served(folder / "model", folder / "prefixes", *options, log=log, threads="0|1") as url:
        runner = cp.vllm_runner(url, folder / "prefixes")
        assert texts_of(cp, runner, request) == texts_of(cp, runner, request) == expected
        runner.close()


def with_adapter(model: Any, folder: Path, seed: int) -> None:
    """Add a LoRA adapter of random weights to a model, and save it as PEFT does."""
    torch.manual_seed(seed)
    weights, rank = {}, 8
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            down = torch.randn(rank, layer.in_features) * 0.3
            up = torch.randn(layer.out_features, rank) * 0.3
            layer.weight.data += up @ down * 2
            weights[f"base_model.model.{name}.lora_A.weight"] = down
            weights[f"base_model.model.{name}.lora_B.weight"] = up
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
              "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"],
              "lora_dropout": 0.0, "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_lora_adapters_beside_prefixes(cp: ControlPrefix, folder: Path, tmp_path: Path) -> None:
    """Two adapters in one batch: vLLM's CPU build lends one to rows that have none."""
    engines = {}
    for seed, name in enumerate(("first", "second")):
        model = build("llama", head_dim=32)
        model.load_state_dict(cp._frozen.model.state_dict())
        with_adapter(model, tmp_path / name, seed)
        engines[name] = own = ControlPrefix.from_pretrained(
            model, tokenizer=CHAT, store=f"sqlite:///{tmp_path}/{name}.db"
        )
        for i, (user, count) in enumerate(SLOTS.items()):
            own.put("user", user, Prefix.random(own.geometry, num_slots=count, scale=1.0, seed=i))
    request_list = [Request(prompt="tell me", user=user, max_new_tokens=16) for user in SLOTS]
    expected = {name: [c.text for c in own.generate(request_list)] for name, own in engines.items()}
    assert expected["first"] != expected["second"]
    adapters = (f"{name}={tmp_path}/{name}" for name in engines)
    options = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules")
    prefixes, log = tmp_path / "prefixes", tmp_path / "log"
    with served(folder / "model", prefixes, *options, *adapters, log=log) as url:
        runners = {
            name: own.vllm_runner(url, prefixes, model_name=name) for name, own in engines.items()
        }
        tickets = [
            (name, runners[name].submit(engines[name].resolve(item)))
            for item in request_list
            for name in engines
        ]
        texts: dict[str, list[str]] = {name: [] for name in engines}
        for name, ticket in tickets:
            texts[name].append(ticket.result().text)
        assert texts == expected
        with pytest.raises(EngineError, match="no model 'x'; it serves: first, second, tiny"):
            cp.vllm_runner(url, prefixes, model_name="x")
        with pytest.raises(EngineError, match="serves another model"):
            cp.vllm_runner(url, prefixes, model_name="first")
        for runner in runners.values():
            runner.close()


def test_in_bfloat16_log_probabilities_are_within_a_tenth(tmp_path: Path) -> None:
    """A tenth of a nat; transformers in bfloat16 and float32 differ by as much."""
    cp = engine(tmp_path, dtype=torch.bfloat16)
    request_list = requests(max_new_tokens=1)
    batcher = cp.batcher()
    options = {"log": tmp_path / "log", "dtype": "bfloat16"}
    with served(tmp_path / "model", tmp_path / "prefixes", **options) as url:  # type: ignore[arg-type]
        runner = cp.vllm_runner(url, tmp_path / "prefixes")
        apart = []
        for request in request_list:
            ours, other = (
                item.submit(cp.resolve(request), top_log_probs=5) for item in (batcher, runner)
            )
            ours.result()
            other.result()
            names = dict(ours.tokens[0].top)
            apart += [abs(names[t] - p) for t, p in other.tokens[0].top if t in names]
        assert len(apart) > 3 * len(request_list)
        assert max(apart) < 0.1
        runner.close()
    batcher.close()


def test_slots_leave_a_sliding_window_there_and_not_here(tmp_path: Path) -> None:
    cp = engine(tmp_path, "gemma3")
    short, long = "tell me", "tell me a very long story of " * 3
    request = [Request(prompt=short, user=user, max_new_tokens=8) for user in ("ana", "bo")]
    expected = [item.text for item in cp.generate(request)]
    with served(tmp_path / "model", tmp_path / "prefixes", log=tmp_path / "log") as url:
        runner = cp.vllm_runner(url, tmp_path / "prefixes")
        assert texts_of(cp, runner, request) == expected
        # A prefix that cannot be read fails its request alone here too, where layers differ.
        slots = {"file": "0" * 64, "num_slots": 4}
        body = {"model": "tiny", "prompt": [7] * 20, "max_tokens": 4}
        body["kv_transfer_params"] = {"controlprefix": slots}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 500
        assert texts_of(cp, runner, request) == expected
        # Beyond the window of 64 tokens, its layers no longer see the slots.
        far = Request(prompt=long, user="bo", max_new_tokens=24)
        assert runner.submit(cp.resolve(far)).result().text != cp.generate(far).text
        runner.close()
