"""Assembly: the union of each request's parts, padded into one prefix batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from controlprefix.errors import RequestError
from controlprefix.prefixes.geometry import Geometry, Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.schedule import Schedule, multiplier_at


@dataclass(frozen=True, slots=True)
class Part:
    """A prefix and its strength in one request.

    Attributes:
        prefix: The slots.
        strength: Multiplies the unnormalized attention mass of the slots, or the output of a
            decoupled prefix: 0 is exactly absent, 1 exactly as trained.
        schedule: Multiplies the strength per generated token.

    Raises:
        RequestError: If the strength is NaN or infinite, or negative where the prefix is not
            decoupled.
    """

    prefix: Prefix
    strength: float = 1.0
    schedule: Schedule = ()

    def __post_init__(self) -> None:
        is_signed = self.prefix.form == "decoupled"
        if not math.isfinite(self.strength) or (self.strength < 0 and not is_signed):
            raise RequestError(
                f"strength {self.strength} is not a finite number >= 0; 0 leaves the part out, "
                "1 is as trained"
            )


class ScheduledSlots(NamedTuple):
    """Slots `first:last` of one row whose strength has a schedule."""

    row: int
    first: int
    last: int
    part: Part


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """Slots at one site: one row that all rows of the batch share, or one row per request.

    Attributes:
        keys, values: Per layer, `(num_rows, num_kv_heads, num_slots, head_dim)`.
        log_strengths: `(num_rows, num_slots)`, float32, added to the attention logits
            of the slots; padding is -inf.
        unweighted: All log strengths are 0 and stay 0, so there is nothing to add.
        scheduled: Slots whose log strengths change during generation.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    log_strengths: Tensor
    unweighted: bool
    scheduled: tuple[ScheduledSlots, ...] = ()


@dataclass(frozen=True, slots=True)
class DecoupledBlock:
    """At most one decoupled prefix of each row, at one site.

    Attributes:
        keys, values: Per layer, `(num_rows, num_kv_heads, num_slots, head_dim)`; one row if all
            rows have the same prefix. A row without a prefix has zeros.
        is_slot: `(num_rows, num_slots)`, False for padding; None without any.
        strengths: `(num_rows,)`, float32, by which each row's output is multiplied.
        scheduled: Rows, and their parts, whose strength changes during generation.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    is_slot: Tensor | None
    strengths: Tensor
    scheduled: tuple[tuple[int, Part], ...] = ()


@dataclass(frozen=True)
class PrefixBatch:
    """The slots that a batch of requests attends to beside its tokens.

    Attributes:
        num_rows: Requests in the batch.
        blocks: Per site, at most two blocks: the slots that all rows share (kept once),
            then each row's own slots.
        decoupled: Per site, a block for the first decoupled prefix of each row, one for the
            second, and so on.
    """

    num_rows: int
    blocks: Mapping[Site, tuple[SlotBlock, ...]]
    decoupled: Mapping[Site, tuple[DecoupledBlock, ...]] = field(default_factory=dict)

    def set_token(self, tokens: int | Sequence[int]) -> None:
        """Set scheduled strengths to their values at a new token.

        Args:
            tokens: Index of the new token, from 0: one for all rows, or one per row.
        """
        for block in (block for blocks in self.blocks.values() for block in blocks):
            for row, first, last, part in block.scheduled:
                token = tokens if isinstance(tokens, int) else tokens[row]
                strength = part.strength * multiplier_at(part.schedule, token)
                block.log_strengths[row, first:last] = _log(strength)
        for decoupled in (block for blocks in self.decoupled.values() for block in blocks):
            for row, part in decoupled.scheduled:
                token = tokens if isinstance(tokens, int) else tokens[row]
                decoupled.strengths[row] = part.strength * multiplier_at(part.schedule, token)

    @property
    def is_scheduled(self) -> bool:
        """Whether any strength has a schedule."""
        return any(
            block.scheduled
            for sites in (self.blocks, self.decoupled)
            for blocks in sites.values()
            for block in blocks
        )

    @cached_property
    def num_slots(self) -> int:
        """Slots of the longest row in one softmax with its tokens, at the site with the most."""
        return max(
            (sum(b.log_strengths.shape[1] for b in blocks) for blocks in self.blocks.values()),
            default=0,
        )


def assemble(
    requests: Sequence[Sequence[Part]],
    geometry: Geometry,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PrefixBatch:
    """Put the parts of each request together, one row per request.

    Attention reads slots as a set, so parts need no order and assembly is
    union. Parts that every row has at the same strength are kept once and
    shared by all rows. Decoupled parts stay apart, since each has a softmax
    of its own. Gradients flow through.

    Args:
        requests: The parts of each row; a row may have none.
        geometry: Geometry of the model that will attend to the batch.
        device, dtype: Device and dtype of the result; left out, those of the prefixes.

    Returns:
        Per site up to two blocks: slots that all rows share, with `num_rows` 1, and each row's
        own, padded to the longest row. A block has per layer keys of shape
        `(num_rows, num_kv_heads, num_slots, key_dim)` and values of shape
        `(num_rows, num_kv_heads, num_slots, value_dim)` in `dtype`, and log strengths of shape
        `(num_rows, num_slots)`, float32; padding is -inf.

    Raises:
        GeometryMismatchError: If a part was made for another base model.

    Reference:
        Clive et al., "Control Prefixes for Parameter-Efficient Text
        Generation", 2021, https://arxiv.org/abs/2110.08329. Their control
        prefix is our attribute prefix; they concatenate in a fixed order.

    Example:
        >>> geometry = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4)
        >>> formal = Prefix.random(geometry, num_slots=5)
        >>> assemble([[Part(formal)], []], geometry).num_slots
        5
    """
    for prefix in {id(part.prefix): part.prefix for row in requests for part in row}.values():
        geometry.require(prefix.geometry, "prefix")
    merged = [_merged(request) for request in requests]
    rows = [[part for part in row if part.prefix.form == "joint"] for row in merged]
    alone = [[part for part in row if part.prefix.form == "decoupled"] for row in merged]
    shared = [part for part in rows[0] if all(_holds(row, part) for row in rows)] if rows else []
    own = [[part for part in row if not _holds(shared, part)] for row in rows]
    blocks = {}
    for site in geometry.sites:
        pair = (
            _block([shared], site, geometry, device, dtype),
            _block(own, site, geometry, device, dtype),
        )
        if present := tuple(block for block in pair if block is not None):
            blocks[site] = present
    decoupled = {}
    for site in geometry.sites:
        with_slots = [[part for part in row if len(part.prefix.slots[site])] for row in alone]
        if count := max(map(len, with_slots), default=0):
            decoupled[site] = tuple(
                _decoupled(
                    [row[i] if i < len(row) else None for row in with_slots], site, device, dtype
                )
                for i in range(count)
            )
    return PrefixBatch(num_rows=len(rows), blocks=blocks, decoupled=decoupled)


def _merged(request: Sequence[Part]) -> list[Part]:
    """The parts of another strength than 0, each prefix once: strengths of copies add up."""
    merged: dict[tuple[int, Schedule], Part] = {}
    for part in request:
        if part.strength:
            same = id(part.prefix), part.schedule
            earlier = merged.get(same)
            strength = part.strength + (earlier.strength if earlier else 0.0)
            merged[same] = Part(part.prefix, strength, part.schedule)
    return [part for part in merged.values() if part.strength]


def _holds(row: Sequence[Part], part: Part) -> bool:
    """Whether a row has the same prefix at the same strength, without a schedule."""
    same = (p for p in row if p.prefix is part.prefix and not part.schedule and not p.schedule)
    return any(p.strength == part.strength for p in same)


def _log(strength: float) -> float:
    return math.log(strength) if strength > 0 else -math.inf


def _block(
    rows: Sequence[Sequence[Part]],
    site: Site,
    geometry: Geometry,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SlotBlock | None:
    """The slots of some rows at one site, padded; None if no row has any."""
    parts = [[part for part in row if len(part.prefix.slots[site])] for row in rows]
    if not any(parts):
        return None
    first = next(part for row in parts for part in row).prefix.slots[site]
    device, dtype = device or first.device, dtype or first.dtype
    lengths = [sum(len(part.prefix.slots[site]) for part in row) for row in parts]
    longest = max(lengths)
    padding = first.new_zeros(longest - min(lengths), first.shape[1], device=device, dtype=dtype)
    stacked: list[Tensor] = []
    log_strengths: list[list[float]] = []
    scheduled: list[ScheduledSlots] = []
    for i, (row, length) in enumerate(zip(parts, lengths, strict=True)):
        logs: list[float] = []
        for part in row:
            slots = part.prefix.slots[site]
            stacked.append(slots.to(device, dtype))
            if part.schedule:
                scheduled.append(ScheduledSlots(i, len(logs), len(logs) + len(slots), part))
            logs += [_log(part.strength * multiplier_at(part.schedule, 0))] * len(slots)
        stacked.append(padding[: longest - length])
        log_strengths.append(logs + [-math.inf] * (longest - length))
    # Two copies in total: rows beside each other, then per layer.
    keys, values = _by_layer(torch.cat(stacked).view(len(parts), longest, -1), geometry, site)
    return SlotBlock(
        keys=keys,
        values=values,
        log_strengths=torch.tensor(log_strengths, device=device),
        unweighted=not scheduled and not any(map(any, log_strengths)),
        scheduled=tuple(scheduled),
    )


def _decoupled(
    parts: Sequence[Part | None],
    site: Site,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> DecoupledBlock:
    """One decoupled part per row at one site, padded; at least one row has one."""
    present = [part for part in parts if part is not None]
    prefixes = {id(part.prefix): part.prefix for part in present}
    first = present[0].prefix.slots[site]
    device, dtype = device or first.device, dtype or first.dtype
    longest = max(len(prefix.slots[site]) for prefix in prefixes.values())
    rows = present[:1] if len(prefixes) == 1 else parts
    empty = first.new_zeros(longest, first.shape[1], device=device, dtype=dtype)
    stacked, lengths = [], []
    for part in rows:
        slots = empty if part is None else part.prefix.slots[site].to(device, dtype)
        lengths.append(len(slots))
        stacked += [slots, empty[len(slots) :]]
    keys, values = _by_layer(
        torch.cat(stacked).view(len(rows), longest, -1), present[0].prefix.geometry, site
    )
    is_slot = None
    if min(lengths) < longest:
        counts = torch.tensor(lengths, device=device)
        is_slot = torch.arange(longest, device=device) < counts[:, None]
    strengths = [p.strength * multiplier_at(p.schedule, 0) if p else 0.0 for p in parts]
    return DecoupledBlock(
        keys,
        values,
        is_slot,
        torch.tensor(strengths, device=device),
        tuple((i, part) for i, part in enumerate(parts) if part and part.schedule),
    )


def _by_layer(
    slots: Tensor, geometry: Geometry, site: Site
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`(num_rows, num_slots, slot_size)` as the keys and the values of `SlotBlock`."""
    heads = [shape.num_kv_heads for shape in geometry.layers(site) for _ in range(2)]
    layered = [
        tensor.unflatten(2, (num_heads, -1)).transpose(1, 2).contiguous()
        for tensor, num_heads in zip(
            slots.split(geometry.split_sizes(site), dim=2), heads, strict=True
        )
    ]
    return tuple(layered[0::2]), tuple(layered[1::2])
