"""Probing: geometry and fingerprint of a model, read off a short forward pass."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from controlprefix.errors import UnsupportedModelError
from controlprefix.model.attention import intercepted, recording, require_supported
from controlprefix.prefixes import SITES, Geometry, LayerShape, Site

LayerIndex = tuple[Site, int]  # site, and index among its layers

_NUM_TOKENS = 3
_NUM_DECODER_TOKENS = 2  # differs from the encoder's, to tell cross from self attention


def probe(model: PreTrainedModel) -> tuple[Geometry, Mapping[str, LayerIndex]]:
    """Run a few tokens through a model and record which modules call attention.

    Returns:
        The geometry; and per attention module, by its path in the model, its site and its
        index among the layers of that site.

    Raises:
        UnsupportedModelError: If the model's attention cannot take slots.
    """
    require_supported(model)
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device=device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :_NUM_DECODER_TOKENS]
    with torch.no_grad(), intercepted(), recording() as calls:
        try:
            model(**inputs, use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be run on tokens alone: {error}"
            ) from error
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    paths = {module: path for path, module in model.named_modules()}
    shapes: dict[Site, list[LayerShape]] = {"decoder": [], "encoder": [], "cross": []}
    layers: dict[str, LayerIndex] = {}
    for call in calls:
        site: Site = "decoder"
        if call.module in in_encoder:
            site = "encoder"
        elif encoder is not None and call.key.shape[2] == _NUM_TOKENS:
            site = "cross"
        path = paths.get(call.module)
        if path is None or path in layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} calls the attention {path!r} more than once per pass, "
                "so its layers cannot be told apart"
            )
        layers[path] = (site, len(shapes[site]))
        _, num_kv_heads, _, key_dim = call.key.shape
        shapes[site].append(LayerShape(num_kv_heads, key_dim, call.value.shape[3]))
    required: tuple[Site, ...] = SITES if encoder is not None else ("decoder",)
    if missing := [site for site in required if not shapes[site]]:
        raise UnsupportedModelError(
            f"the {missing[0]} of {type(model).__name__} does not call attention through "
            "transformers' AttentionInterface (state-space models and some older classes do "
            "not), so it cannot attend to slots; use a model class that does, such as Llama, "
            "Qwen3, Mistral, Gemma 3, GPT-2, GPT-NeoX, OPT, BART or T5"
        )
    geometry = Geometry(
        decoder=tuple(shapes["decoder"]),
        encoder=tuple(shapes["encoder"]),
        cross=tuple(shapes["cross"]),
        fingerprint=weights_fingerprint(model),
        model_name=_public_name(model),
    )
    return geometry, layers


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all parameters.

    Values are hashed as bfloat16, so that a model loaded in float32 and in bfloat16 has the
    same fingerprint.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach()
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        sha.update(f"{name} {tuple(values.shape)}".encode())
        sha.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _public_name(model: PreTrainedModel) -> str:
    """The hub id, or the last part of a folder: stored prefixes must not contain local paths."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name
