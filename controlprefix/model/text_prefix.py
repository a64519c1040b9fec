"""The keys and values of a text as a prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.model.steering import SteeredModel
from controlprefix.prefixes import LayerSlots, Prefix

_PROBE = (5, 11, 17, 23, 29, 31, 37, 41)  # token ids; every vocabulary has them
_MAX_VALUE_SHIFT = 0.1  # relative change of values that still counts as rounding


def prefix_from_tokens(
    frozen: SteeredModel, ids: Sequence[int], *, num_slots: int | None = None
) -> Prefix:
    """The keys and values of tokens that stand just before position 0, one slot per token.

    On rotary models, attending to it equals prompting with the tokens, as long as they and
    the prompt fit a layer's sliding window. Elsewhere it is a good initialization for
    training: models with other positions read the tokens from position 0, an encoder-decoder
    reads them on both sides, and what recurrent layers would remember is lost.

    Args:
        frozen: The model.
        ids: Token ids, at least one.
        num_slots: Number of slots, if it differs from the number of tokens: the first tokens,
            or the tokens repeated.
    """
    ids = [ids[i % len(ids)] for i in range(len(ids) if num_slots is None else num_slots)]
    return prefix_before_text(frozen, ids)


def prefix_before_text(frozen: SteeredModel, tokens: Sequence[int] | Tensor) -> Prefix:
    """The keys and values of tokens that stand just before position 0: see `prefix_from_tokens`.

    Args:
        frozen: The model.
        tokens: Token ids; or embeddings, `(num_tokens, hidden_size)`, as prompt tuning trains.
    """
    first_position = -len(tokens) if frozen.reads_before_zero else 0
    layers = keys_and_values(frozen, tokens, first_position=first_position)
    return Prefix.from_layers(frozen.geometry, **layers)


def reads_before_zero(frozen: SteeredModel) -> bool:
    """Whether a model reads tokens at negative positions as it does at others.

    Values carry no rotation, so moving a text must not change them. Where it does, the model uses
    positions in another way too, and negative ones may be meaningless to it.
    """
    if frozen.is_encoder_decoder or not is_rotary(frozen.model):
        return False
    here = keys_and_values(frozen, _PROBE)["decoder"][-1][1].float()
    moved = keys_and_values(frozen, _PROBE, first_position=-len(_PROBE))["decoder"][-1][1].float()
    return bool((here - moved).norm() <= _MAX_VALUE_SHIFT * here.norm())


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether positions are rotations of queries and keys (RoPE)."""
    return any("RotaryEmbedding" in type(module).__name__ for module in model.modules())


def keys_and_values(
    frozen: SteeredModel, tokens: Sequence[int] | Tensor, *, first_position: int = 0
) -> dict[str, list[LayerSlots]]:
    """Keys and values of tokens per site and layer.

    Their shapes are `(num_kv_heads, num_tokens, key_dim)` and `(…, value_dim)`.

    Args:
        frozen: The model; slots that are attached to it are ignored.
        tokens: Token ids, at least one; or embeddings, `(num_tokens, hidden_size)`.
        first_position: Position of the first token.
    """
    device = frozen.device
    if isinstance(tokens, Tensor):
        embeddings = tokens.to(device=device, dtype=frozen.dtype)
        inputs: dict[str, Tensor] = {"inputs_embeds": embeddings[None]}
    else:
        inputs = {"input_ids": torch.tensor([list(tokens)], device=device)}
    inputs["attention_mask"] = torch.ones(1, len(tokens), dtype=torch.long, device=device)
    if frozen.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    elif first_position:
        positions = torch.arange(first_position, first_position + len(tokens), device=device)
        inputs["position_ids"] = positions[None]
    layers: dict[str, list[LayerSlots]] = {}
    with torch.no_grad(), frozen.exclusive(), frozen.steering.recorded() as calls:
        frozen.model(**inputs, use_cache=False)
        for call in calls:  # in the order of the layers
            if (layer := call.layer) is not None:
                # Some models have summaries of earlier tokens behind them.
                own = slice(0, len(tokens))
                slots = (call.key[0, :, own], call.value[0, :, own])
                layers.setdefault(layer.site, []).append(slots)
    return layers
