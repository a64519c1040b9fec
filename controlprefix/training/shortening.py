"""Fewer slots at the same quality: which ones attention uses, and how many are needed."""

from collections.abc import Callable
from dataclasses import dataclass

from controlprefix.errors import TrainingDataError
from controlprefix.prefixes.prefix import Prefix
from controlprefix.training.selection import Masses, mean_masses, most_attended


@dataclass(frozen=True, slots=True)
class ShorteningReport:
    """How quality depends on the number of slots.

    Attributes:
        masses: For each slot of the whole prefix, the share of attention it received: the
            mean over layers, heads and queries.
        curve: `(slots, nats a target token)`, from none to all of them; each head keeps
            those with the largest mass in it.
        num_slots: Chosen: the fewest that keep the wanted share of what the prefix gains.
        version: Of the shorter prefix in the store; None where none was stored.
    """

    masses: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    num_slots: int
    version: int | None = None


def shorten(
    prefix: Prefix,
    masses: Masses,
    nats_with: Callable[[Prefix | None], float],
    *,
    keep: float,
) -> tuple[Prefix, ShorteningReport]:
    """The fewest slots that keep a share of what the prefix gains over none.

    Args:
        prefix: Whole.
        masses: Of its slots; each head keeps those with the largest.
        nats_with: The loss with a prefix, or without any.
        keep: Share of the gain, above 0, up to 1.

    Raises:
        TrainingDataError: If the prefix gains nothing.
    """
    if not 0 < keep <= 1:
        raise TrainingDataError(f"keep is {keep}; it must be above 0 and up to 1")
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
        tried[count] = most_attended(prefix, masses, count)
        curve[count] = nats_with(tried[count])
    # The curve is not quite monotonic: the fewest from which on all are good enough.
    num_slots = prefix.num_slots
    for count in sorted(tried, reverse=True):
        if curve[count] > enough:
            break
        num_slots = count
    report = ShorteningReport(
        masses=tuple(mean_masses(masses).tolist()),
        curve=tuple(sorted(curve.items())),
        num_slots=num_slots,
    )
    return tried[num_slots], report


def _counts(most: int) -> list[int]:
    """Below the most, each about three quarters of the next."""
    counts = []
    while most > 1:
        most = min(most - 1, round(most * 0.75))
        counts.append(most)
    return counts
