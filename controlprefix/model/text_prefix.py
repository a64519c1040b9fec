"""A text's own keys and values as a prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.model.steering import Steering
from controlprefix.prefixes.prefix import LayerSlots, Prefix


def prefix_from_tokens(
    model: PreTrainedModel, ids: Sequence[int], *, num_slots: int | None = None
) -> Prefix:
    """What attention would read of tokens that stand just before position 0.

    Where all that tokens tell each other goes through rotary attention, attending to
    it equals prompting with the tokens, as long as text and prompt fit a layer's sliding
    window. Elsewhere it is a good place to start training: models with other positions
    read the tokens from position 0, an encoder-decoder reads them on both sides, and
    what recurrent layers would remember is lost.

    Args:
        model: Frozen.
        ids: Token ids, at least one; one slot each.
        num_slots: So many, from the first tokens, or from the tokens over and over.
    """
    ids = [ids[i % len(ids)] for i in range(len(ids) if num_slots is None else num_slots)]
    layers = keys_and_values(model, ids, 0)
    if not model.config.is_encoder_decoder and is_rotary(model):
        before_zero = keys_and_values(model, ids, -len(ids))
        # Values carry no rotation, so moving the text must not change them. Where it does, the
        # model does more with positions, and negative ones may make nonsense of it.
        here, there = (read["decoder"][-1][1].float() for read in (layers, before_zero))
        if bool((here - there).norm() <= 0.1 * here.norm()):
            layers = before_zero
    return Prefix.from_layers(Steering.of(model).geometry, **layers)


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether positions are rotations of queries and keys."""
    return any("RotaryEmbedding" in type(module).__name__ for module in model.modules())


def keys_and_values(
    model: PreTrainedModel, ids: Sequence[int], first: int
) -> dict[str, list[LayerSlots]]:
    """For each site, keys and values of its layers; the first token is at position `first`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    inputs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    elif first:
        inputs["position_ids"] = torch.arange(first, first + len(ids), device=model.device)[None]
    steering = Steering.of(model)
    layers: dict[str, list[LayerSlots]] = {}
    with torch.no_grad(), steering.recorded() as calls:
        model(**inputs, use_cache=False)
        for call in calls:  # in the order of the layers
            place = steering.place_of(call)
            if place is not None:
                layers.setdefault(place.site, []).append((call.key[0], call.value[0]))
    return layers
