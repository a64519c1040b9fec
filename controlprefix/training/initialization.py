"""What a prefix starts from: a text's keys and values, and how large they are."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.geometry import Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.selection import most_attended, slot_masses

_SCALE_TOKENS = 64
_READ_TOKENS = 256  # of a text to start from; 512 were no better


def start_of_text(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    text: str,
    rows: Sequence[TrainingRow],
    num_slots: int,
) -> Prefix:
    """A text's keys and values; where it is longer, in each head those that rows attend to most.

    Args:
        model: Frozen.
        encoder: Of that model.
        text: Not empty.
        rows: What is like what the prefix is for, best not in the text's beginning: a row attends
            to its own copy above all. Without any, the text's first tokens will do.
        num_slots: Of the prefix; a text of fewer tokens is read over and over.
    """
    room = min(_READ_TOKENS, encoder.context or _READ_TOKENS)
    ids = encoder.text_ids(text)[: max(room, num_slots)]
    if len(ids) <= num_slots or not rows:
        return prefix_from_tokens(model, ids, num_slots=num_slots)
    whole = prefix_from_tokens(model, ids)
    masses = slot_masses(model, rows, whole, pad_id=encoder.pad_id)
    return most_attended(whole, masses, num_slots)


def typical_scale(model: PreTrainedModel, ids: Sequence[int]) -> dict[Site, Tensor]:
    """The `typical_size` of the model's own keys and values of such tokens."""
    return typical_size(prefix_from_tokens(model, ids[:_SCALE_TOKENS]))


def typical_size(prefix: Prefix) -> dict[Site, Tensor]:
    """For each site `(slot_size,)`: the root mean square of each head's keys, and of its values."""
    sizes = {}
    for site, rows in prefix.slots.items():
        heads = prefix.geometry.head_sizes(site)
        squares = rows.float().square().mean(dim=0)
        least = 1e-2 * squares.mean().sqrt()  # a head that is silent here may yet be moved
        sizes[site] = torch.cat(
            [one.mean().sqrt().clamp(min=least).expand(len(one)) for one in squares.split(heads)]
        )
    return sizes
