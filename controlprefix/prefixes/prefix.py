"""Prefix: the slots of one concept, as an immutable value with a safetensors form."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from controlprefix.errors import GeometryMismatchError, PrefixFormatError
from controlprefix.prefixes import container as payload
from controlprefix.prefixes.container import FLOATS, PayloadDtype
from controlprefix.prefixes.geometry import SITES, Geometry, LayerShape, Site

LayerSlots = tuple[Tensor, Tensor]  # keys, values: (num_kv_heads, num_slots, head_dim) each


@dataclass(frozen=True, eq=False)
class Prefix:
    """The slots of one concept (a task, one label of an attribute, or one user).

    A slot is a row: its keys and values at every layer of a site, one after the
    other. So a site's slots are one matrix, joining prefixes is stacking rows,
    and their order means nothing. Keys are as attention uses them, after any
    rotary embedding.

    Attributes:
        geometry: Of the model this prefix is for.
        slots: For each site of the geometry, `(num_slots, slot_size)`; a site
            without slots has zero rows.
        dial: `(position, strength)` pairs from (0, 0) up, where strengths were calibrated:
            see `controlprefix.evaluation.calibrate`.
    """

    geometry: Geometry
    slots: Mapping[Site, Tensor]
    dial: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        given = dict(self.slots)
        for site in given.keys() - set(self.geometry.sites):
            raise GeometryMismatchError(
                f"prefix has slots at site {site!r} but model {self.geometry.model_name!r} has "
                f"only: {', '.join(self.geometry.sites)}"
            )
        example = next(iter(given.values()), torch.empty(0))
        for site in self.geometry.sites:
            size = self.geometry.slot_size(site)
            rows = given.setdefault(site, example.new_empty(0, size))
            if rows.ndim != 2 or rows.shape[1] != size:
                raise GeometryMismatchError(
                    f"slots of site {site!r} have shape {tuple(rows.shape)} but model "
                    f"{self.geometry.model_name!r} needs (num_slots, {size})"
                )
        object.__setattr__(
            self, "slots", MappingProxyType({site: given[site] for site in self.geometry.sites})
        )

    @classmethod
    def from_layers(
        cls,
        geometry: Geometry,
        *,
        decoder: Sequence[LayerSlots] = (),
        encoder: Sequence[LayerSlots] = (),
        cross: Sequence[LayerSlots] = (),
    ) -> Self:
        """Make a prefix from keys and values per layer.

        Args:
            geometry: Of the model the prefix is for.
            decoder, encoder, cross: For each layer of the site `(keys, values)`,
                keys `(num_kv_heads, num_slots, key_dim)` after rotary embedding,
                values `(num_kv_heads, num_slots, value_dim)`. A site left out has
                no slots.

        Raises:
            GeometryMismatchError: If layers or shapes are not those of the model.
            PrefixFormatError: If a number is NaN or infinite.
        """
        sites: dict[Site, Sequence[LayerSlots]] = {
            "decoder": decoder,
            "encoder": encoder,
            "cross": cross,
        }
        slots = {
            site: _rows(geometry, site, layers) for site, layers in sites.items() if len(layers)
        }
        return cls(geometry, slots).require_finite()

    @classmethod
    def random(
        cls, geometry: Geometry, *, num_slots: int, scale: float = 0.02, seed: int | None = None
    ) -> Self:
        """Slots drawn from a normal distribution, at every site."""
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return cls(
            geometry,
            {
                site: torch.randn(num_slots, geometry.slot_size(site), generator=generator) * scale
                for site in geometry.sites
            },
        )

    def layer(self, site: Site, index: int) -> LayerSlots:
        """Keys and values of one layer, `(num_kv_heads, num_slots, head_dim)` each."""
        shape = self.geometry.layers(site)[index]
        pieces = self.slots[site].split(self.geometry.split_sizes(site), dim=1)
        return (
            _heads_first(pieces[2 * index], shape.num_kv_heads),
            _heads_first(pieces[2 * index + 1], shape.num_kv_heads),
        )

    @property
    def num_slots(self) -> int:
        """Slots at the site that has most of them."""
        return max((len(rows) for rows in self.slots.values()), default=0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers, the same at every site."""
        return next(iter(self.slots.values())).dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the numbers alone."""
        return sum(rows.numel() * rows.element_size() for rows in self.slots.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers alone, as float32: the same for whoever holds the same slots."""
        sha = hashlib.sha256()
        for slots in self.slots.values():
            sha.update(slots.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The same prefix on another device or in another dtype."""
        moved = {site: rows.to(device=device, dtype=dtype) for site, rows in self.slots.items()}
        return replace(self, slots=moved)

    def strength_at(self, position: float) -> float:
        """The strength at a position of the dial; beyond its last point, as steep as there.

        A negative position is a negative strength.

        Raises:
            ValueError: If there is no dial.
        """
        if not self.dial:
            raise ValueError("the prefix has no dial")
        if position <= 0:
            return position
        for (left, low), (right, high) in pairwise(self.dial):
            if position <= right:
                return low + (high - low) * (position - left) / (right - left)
        last, most = self.dial[-1]
        return most * position / last

    def to_bytes(self, dtype: PayloadDtype | None = None) -> bytes:
        """As one safetensors file: a tensor a site, the geometry and a content hash.

        Args:
            dtype: Of the numbers in the file; left out, as they are. `"int8"` keeps for
                each slot, layer and kv head its keys and its values as 127 steps up to
                the largest of them, with that scale in bfloat16; it is read back in the
                dtype the prefix had.

        Raises:
            PrefixFormatError: If a number is NaN or infinite, also in that dtype.
        """
        prefix = self if dtype in (None, "int8") else self.to(dtype=getattr(torch, str(dtype)))
        prefix.require_finite()
        tensors: dict[str, Tensor] = {str(site): rows for site, rows in prefix.slots.items()}
        about: dict[str, Any] = {"geometry": self.geometry.to_dict()}
        if self.dial:
            about["dial"] = self.dial
        if dtype == "int8":
            about["int8"] = str(self.dtype).removeprefix("torch.")
            for site, rows in prefix.slots.items():
                sizes = self.geometry.head_sizes(site)
                tensors[site], tensors[f"{site}.scales"] = payload.quantized(
                    rows.detach().cpu(), sizes
                )
        return payload.write(about, tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "prefix") -> Self:
        """Read what `to_bytes` wrote, and check it against its own hash.

        Args:
            data: A whole safetensors file.
            name: What to call it in errors.

        Raises:
            PrefixFormatError: If bytes are missing, damaged, of a later format, not a
                prefix at all, or hold NaN or infinite numbers.
        """
        about, tensors = payload.read(data, name)
        if "geometry" not in about:
            raise PrefixFormatError(f"{name} is not a prefix written by controlprefix")
        geometry = Geometry.from_dict(about["geometry"])
        try:
            slots = {site: tensors[site] for site in SITES if site in tensors}
            if "int8" in about:
                slots = _dequantized(geometry, slots, tensors, about["int8"], name)
            return cls(geometry, slots, _dial(about.get("dial", []), name)).require_finite(name)
        except GeometryMismatchError as error:
            raise PrefixFormatError(f"{name} contradicts its own geometry: {error}") from error

    def require_finite(self, name: str = "prefix") -> Self:
        """This prefix, if all its numbers are finite floats.

        Raises:
            PrefixFormatError: If not.
        """
        for site, rows in self.slots.items():
            if not rows.is_floating_point():
                raise PrefixFormatError(f"{name} holds {rows.dtype} numbers; slots are floats")
            if not bool(torch.isfinite(rows).all()):
                bad = int((~torch.isfinite(rows)).any(dim=1).sum())
                raise PrefixFormatError(
                    f"{name} has NaN or infinite numbers in {bad} of its {len(rows)} {site} slots "
                    f"as {rows.dtype}; train it again with a lower learning rate"
                )
        return self

    def __repr__(self) -> str:
        counts = ", ".join(f"{site}: {len(rows)}" for site, rows in self.slots.items())
        return f"Prefix({counts} slots, {self.dtype}, model {self.geometry.model_name!r})"


def _dial(given: Any, name: str) -> tuple[tuple[float, float], ...]:
    try:
        dial = tuple((float(position), float(strength)) for position, strength in given)
    except (TypeError, ValueError) as error:
        raise PrefixFormatError(f"{name} has a dial that cannot be read") from error
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(dial))
    if dial and not (dial[0] == (0.0, 0.0) and rising and math.isfinite(dial[-1][1])):
        raise PrefixFormatError(f"{name} has a dial that does not rise from 0")
    return dial


def _dequantized(
    geometry: Geometry,
    slots: Mapping[Site, Tensor],
    tensors: Mapping[str, Tensor],
    dtype: object,
    name: str,
) -> dict[Site, Tensor]:
    if dtype not in FLOATS:
        raise PrefixFormatError(f"{name} was made from {dtype!r} numbers, which are no floats")
    return {
        site: payload.dequantized(
            rows, tensors.get(f"{site}.scales"), geometry.head_sizes(site), f"{name} at {site}"
        ).to(getattr(torch, str(dtype)))
        for site, rows in slots.items()
    }


def _heads_first(rows: Tensor, num_heads: int) -> Tensor:
    return rows.unflatten(1, (num_heads, -1)).transpose(0, 1)  # (num_heads, num_slots, head_dim)


def _rows(geometry: Geometry, site: Site, layers: Sequence[LayerSlots]) -> Tensor:
    """Per-layer keys and values as one row a slot: `(num_slots, slot_size)`."""
    shapes = geometry.layers(site)
    if len(layers) != len(shapes):
        raise GeometryMismatchError(
            f"prefix has {len(layers)} {site} layers but model {geometry.model_name!r} has "
            f"{len(shapes)}"
        )
    num_slots = layers[0][0].shape[1] if layers[0][0].ndim == 3 else 0
    pieces = []
    for i, ((keys, values), shape) in enumerate(zip(layers, shapes, strict=True)):
        for kind, tensor, want in zip(
            ("keys", "values"), (keys, values), _want(shape, num_slots), strict=True
        ):
            if tuple(tensor.shape) != want:
                raise GeometryMismatchError(
                    f"{kind} of {site} layer {i} have shape {tuple(tensor.shape)} but model "
                    f"{geometry.model_name!r} needs {want} (num_kv_heads, num_slots, head_dim)"
                )
            pieces.append(tensor.transpose(0, 1).flatten(1))  # (num_slots, num_heads * head_dim)
    return torch.cat(pieces, dim=1)


def _want(shape: LayerShape, num_slots: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (
        (shape.num_kv_heads, num_slots, shape.key_dim),
        (shape.num_kv_heads, num_slots, shape.value_dim),
    )
