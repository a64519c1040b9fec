"""Losses of whole texts with and without a prefix."""

from collections.abc import Sequence

import torch

from controlprefix.model import FrozenModel
from controlprefix.prefixes import Part, Prefix
from controlprefix.training.objectives import ContrastPair, Objective, TrainingRow
from controlprefix.training.run import batches_by_length

_BATCH_SIZE = 16
_MAX_TOKENS = 256


def first_tokens(frozen: FrozenModel, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read in front of a text, and its first 256 tokens."""
    example = next(frozen.request_tokenizer.chunks(text, _MAX_TOKENS))
    return example.prompt, example.completion


def losses_of_texts(
    frozen: FrozenModel, texts: Sequence[str], prefix: Prefix | None
) -> list[tuple[float, int]]:
    """Loss in nats, and tokens, of the first 256 tokens of each text.

    Args:
        frozen: The model.
        texts: Texts that are not empty.
        prefix: Attached to all of them; or None.
    """
    objective = Objective(frozen)
    parts = () if prefix is None else (Part(prefix),)
    rows = [TrainingRow(*first_tokens(frozen, text), parts, ()) for text in texts]
    losses: dict[int, float] = {}
    for batch_rows in batches_by_length(frozen, rows, _BATCH_SIZE):
        pairs = [ContrastPair(row) for row in batch_rows]
        batch = objective.assemble(pairs, {})
        with torch.no_grad(), frozen.attached(batch):
            values = objective(pairs).tolist()
        for row, value in zip(batch_rows, values, strict=True):
            losses[id(row)] = value
    return [(losses[id(row)], len(row.targets)) for row in rows]
