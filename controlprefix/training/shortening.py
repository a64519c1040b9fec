"""Shortening: the fewest slots that keep most of what a prefix gains."""

from collections.abc import Callable
from dataclasses import dataclass

from controlprefix.errors import TrainingDataError
from controlprefix.model.attention_matching import matched
from controlprefix.model.slot_attention import SlotAttention, mean_masses
from controlprefix.prefixes import Prefix


@dataclass(frozen=True, slots=True)
class ShorteningReport:
    """How the loss depends on the number of slots.

    Attributes:
        masses: Per slot of the whole prefix, the share of attention it receives: the mean
            over layers, heads and queries.
        curve: `(num_slots, nats per target token)`, from none to all slots.
        num_slots: The chosen number: the fewest that keep the required share of the gain.
        version: Version of the shorter prefix in the store; None before it is stored.
    """

    masses: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    num_slots: int
    version: int | None = None


def shorten(
    prefix: Prefix,
    attention: SlotAttention,
    loss_with: Callable[[Prefix | None], float],
    *,
    keep: float,
) -> tuple[Prefix, ShorteningReport]:
    """Find the fewest slots that keep a share of what a prefix gains over none.

    Args:
        prefix: The whole prefix.
        attention: How examples attend to it.
        loss_with: The loss with a prefix, or without any.
        keep: Share of the gain to keep, above 0 and up to 1.

    Raises:
        TrainingDataError: If `keep` is out of range, or the prefix gains nothing.
    """
    if not 0 < keep <= 1:
        raise TrainingDataError(f"keep is {keep}; it must be above 0 and up to 1")
    loss_without, loss_whole = loss_with(None), loss_with(prefix)
    if loss_whole >= loss_without:
        raise TrainingDataError(
            f"the prefix gains nothing on these examples: {loss_whole:.3f} nats per token with "
            f"it, {loss_without:.3f} without; give examples of what it is for"
        )
    curve = {0: loss_without, prefix.num_slots: loss_whole}
    max_loss = loss_without - keep * (loss_without - loss_whole)
    candidates = {prefix.num_slots: prefix}
    for count in _candidate_counts(prefix.num_slots):
        candidates[count] = matched(prefix, attention, count)
        curve[count] = loss_with(candidates[count])
    # The curve is not quite monotonic: take the fewest from which on all are good enough.
    num_slots = prefix.num_slots
    for count in sorted(candidates, reverse=True):
        if curve[count] > max_loss:
            break
        num_slots = count
    report = ShorteningReport(
        masses=tuple(mean_masses(attention).tolist()),
        curve=tuple(sorted(curve.items())),
        num_slots=num_slots,
    )
    return candidates[num_slots], report


def _candidate_counts(num_slots: int) -> list[int]:
    """Counts below `num_slots`, each about three quarters of the one before."""
    counts = []
    while num_slots > 1:
        num_slots = min(num_slots - 1, round(num_slots * 0.75))
        counts.append(num_slots)
    return counts
