"""How much attention each slot receives, and prefixes of the most attended slots."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from controlprefix.model import FrozenModel
from controlprefix.model.attention import SteeredLayer
from controlprefix.model.log_probs import token_log_probs
from controlprefix.prefixes import Part, Prefix, Site
from controlprefix.training.objectives import TrainingRow

# Per site and layer, the share of attention that each slot receives, `(num_kv_heads,
# num_slots)`, float32: the mean over the heads of a kv head, and over queries.
SlotMasses = Mapping[Site, Sequence[Tensor]]


def slot_masses(frozen: FrozenModel, rows: Sequence[TrainingRow], prefix: Prefix) -> SlotMasses:
    """Measure how much the tokens of some rows attend to each slot of a prefix.

    Args:
        frozen: The model.
        rows: At least one, with their other parts in `frozen`.
        prefix: The prefix.
    """
    geometry = prefix.geometry
    totals = {
        site: [
            torch.zeros(layer.num_kv_heads, len(prefix.slots[site]), device="cpu")
            for layer in geometry.layers(site)
        ]
        for site in geometry.sites
    }

    def add(layer: SteeredLayer, weights: Tensor) -> None:
        total = totals[layer.site][layer.index]
        # There is one row, whose first part is the prefix.
        per_head = weights[0, :, :, : total.shape[1]].float().mean(dim=0).cpu()
        total += per_head.unflatten(0, (len(total), -1)).mean(dim=1) / len(rows)

    for row in rows:
        batch = frozen.assemble([[Part(prefix), *row.frozen]])
        with torch.no_grad(), frozen.attached(batch), frozen.steering.watched(add):
            token_log_probs(frozen, [row.prompt], [row.targets])
    return totals


def mean_masses(masses: SlotMasses) -> Tensor:
    """The mean over layers and heads, `(num_slots,)`, at the site with the most slots."""
    layers = max(masses.values(), key=lambda layers: layers[0].shape[1])
    return torch.cat(list(layers)).mean(dim=0)


def most_attended(prefix: Prefix, masses: SlotMasses, num_slots: int) -> Prefix:
    """A shorter prefix: in each kv head, the keys and values of the most attended slots.

    Each kv head has rows of its own in a slot, and heads attend to different slots, so each
    head keeps its own choice.

    Reference:
        Li et al., "SnapKV", 2024, https://arxiv.org/abs/2404.14469, for KV caches.
    """
    layers = {
        site: [
            _select(prefix, site, i, mass.topk(min(num_slots, mass.shape[1])).indices.sort().values)
            for i, mass in enumerate(masses[site])
        ]
        for site in prefix.geometry.sites
    }
    return Prefix.from_layers(prefix.geometry, **layers)


def _select(prefix: Prefix, site: Site, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = prefix.layer(site, layer)
    slots = slots.to(keys.device)[:, :, None]
    return keys.take_along_dim(slots, dim=1), values.take_along_dim(slots, dim=1)
