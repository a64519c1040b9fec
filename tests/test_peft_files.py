"""PEFT checkpoints as prefixes and back, against PEFT itself."""

import gc
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlprefix import (
    ControlPrefix,
    GeometryMismatchError,
    Prefix,
    PrefixFormatError,
    Request,
    RequestError,
    UnsupportedModelError,
)

from helpers import engine
from models import build, byte_tokenizer

ROTARY = ["llama", "qwen3", "mistral", "gemma2"]
# PEFT's slots leave a sliding window as tokens do, so windows are wide here.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64},
    "gemma2": {"sliding_window": 64, "attention": "eager"},
}
IDS = torch.tensor([[5, 9, 17, 3, 40, 22], [7, 7, 31, 2, 11, 60]])


def peft_model(name: str, config: Any, folder: Path) -> tuple[Any, Any]:
    """A model with a PEFT adapter of random values, which is saved to a folder."""
    base = build(name, **CHANGES.get(name, {}))
    model = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    model.save_pretrained(str(folder))
    return base, model.eval()


def prefix_tuning(name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    shape = engine(name, **CHANGES.get(name, {})).geometry.decoder[0]
    sizes = {
        "num_attention_heads": shape.num_kv_heads,
        "token_dim": shape.num_kv_heads * shape.key_dim,
    }
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, **{**sizes, **changes}
    )
    return peft_model(name, config, folder)


def steered(base: Any, prefix: Prefix, ids: Tensor, **inputs: Any) -> Tensor:
    cp = ControlPrefix.from_pretrained(base, tokenizer=byte_tokenizer(), store="sqlite://")
    cp.put("task", "t", prefix)
    with torch.no_grad(), cp.assembled(Request(prompt="x", task="t")):
        logits: Tensor = cp.model(ids, **inputs).logits
    return logits


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_tuning_gives_pefts_logits(name: str, projection: bool, tmp_path: Path) -> None:
    base, model = prefix_tuning(
        name, tmp_path, prefix_projection=projection, encoder_hidden_size=16
    )
    with torch.no_grad():
        expected = model(IDS).logits
    cp = ControlPrefix.from_pretrained(base, tokenizer=byte_tokenizer(), store="sqlite://")
    prefix = Prefix.from_peft(tmp_path, cp.geometry)
    assert (prefix.num_slots, prefix.is_exact) == (5, True)
    torch.testing.assert_close(steered(base, prefix, IDS), expected, atol=2e-5, rtol=1e-5)


def test_a_left_padded_batch_gives_pefts_logits(tmp_path: Path) -> None:
    base, model = prefix_tuning("llama", tmp_path)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        # PEFT adds the number of virtual tokens to explicit positions.
        expected = model(IDS, attention_mask=mask, position_ids=positions).logits
    cp = engine_of(base)
    prefix = Prefix.from_peft(tmp_path, cp.geometry)
    actual = steered(base, prefix, IDS, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def engine_of(base: Any) -> ControlPrefix:
    return ControlPrefix.from_pretrained(base, tokenizer=byte_tokenizer(), store="sqlite://")


def test_greedy_texts_are_pefts(tmp_path: Path) -> None:
    base, model = prefix_tuning("llama", tmp_path)
    expected = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False
    )
    cp = engine_of(base)
    cp.put("task", "t", Prefix.from_peft(tmp_path, cp.geometry))
    with cp.assembled(Request(prompt="x", task="t")):
        actual = base.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False
        )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ROTARY)
def test_prompt_tuning_gives_pefts_logits(name: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    base, model = peft_model(name, config, tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits[:, 4:]
    cp = engine_of(base)
    prefix = cp.prefix_from_peft(tmp_path)
    assert prefix.is_exact
    torch.testing.assert_close(steered(base, prefix, IDS), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PrefixFormatError, match=r"use ControlPrefix.prefix_from_peft"):
        Prefix.from_peft(tmp_path, cp.geometry)


def test_a_task_of_a_multitask_checkpoint(tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2
    )
    base, model = peft_model("llama", config, tmp_path)
    with torch.no_grad():
        expected = model(IDS, task_ids=torch.tensor([1, 1])).logits[:, 4:]
    cp = engine_of(base)
    actual = steered(base, cp.prefix_from_peft(tmp_path, task=1), IDS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PrefixFormatError, match="has tasks 0 to 2; give one of these"):
        cp.prefix_from_peft(tmp_path)


@pytest.mark.parametrize("name", ROTARY)
def test_a_requests_union_is_a_checkpoint_that_peft_loads(name: str, tmp_path: Path) -> None:
    cp = engine(name, **CHANGES.get(name, {}))
    for kind, key, seed in (("task", "t", 1), ("attribute", "tone=warm", 2), ("user", "ana", 3)):
        prefix = Prefix.random(cp.geometry, num_slots=3, seed=seed, scale=1.0)
        cp.put(kind, key, prefix)  # type: ignore[arg-type]
    request = Request(
        prompt="x", task="t", user="ana", attributes={"tone": "warm"}, strengths={"tone": 2}
    )
    with torch.no_grad(), cp.assembled(request):
        expected = cp.model(input_ids=IDS, use_cache=False).logits
    cp.save_peft(request, tmp_path)
    base = build(name, **CHANGES.get(name, {}))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-5)
    half = request.model_copy(update={"strengths": {"tone": 0.5}})
    with pytest.raises(RequestError, match="strength 0.5; a PEFT checkpoint can only express"):
        cp.save_peft(half, tmp_path)


def test_a_prefix_goes_out_and_comes_back(tmp_path: Path) -> None:
    cp = engine()
    prefix = Prefix.random(cp.geometry, num_slots=6, seed=4)
    prefix.to_peft(tmp_path)
    again = Prefix.from_peft(tmp_path, cp.geometry)
    torch.testing.assert_close(again.slots["decoder"], prefix.slots["decoder"])
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = Prefix.load(tmp_path / "prefix.safetensors")
    with pytest.raises(RequestError, match="give cp.geometry"):
        loaded.to_peft(tmp_path)
    loaded.to_peft(tmp_path, cp.geometry)
    cp.put("user", "ana", prefix)
    cp.get("user", "ana").to_peft(tmp_path / "from the store")


@pytest.mark.slow
def test_what_cannot_be_exact_is_a_start_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models with absolute positions have their text elsewhere in PEFT."""
    base, _ = prefix_tuning("gpt2", tmp_path)
    cp = engine_of(base)
    prefix = Prefix.from_peft(tmp_path, cp.geometry)
    assert prefix.is_exact is False
    assert "only a start for training" in caplog.text
    cp.put("task", "t", prefix)
    with pytest.raises(UnsupportedModelError, match="cannot be shifted along positions"):
        prefix.to_peft(tmp_path)
    with pytest.raises(GeometryMismatchError, match="load the model that it was made for"):
        Prefix.from_peft(tmp_path, engine("llama", num_hidden_layers=1).geometry)
    t5 = engine("t5")
    with pytest.raises(GeometryMismatchError):
        Prefix.from_peft(tmp_path, t5.geometry)


@pytest.mark.slow
def test_a_model_that_is_gone_is_an_error_not_a_start(tmp_path: Path) -> None:
    prefix_tuning("llama", tmp_path)
    geometry = engine().geometry  # nothing else holds the model
    gc.collect()
    with pytest.raises(RequestError, match="no longer loaded"):
        Prefix.from_peft(tmp_path, geometry)


def test_damaged_and_other_checkpoints_are_refused(tmp_path: Path) -> None:
    cp = engine()
    with pytest.raises(PrefixFormatError, match="is no PEFT checkpoint"):
        Prefix.from_peft(tmp_path, cp.geometry)
    Prefix.random(cp.geometry, num_slots=3).to_peft(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for changes, message in (
        ({"peft_type": "LORA"}, "holds 'LORA'; only virtual tokens can become a prefix"),
        ({"num_virtual_tokens": 4}, "no tensor 'prompt_embeddings' with 4 virtual tokens"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(PrefixFormatError, match=message):
            Prefix.from_peft(tmp_path, cp.geometry)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    broken = {"prompt_embeddings": tensors["prompt_embeddings"] * float("nan")}
    save_file(broken, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PrefixFormatError, match="NaN"):
        Prefix.from_peft(tmp_path, cp.geometry)


def test_a_prefix_made_of_a_text_is_written_without_naming_the_model(tmp_path: Path) -> None:
    cp = engine()
    prefix = cp.prefix_from_text("hello there")
    prefix.to_peft(tmp_path / "peft")
    read = Prefix.from_peft(tmp_path / "peft", cp.geometry)
    assert torch.allclose(read.slots["decoder"], prefix.slots["decoder"], atol=1e-5)
