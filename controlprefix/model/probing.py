"""Probing: geometry and fingerprint of a model, read off a short forward pass."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from controlprefix.errors import UnsupportedModelError
from controlprefix.model.attention import intercepted, recording, require_supported
from controlprefix.model.fingerprint import fingerprint, require_one_device
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
    require_one_device(model)
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device=device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :_NUM_DECODER_TOKENS]
    not_compiled = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), not_compiled, intercepted(), recording() as calls:
        try:
            with _call_order(model) as order:
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
        fingerprint=fingerprint(model, order, {call.module for call in calls}),
        model_name=_public_name(model),
    )
    return geometry, layers


@contextlib.contextmanager
def _call_order(model: nn.Module) -> Iterator[dict[nn.Module, int]]:
    """The modules called inside, with the position of their first call."""
    order: dict[nn.Module, int] = {}
    thread = threading.get_ident()

    def note(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            order.setdefault(module, len(order))

    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(note).remove)
        yield order


def _public_name(model: PreTrainedModel) -> str:
    """The hub id, or the last part of a folder: stored prefixes must not contain local paths."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name
