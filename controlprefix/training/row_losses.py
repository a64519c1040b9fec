"""Losses of rows under their prefixes, without training."""

from collections.abc import Mapping, Sequence

import torch

from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.training.objectives import ContrastPair, Objective, TrainingRow
from controlprefix.training.run import batches_by_length

_BATCH_SIZE = 16


def row_losses(
    frozen: FrozenModel,
    rows: Sequence[TrainingRow],
    prefixes: Mapping[PrefixKey, Prefix] | None = None,
) -> list[float]:
    """The loss of each row, in nats, the sum over its target tokens.

    Args:
        frozen: The model.
        rows: With their frozen parts.
        prefixes: Prefixes of the rows' learned parts; parts that it lacks are left out.
    """
    objective, prefixes = Objective(frozen), prefixes or {}
    losses: dict[int, float] = {}
    for batch_rows in batches_by_length(frozen, rows, _BATCH_SIZE):
        pairs = [
            ContrastPair(row._replace(learned=[own for own in row.learned if own[0] in prefixes]))
            for row in batch_rows
        ]
        batch = objective.assemble(pairs, prefixes)
        with torch.no_grad(), frozen.attached(batch):
            values = objective(pairs).tolist()
        losses.update(zip(map(id, batch_rows), values, strict=True))
    return [losses[id(row)] for row in rows]
