"""The fingerprint: equal for the same computation, different for every other."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from controlprefix import ControlPrefix
from controlprefix.errors import GeometryMismatchError, UnsupportedModelError
from controlprefix.model.fingerprint import first_fingerprint
from controlprefix.model.probing import probe

from helpers import random_prefix
from models import ALL, PARTICULAR, build, byte_tokenizer

EAGER_ONLY = ("gemma2", "gpt_oss")


def fingerprint(model: Any) -> str:
    return probe(model)[0].fingerprint


def renamed(model: nn.Module, names: dict[str, str]) -> None:
    """Rename children, which also moves them behind their siblings."""
    for module in list(model.modules()):
        for old, new in names.items():
            if old in module._modules:
                module._modules[new] = module._modules.pop(old)
                parent: Any = module  # the code goes on to use the old name
                parent.__dict__[old] = module._modules[new]


@pytest.mark.parametrize("name", [*ALL, "gpt_oss", "gemma4"])
def test_it_depends_on_values_and_neither_on_names_nor_on_the_dtype(name: str) -> None:
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    model = build(name, attention=attention)
    rounded = build(name, attention=attention, dtype=torch.bfloat16)
    assert fingerprint(copy.deepcopy(rounded).float()) == fingerprint(rounded)
    expected = fingerprint(model)
    renamed(model, {"model": "text", "transformer": "text", "self_attn": "attention", "fc1": "up"})
    assert fingerprint(model) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALL, *PARTICULAR])
def test_each_weight_counts_and_so_does_its_place(name: str) -> None:
    model = build(name, attention="eager" if name in EAGER_ONLY else "sdpa")
    expected = fingerprint(model)
    fingerprints = {expected}
    for parameter in model.parameters():
        values = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1.0
        fingerprints.add(fingerprint(model))
        parameter.data.copy_(values)
    assert len(fingerprints) == len(list(model.parameters())) + 1
    assert fingerprint(model) == expected


def test_exchanged_layers_are_another_model() -> None:
    model: Any = build("llama")
    expected = fingerprint(model)
    layers = model.model.layers
    first, second = (layer.state_dict() for layer in copy.deepcopy(layers[:2]))
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)
    assert fingerprint(model) != expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
    ],
)
def test_settings_that_change_the_computation_count(changes: dict[str, Any]) -> None:
    assert fingerprint(build("llama", **changes)) != fingerprint(build("llama"))


def test_settings_that_do_not_change_it_do_not_count() -> None:
    changes: dict[str, Any] = {
        "max_position_embeddings": 512,
        "use_cache": False,
        "attention_dropout": 0.1,
    }
    assert fingerprint(build("llama", **changes)) == fingerprint(build("llama"))
    assert fingerprint(build("llama", attention="eager")) == fingerprint(build("llama"))


def test_the_text_model_of_a_vision_language_class_is_the_same_model() -> None:
    text = build("gemma3")
    values = text.config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=values, vision_config=vision, mm_tokens_per_image=4
    )
    whole: Any = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    assert fingerprint(whole) == fingerprint(text)


def test_wrappers_do_not_count() -> None:
    model = build("llama")
    expected = fingerprint(model)
    model.model.layers[0].compile(backend="eager")
    model.compile(backend="eager")
    assert fingerprint(model) == expected
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert fingerprint(model) == expected


def test_weights_in_buffers_and_packed_weights_count() -> None:
    models = [build("llama") for _ in range(2)]
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight.mul_(2)
    quantized = [
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in models
    ]
    assert fingerprint(quantized[0]) != fingerprint(quantized[1])
    assert fingerprint(quantized[0]) == fingerprint(copy.deepcopy(quantized[0]))
    for model, value in zip(models, (1, 2), strict=True):
        model.model.layers[0].register_buffer("qweight", torch.tensor([value]))
    assert len({fingerprint(model) for model in models}) == 2


def test_an_adapter_counts_as_far_as_it_is_active() -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapper = get_peft_model(build("llama"), config, "first")
    wrapper.add_adapter("second", config)
    base = wrapper.get_base_model()
    first = fingerprint(base)
    wrapper.set_adapter("second")
    assert fingerprint(base) != first
    wrapper.set_adapter("first")
    assert fingerprint(base) == first
    assert fingerprint(wrapper.unload()) == fingerprint(build("llama"))


def change_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def change_scaling(model: PreTrainedModel) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("change", [change_weights, change_scaling])
def test_a_model_that_changed_in_place_is_noticed(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = build("llama")
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    prefix = random_prefix(model, 3)
    cp.put("task", "note", prefix)
    change(model)
    again = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    assert again.geometry.fingerprint != prefix.geometry.fingerprint
    with pytest.raises(GeometryMismatchError, match="weights"):
        again.put("task", "note", prefix)


def test_offloaded_and_split_models_are_refused_with_the_reason() -> None:
    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded.*load the whole model"):
        ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    split = build("llama")
    split.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        ControlPrefix.from_pretrained(split, tokenizer=byte_tokenizer(), store="sqlite://")


GOLDEN = {
    "llama": "826721148d1f3925d9fa341b8477bc4e5c330c472c0d3a0c4c3c442386101382",
    "gemma3": "f6ae92b3d7f5f0521158412b3307b95c2413db59315647000360581992e63c55",
    "gpt2": "a9f2821a2f42422c45fb5045900fbf2711a66dea1119a09afe39938400d0d42e",
    "bart": "b1689c07463cfaf5cd189ff23b39d1a9680673fa8dd641afb8c1907c4f6bbb13",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_stores_outlive_upgrades(name: str) -> None:
    """Values recorded with transformers 5.16 and 5.23: another one would orphan all prefixes."""
    model = build(name)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel()) * 31 + 7 * i) % 17 - 8
            parameter.copy_(values.view(parameter.shape) / 64)
    assert fingerprint(model) == GOLDEN[name]


def test_the_context_counts_where_rotary_scaling_depends_on_it() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    short, long = (
        build("llama", rope_parameters=rope, max_position_embeddings=n) for n in (64, 128)
    )
    assert fingerprint(short) != fingerprint(long)


def test_the_first_fingerprint_is_that_of_version_0_1_0() -> None:
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    hashed = b"bias (1,)" + b"\x00\x3f" + b"weight (1, 2)" + b"\x80\x3f\x00\xc0"  # as bfloat16
    assert first_fingerprint(layer) == hashlib.sha256(hashed).hexdigest()
