"""A text's own keys and values as a prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.prefix import LayerSlots, Prefix
from controlprefix.steering import Steering


def prefix_from_tokens(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """What attention would read of tokens that stand just before position 0.

    On a rotary model, attending to it equals prompting with the tokens: rotary
    attention knows distances only. Other models read the tokens from position 0, and
    an encoder-decoder reads them on both sides.

    Args:
        model: Frozen.
        ids: Token ids, at least one; one slot each.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    inputs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    elif any("RotaryEmbedding" in type(module).__name__ for module in model.modules()):
        inputs["position_ids"] = torch.arange(-len(ids), 0, device=model.device)[None]
    steering = Steering.of(model)
    layers: dict[str, list[LayerSlots]] = {}
    with torch.no_grad(), steering.recorded() as calls:
        model(**inputs, use_cache=False)
        for call in calls:  # in the order of the layers
            place = steering.place_of(call)
            if place is not None:
                layers.setdefault(place.site, []).append((call.key[0], call.value[0]))
    return Prefix.from_layers(steering.geometry, **layers)
