"""Losses of whole texts with and without a prefix."""

from collections.abc import Sequence

from controlprefix.model import FrozenModel
from controlprefix.prefixes import Part, Prefix
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.row_losses import row_losses

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
    parts = () if prefix is None else (Part(prefix),)
    rows = [TrainingRow(*first_tokens(frozen, text), parts, ()) for text in texts]
    losses = row_losses(frozen, rows)
    return [(loss, len(row.targets)) for loss, row in zip(losses, rows, strict=True)]
