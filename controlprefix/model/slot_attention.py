"""How the tokens of query texts attend to the slots of a prefix."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from controlprefix.cancellation import raise_if_stopped
from controlprefix.model.attention import AttentionCall, SteeredLayer, recording, watching
from controlprefix.model.frozen import FrozenModel
from controlprefix.model.log_probs import token_log_probs
from controlprefix.prefixes import LayerSlots, Part, Prefix, Site


class QueryText(NamedTuple):
    """A text whose tokens attend to a prefix.

    Attributes:
        prompt, targets: Its token ids; at least one each.
        others: Parts that are attached beside the prefix.
        hidden: Slots that it does not attend to, such as those made of this very text.
    """

    prompt: Sequence[int]
    targets: Sequence[int]
    others: Sequence[Part] = ()
    hidden: range = range(0)


class LayerAttention(NamedTuple):
    """The attention of one layer to the slots of a prefix, on the CPU.

    Attributes:
        queries: Queries of all heads of a kv head, `(num_kv_heads, num_queries, key_dim)`,
            float64; their products with keys are attention logits.
        weights: Attention weights on the slots, `(num_kv_heads, num_queries, num_slots)`, float32;
            the rest of each sum of 1 is on tokens and other parts.
    """

    queries: Tensor
    weights: Tensor


SlotAttention = Mapping[Site, Sequence[LayerAttention]]


def observe(
    frozen: FrozenModel,
    prefix: Prefix,
    query_texts: Sequence[QueryText],
    *,
    max_queries: int | None = None,
) -> SlotAttention:
    """Record how query texts attend to a prefix.

    Args:
        frozen: The model.
        prefix: The prefix, on the model's device.
        query_texts: At least one.
        max_queries: Tokens per query text whose attention is kept, evenly spaced; None for all.

    Raises:
        TrainingInterrupted: Inside `stoppable`, if it is to stop.
    """
    geometry = prefix.geometry
    records: dict[Site, list[list[LayerAttention]]] = {
        site: [[] for _ in geometry.layers(site)] for site in geometry.sites
    }
    for query_text in query_texts:
        raise_if_stopped()
        visible = {
            site: [i for i in range(len(rows)) if i not in query_text.hidden]
            for site, rows in prefix.slots.items()
        }
        part = Part(Prefix(geometry, {site: prefix.slots[site][visible[site]] for site in visible}))
        batch = frozen.assemble([[part, *query_text.others]])
        with recording() as calls:
            record = partial(_record, records, prefix, visible, calls, max_queries)
            with torch.no_grad(), frozen.attached(batch), watching(record):
                token_log_probs(frozen, [query_text.prompt], [query_text.targets])
    return {site: [_joined(layer) for layer in layers] for site, layers in records.items()}


def _joined(records: list[LayerAttention]) -> LayerAttention:
    """A layer's attention to all query texts; the list is emptied, to keep it once in memory."""
    queries = torch.cat([record.queries for record in records], dim=1)
    weights = torch.cat([record.weights for record in records], dim=1)
    records.clear()
    return LayerAttention(queries, weights)


def _record(
    records: Mapping[Site, Sequence[list[LayerAttention]]],
    prefix: Prefix,
    visible: Mapping[Site, Sequence[int]],
    calls: Sequence[AttentionCall],
    max_queries: int | None,
    layer: SteeredLayer,
    weights: Tensor,
) -> None:
    """Add the attention of a layer's latest call, which has one row, to what is recorded."""
    call, own = calls[-1], list(visible[layer.site])
    num_kv_heads = prefix.geometry.layers(layer.site)[layer.index].num_kv_heads
    tokens = _evenly_spaced(weights.shape[1], max_queries)
    # The row's first part is the prefix.
    on_slots = weights[0, tokens, :, : len(own)].cpu().float()
    whole = on_slots.new_zeros(*on_slots.shape[:2], len(prefix.slots[layer.site]))
    whole[..., own] = on_slots
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    query = call.query[0, :, tokens].cpu().double() * scaling
    records[layer.site][layer.index].append(
        LayerAttention(
            query.unflatten(0, (num_kv_heads, -1)).flatten(1, 2),
            whole.transpose(0, 1).unflatten(0, (num_kv_heads, -1)).flatten(1, 2),
        )
    )


def most_attended(prefix: Prefix, attention: SlotAttention, num_slots: int) -> Prefix:
    """A shorter prefix: in each kv head, the keys and values of the most attended slots.

    Each kv head has rows of its own in a slot, and heads attend to different slots, so each
    head keeps its own choice.

    Reference:
        Li et al., "SnapKV", 2024, https://arxiv.org/abs/2404.14469, for KV caches.
    """
    layers: dict[str, list[LayerSlots]] = {}
    for site in prefix.geometry.sites:
        layers[site] = []
        for i, layer in enumerate(attention[site]):
            mass = layer.weights.mean(dim=1)
            best = mass.topk(min(num_slots, mass.shape[1])).indices.sort().values[..., None]
            keys, values = prefix.layer(site, i)
            best = best.to(keys.device)
            layers[site].append((keys.take_along_dim(best, 1), values.take_along_dim(best, 1)))
    return Prefix.from_layers(prefix.geometry, **layers)


def mean_masses(attention: SlotAttention) -> Tensor:
    """The share of attention that each slot receives, `(num_slots,)`, at the site with the most.

    It is the mean over layers, heads and queries.
    """
    layers = max(attention.values(), key=lambda layers: layers[0].weights.shape[2])
    return torch.cat([layer.weights.mean(dim=1) for layer in layers]).mean(dim=0)


def _evenly_spaced(count: int, maximum: int | None) -> list[int]:
    if maximum is None or count <= maximum:
        return list(range(count))
    return [round((i + 0.5) * count / maximum - 0.5) for i in range(maximum)]
