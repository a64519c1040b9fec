"""The reference of preferences: how much likelier it finds the chosen completions."""

from collections.abc import Mapping, Sequence

import torch

from controlprefix.cancellation import raise_if_stopped
from controlprefix.model import FrozenModel
from controlprefix.model.log_probs import token_log_probs
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.training.objectives import TrainingRow

_BATCH_SIZE = 16


def with_margins(
    frozen: FrozenModel, rows: Sequence[TrainingRow], prefixes: Mapping[PrefixKey, Prefix]
) -> list[TrainingRow]:
    """Rows with their reference margins.

    Args:
        frozen: The model.
        rows: Each with a rejected completion.
        prefixes: What the reference has of the trained prefixes, all or none.
    """
    completed = list(rows)
    lengths = [row.num_tokens for row in rows]
    for batch in frozen.batches(lengths, _BATCH_SIZE):
        raise_if_stopped()
        own = [rows[i] for i in batch]
        parts = [row.parts(prefixes) if prefixes else row.frozen_parts for row in own]
        prompts = [row.prompt for row in own]
        sums = []
        with torch.no_grad(), frozen.attached(frozen.assemble(parts)):
            for targets in (
                [row.targets for row in own],
                [row.rejected.targets if row.rejected else () for row in own],
            ):
                log_probs = token_log_probs(frozen, prompts, targets)[0].cpu()
                sums.append(log_probs.double().sum(1).tolist())
        for i, row, chosen, rejected in zip(batch, own, *sums, strict=True):
            assert row.rejected is not None
            completed[i] = row._replace(
                rejected=row.rejected._replace(reference_margin=chosen - rejected)
            )
    return completed
