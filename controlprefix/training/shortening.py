"""Fewer slots at the same quality: which ones attention uses, and how many are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.assembly import Part
from controlprefix.errors import TrainingDataError
from controlprefix.likelihood import token_log_probs
from controlprefix.prefix import Prefix
from controlprefix.steering import Steering
from controlprefix.training.objectives import TrainingRow


@dataclass(frozen=True, slots=True)
class ShorteningReport:
    """How quality depends on the number of slots.

    Attributes:
        masses: For each slot of the whole prefix, the share of attention it received: the
            mean over layers, heads and queries.
        curve: `(slots, nats a target token)`, from none to all of them, the ones with the
            largest mass kept.
        num_slots: Chosen: the fewest that keep the wanted share of what the prefix gains.
        version: Of the shorter prefix in the store; None where none was stored.
    """

    masses: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    num_slots: int
    version: int | None = None


def slot_masses(
    model: PreTrainedModel, rows: Sequence[TrainingRow], prefix: Prefix, *, pad_id: int
) -> Tensor:
    """The mean share of attention that each slot receives, `(num_slots,)`, float32.

    Args:
        model: Frozen.
        rows: Texts, with their other parts in `frozen`.
        prefix: Whose slots.
        pad_id: Any id.
    """
    steering = Steering.of(model)
    total, count = torch.zeros(prefix.num_slots), 0

    def add(weights: Tensor) -> None:
        nonlocal count
        # One row, whose first part the prefix is.
        mine = weights[0, :, :, : prefix.num_slots].float().mean(dim=(0, 1)).cpu()
        total[: len(mine)] += mine
        count += 1

    for row in rows:
        batch = steering.assemble([[Part(prefix), *row.frozen]])
        with torch.no_grad(), steering.attached(batch), steering.watched(add):
            token_log_probs(model, [row.prompt], [row.targets], pad_id=pad_id)
    return total / max(1, count)


def shorten(
    prefix: Prefix,
    masses: Tensor,
    nats_with: Callable[[Prefix | None], float],
    *,
    keep: float,
) -> tuple[Prefix, ShorteningReport]:
    """The fewest slots that keep a share of what the prefix gains over none.

    Args:
        prefix: Whole.
        masses: Of its slots; the largest are kept.
        nats_with: The loss with a prefix, or without any.
        keep: Share of the gain, above 0, up to 1.

    Raises:
        TrainingDataError: If the prefix gains nothing.
    """
    if not 0 < keep <= 1:
        raise TrainingDataError(f"keep is {keep}; it must be above 0 and up to 1")
    order = masses.argsort(descending=True)
    bare, whole = nats_with(None), nats_with(prefix)
    if whole >= bare:
        raise TrainingDataError(
            f"the prefix gains nothing on these examples: {whole:.3f} nats a token with it, "
            f"{bare:.3f} without; give examples of what it is for"
        )
    curve = {0: bare, prefix.num_slots: whole}
    enough = bare - keep * (bare - whole)
    tried = {prefix.num_slots: prefix}
    for count in _counts(prefix.num_slots):
        tried[count] = _chosen(prefix, order[:count])
        curve[count] = nats_with(tried[count])
    # The curve is not quite monotonic: the fewest from which on all are good enough.
    num_slots = prefix.num_slots
    for count in sorted(tried, reverse=True):
        if curve[count] > enough:
            break
        num_slots = count
    report = ShorteningReport(
        masses=tuple(masses.tolist()), curve=tuple(sorted(curve.items())), num_slots=num_slots
    )
    return tried[num_slots], report


def _counts(most: int) -> list[int]:
    """Below the most, each about three quarters of the next."""
    counts = []
    while most > 1:
        most = min(most - 1, round(most * 0.75))
        counts.append(most)
    return counts


def _chosen(prefix: Prefix, which: Tensor) -> Prefix:
    kept = which.sort().values
    return Prefix(
        prefix.geometry,
        {site: rows[kept[kept < len(rows)].to(rows.device)] for site, rows in prefix.slots.items()},
    )
