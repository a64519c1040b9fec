"""Fingerprint: a hash of all that decides what a frozen model computes on text."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from controlprefix.errors import UnsupportedModelError

# Settings of a config that leave a forward pass as it is, or that the weights' shapes tell.
_IRRELEVANT_SETTINGS = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "layerdrop",
    "max_position_embeddings",  # only a limit, unless rotary scaling has it: see below
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
}
_NUM_WORKERS = min(8, os.cpu_count() or 1)


def fingerprint(
    model: PreTrainedModel, calls: Mapping[nn.Module, int], attention: Collection[nn.Module]
) -> str:
    """SHA-256 over the weights, persistent buffers and settings of a model's text part.

    It depends on neither the names of parameters, which transformers changes between versions,
    nor the dtype: floating-point values are hashed as bfloat16. Modules come in the order of
    their calls; those that text alone does not reach, such as a vision tower, are left out.

    Args:
        model: The model.
        calls: Modules called in a forward pass -> position among the calls.
        attention: The attention modules of the model's layers.

    Returns:
        64 hexadecimal digits.
    """
    inside = _called_inside(model, calls)
    around_layers = {module for module, below in inside.items() if below.issuperset(attention)}
    state = [
        value
        for module in _in_order(model, calls, inside, around_layers)
        for value in _own_state(module)
    ]
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        digests = list(pool.map(_digest, state))
    sha = hashlib.sha256(json.dumps(_settings(model.config), sort_keys=True).encode())
    for digest in digests:
        sha.update(digest)
    return sha.hexdigest()


def require_one_device(model: nn.Module) -> None:
    """Check that all weights are in the memory of one device.

    Raises:
        UnsupportedModelError: If they are not.
    """
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    name = type(model).__name__
    if "meta" in devices:
        raise UnsupportedModelError(
            f"weights of this {name} are offloaded (on the device 'meta'), where slots cannot "
            "follow; load the whole model on one device, without device_map and cpu_offload"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"this {name} is split over the devices {', '.join(sorted(devices))}; load it on one "
            "device, or serve it with vLLM, which splits prefixes with the model"
        )


def _called_inside(
    model: nn.Module, calls: Mapping[nn.Module, int]
) -> dict[nn.Module, set[nn.Module]]:
    """Per module, the called modules inside it, itself included."""
    inside: dict[nn.Module, set[nn.Module]] = {}

    def collect(module: nn.Module) -> set[nn.Module]:
        if module not in inside:
            below = inside[module] = {module} if module in calls else set()
            for child in module.children():
                below |= collect(child)
        return inside[module]

    collect(model)
    return inside


def _in_order(
    module: nn.Module,
    calls: Mapping[nn.Module, int],
    inside: Mapping[nn.Module, set[nn.Module]],
    around_layers: Collection[nn.Module],
) -> Iterator[nn.Module]:
    """A module and all inside it: by their first call, and lists in their own order."""
    yield module
    children = list(module.children())
    if module in around_layers:
        children = [child for child in children if inside[child]]
    if not isinstance(module, nn.ModuleList):  # which experts of a list are called may vary
        children.sort(key=lambda child: min((calls[m] for m in inside[child]), default=len(calls)))
    for child in children:
        yield from _in_order(child, calls, inside, around_layers)


def _own_state(module: nn.Module) -> Iterator[Any]:
    """Parameters, persistent buffers and extra state of a module, without its children's.

    `state_dict` has what quantized modules keep elsewhere. The adapters of a PEFT layer count
    as far as they are active.
    """
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", True)
    yield from state.values()
    for name in ("active_adapters", "disable_adapters", "merged_adapters", "scaling"):
        if isinstance(value := getattr(module, name, None), (bool, list, dict)):
            yield repr(value)


def _digest(value: Any) -> bytes:
    sha = hashlib.sha256()
    for part in _flatten(value):
        if isinstance(part, Tensor):
            part = part.detach()
            if part.is_floating_point():
                part = part.to(torch.bfloat16)
            sha.update(f"{tuple(part.shape)}".encode())
            sha.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            sha.update(repr(part).encode())
    return sha.digest()


def _flatten(value: Any) -> Iterator[Any]:
    """The plain tensors and constants that a value of a state dict consists of."""
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield str(name)
            yield from _flatten(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    elif not isinstance(value, Tensor):
        yield value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    elif value.is_quantized:  # torch.ao
        yield value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield from (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        else:
            yield from (value.q_scale(), value.q_zero_point())
    elif hasattr(value, "__tensor_flatten__"):  # subclasses of torchao and optimum-quanto
        names, _ = value.__tensor_flatten__()
        yield from (part for name in names for part in _flatten(getattr(value, name)))
    else:
        yield value.as_subclass(Tensor)
        for holder in (value, getattr(value, "quant_state", None)):  # bitsandbytes
            attributes = vars(holder).items() if hasattr(holder, "__dict__") else ()
            yield from (item for _, item in sorted(attributes) if type(item) is Tensor)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What the config of the text model sets apart from its class's default values."""
    text = config.get_text_config()
    settings = {
        name: value
        for name, value in text.to_diff_dict().items()
        if not (name in _IRRELEVANT_SETTINGS or name in text.sub_configs)
        and not (name.startswith("_") or "drop" in name)
    }
    rope = settings["rope_parameters"] = getattr(text, "rope_parameters", None)
    if rope and "default" not in str(rope.get("rope_type", rope)):
        settings["max_position_embeddings"] = getattr(text, "max_position_embeddings", None)
    return json.loads(json.dumps(settings, default=str))


def first_fingerprint(model: nn.Module) -> str:
    """The fingerprint that version 0.1.0 gave a model, to find its prefixes in an older store.

    It is a SHA-256 over the names, shapes and values (as bfloat16) of all parameters, so two
    models that have it in common give the same logits, up to settings and buffers.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach()
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        sha.update(f"{name} {tuple(values.shape)}".encode())
        sha.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
