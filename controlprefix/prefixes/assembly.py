"""Parts -> one prefix batch: padding, log strengths, shared parts kept once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from controlprefix.errors import RequestError
from controlprefix.prefixes.geometry import Geometry, Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.schedule import Course, at


@dataclass(frozen=True, slots=True)
class Part:
    """A prefix and its strength in one request.

    Strength `w` multiplies the unnormalized attention mass of the slots: 0 is
    exactly absent, 1 exactly as trained. A course multiplies it token by token.

    Raises:
        RequestError: If the strength is negative, NaN or infinite.
    """

    prefix: Prefix
    strength: float = 1.0
    course: Course = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise RequestError(
                f"strength {self.strength} is not a finite number >= 0; 0 leaves the part out, "
                "1 is as trained"
            )


class Scheduled(NamedTuple):
    """Slots of one row, from `first` to before `last`, whose strength has a course."""

    row: int
    first: int
    last: int
    part: Part


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """Slots that one site attends to, for one row (shared by all) or one for each row.

    Attributes:
        keys, values: For each layer, `(rows, num_kv_heads, num_slots, head_dim)`.
        log_strengths: `(rows, num_slots)`, float32, added to the attention logits
            of the slots; padding is -inf.
        even: All log strengths are 0 and stay so, so nothing need be added.
        scheduled: Slots whose log strengths change along a generation.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    log_strengths: Tensor
    even: bool
    scheduled: tuple[Scheduled, ...] = ()


@dataclass(frozen=True)
class PrefixBatch:
    """What a batch of requests attends to beside its tokens.

    Attributes:
        num_rows: Requests in the batch.
        blocks: For each site, at most two: the slots that all rows share (one
            row, kept once), then those of each row alone.
    """

    num_rows: int
    blocks: Mapping[Site, tuple[SlotBlock, ...]]

    def move_to(self, tokens: int | Sequence[int]) -> None:
        """Set strengths that have a course to what they are for a new token, counted from 0.

        Args:
            tokens: Of all rows, or of each.
        """
        for block in (block for blocks in self.blocks.values() for block in blocks):
            for row, first, last, part in block.scheduled:
                token = tokens if isinstance(tokens, int) else tokens[row]
                block.log_strengths[row, first:last] = _log(part.strength * at(part.course, token))

    @property
    def is_scheduled(self) -> bool:
        """Whether any strength has a course."""
        return any(block.scheduled for blocks in self.blocks.values() for block in blocks)

    @cached_property
    def num_slots(self) -> int:
        """Slots of the longest row, at the site that has most."""
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
    """Put the parts of each request together, one row a request.

    Attention reads slots as a set, so parts need no order and assembly is
    union. Parts that every row has at the same strength are kept once and
    shared by all rows. Gradients flow through.

    Args:
        requests: For each row, its parts; a row may have none.
        geometry: Of the model that will attend to the batch.
        device, dtype: Of the model; left out, those of the prefixes.

    Returns:
        For each site and layer, keys and values of shape
        `(rows, num_kv_heads, num_slots, head_dim)`, padded to the longest row,
        and log strengths of shape `(rows, num_slots)`; padding is -inf.

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
    rows = [_merged(request) for request in requests]
    shared = [part for part in rows[0] if all(_holds(row, part) for row in rows)] if rows else []
    own = [[part for part in row if not _holds(shared, part)] for row in rows]
    blocks = {}
    for site in geometry.sites:
        pair = (
            _block([shared], site, geometry, device, dtype),
            _block(own, site, geometry, device, dtype),
        )
        if found := tuple(block for block in pair if block is not None):
            blocks[site] = found
    return PrefixBatch(num_rows=len(rows), blocks=blocks)


def _merged(request: Sequence[Part]) -> list[Part]:
    """The live parts, each prefix once: the mass of two copies is the sum of their strengths."""
    merged: dict[tuple[int, Course], Part] = {}
    for part in request:
        if part.strength > 0:
            same = id(part.prefix), part.course
            earlier = merged.get(same)
            strength = part.strength + (earlier.strength if earlier else 0.0)
            merged[same] = Part(part.prefix, strength, part.course)
    return list(merged.values())


def _holds(row: Sequence[Part], part: Part) -> bool:
    """Whether a row has the same part, for good."""
    same = (p for p in row if p.prefix is part.prefix and not part.course and not p.course)
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
    """The slots of some rows at one site, padded; None where no row has any."""
    parts = [[part for part in row if len(part.prefix.slots[site])] for row in rows]
    if not any(parts):
        return None
    first = next(part for row in parts for part in row).prefix.slots[site]
    device, dtype = device or first.device, dtype or first.dtype
    lengths = [sum(len(part.prefix.slots[site]) for part in row) for row in parts]
    longest = max(lengths)
    padding = first.new_zeros(longest - min(lengths), first.shape[1], device=device, dtype=dtype)
    pieces: list[Tensor] = []
    log_strengths: list[list[float]] = []
    scheduled: list[Scheduled] = []
    for i, (row, length) in enumerate(zip(parts, lengths, strict=True)):
        logs: list[float] = []
        for part in row:
            slots = part.prefix.slots[site]
            pieces.append(slots.to(device, dtype))
            if part.course:
                scheduled.append(Scheduled(i, len(logs), len(logs) + len(slots), part))
            logs += [_log(part.strength * at(part.course, 0))] * len(slots)
        pieces.append(padding[: longest - length])
        log_strengths.append(logs + [-math.inf] * (longest - length))
    # Two copies in all: rows beside each other, then layer by layer.
    slots = torch.cat(pieces).view(len(parts), longest, -1)  # (rows, num_slots, slot_size)
    heads = [shape.num_kv_heads for shape in geometry.layers(site) for _ in range(2)]
    layered = [
        piece.unflatten(2, (num_heads, -1)).transpose(1, 2).contiguous()
        for piece, num_heads in zip(
            slots.split(geometry.split_sizes(site), dim=2), heads, strict=True
        )
    ]  # (rows, num_kv_heads, num_slots, head_dim)
    return SlotBlock(
        keys=tuple(layered[0::2]),
        values=tuple(layered[1::2]),
        log_strengths=torch.tensor(log_strengths, device=device),
        even=not scheduled and not any(map(any, log_strengths)),
        scheduled=tuple(scheduled),
    )
