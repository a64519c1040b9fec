"""Which slots attention uses, head by head, and a prefix of only those."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.model.attention import Place
from controlprefix.model.log_probs import token_log_probs
from controlprefix.model.steering import Steering
from controlprefix.prefixes.assembly import Part
from controlprefix.prefixes.geometry import Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.training.objectives import TrainingRow

# For each site and layer, the share of attention that each slot receives, `(num_kv_heads,
# num_slots)`, float32: the mean over the heads that read a kv head, and over queries.
Masses = Mapping[Site, Sequence[Tensor]]


def slot_masses(
    model: PreTrainedModel, rows: Sequence[TrainingRow], prefix: Prefix, *, pad_id: int
) -> Masses:
    """How much the rows' tokens attend to each slot.

    Args:
        model: Frozen.
        rows: Texts, with their other parts in `frozen`; at least one.
        prefix: Whose slots.
        pad_id: Any id.
    """
    steering = Steering.of(model)
    geometry = prefix.geometry
    totals = {
        site: [
            torch.zeros(layer.num_kv_heads, len(prefix.slots[site]))
            for layer in geometry.layers(site)
        ]
        for site in geometry.sites
    }

    def add(place: Place, weights: Tensor) -> None:
        total = totals[place.site][place.layer]
        # One row, whose first part the prefix is.
        heads = weights[0, :, :, : total.shape[1]].float().mean(dim=0).cpu()
        total += heads.unflatten(0, (len(total), -1)).mean(dim=1) / len(rows)

    for row in rows:
        batch = steering.assemble([[Part(prefix), *row.frozen]])
        with torch.no_grad(), steering.attached(batch), steering.watched(add):
            token_log_probs(model, [row.prompt], [row.targets], pad_id=pad_id)
    return totals


def mean_masses(masses: Masses) -> Tensor:
    """Of each slot, over all layers and heads, `(num_slots,)`; of the site that has most."""
    layers = max(masses.values(), key=lambda layers: layers[0].shape[1])
    return torch.cat(list(layers)).mean(dim=0)


def most_attended(prefix: Prefix, masses: Masses, count: int) -> Prefix:
    """In each kv head the keys and values of so many slots, those with the largest mass.

    Heads look at different things, and each has rows of its own in a slot, so each keeps what
    it uses (as SnapKV does for caches, https://arxiv.org/abs/2404.14469).
    """
    layers = {
        site: [
            _kept(prefix, site, i, mass.topk(min(count, mass.shape[1])).indices.sort().values)
            for i, mass in enumerate(masses[site])
        ]
        for site in prefix.geometry.sites
    }
    return Prefix.from_layers(prefix.geometry, **layers)


def _kept(prefix: Prefix, site: Site, layer: int, which: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = prefix.layer(site, layer)
    which = which.to(keys.device)[:, :, None]
    return keys.take_along_dim(which, dim=1), values.take_along_dim(which, dim=1)
