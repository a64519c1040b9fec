"""Prefix: the slots of one concept, an immutable value with a safetensors form."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from controlprefix._io import atomic_path
from controlprefix.errors import (
    GeometryMismatchError,
    PrefixFormatError,
    RequestError,
    StoreError,
    UnsupportedModelError,
)
from controlprefix.prefixes import file_format
from controlprefix.prefixes.dial import Dial, check_dial, read_dial, strength_at
from controlprefix.prefixes.file_format import StorageDtype
from controlprefix.prefixes.geometry import FORMS, SITES, Form, Geometry, Site
from controlprefix.prefixes.layer_slots import LayerSlots, heads_first, stack_layers
from controlprefix.prefixes.peft_files import read_checkpoint, write_checkpoint
from controlprefix.prefixes.relevance import Relevance

_log = logging.getLogger("controlprefix")


@dataclass(frozen=True, eq=False)
class Prefix:
    """The slots of one concept: a task, one label of an attribute, or one user.

    A slot is one row: its keys and values at every layer of a site, concatenated. So a
    site's slots are one matrix, joining prefixes is stacking rows, and their order has no
    meaning, unless they were trained for `first`. Keys are stored as attention uses them, after any
    rotary embedding.

    Attributes:
        geometry: Geometry of the model that this prefix is for.
        slots: Per site of the geometry, `(num_slots, slot_size)`; a site without slots has
            zero rows.
        dial: Calibrated strengths as `(position, strength)` points, if there are any: see
            `controlprefix.evaluation.calibrate`.
        relevance: Which prompts it is meant for, if that was learned: see
            `ControlPrefix.learn_relevance`.
        is_exact: For a prefix just made from a text or read from another library's checkpoint,
            whether attending to it equals what it was made from; None for others. Not stored.
        form: `"joint"`: its slots share one softmax with the tokens and the other parts.
            `"decoupled"`: they have a softmax of their own, whose output, times the strength, is
            added to that of attention (Wang et al., "Prefix-Tuning+", 2025,
            https://arxiv.org/abs/2506.13674, without its kernel and its weight on attention).

    Raises:
        GeometryMismatchError: If sites or shapes are not those of the geometry.
    """

    geometry: Geometry
    slots: Mapping[Site, Tensor]
    dial: Dial = ()
    relevance: Relevance | None = None
    is_exact: bool | None = None
    form: Form = "joint"

    def __post_init__(self) -> None:
        slots = dict(self.slots)
        for site in slots.keys() - set(self.geometry.sites):
            raise GeometryMismatchError(
                f"prefix has slots at site {site!r} but model {self.geometry.model_name!r} has "
                f"only: {', '.join(self.geometry.sites)}"
            )
        example = next(iter(slots.values()), torch.empty(0))
        for site in self.geometry.sites:
            size = self.geometry.slot_size(site)
            rows = slots.setdefault(site, example.new_empty(0, size))
            if rows.ndim != 2 or rows.shape[1] != size:
                raise GeometryMismatchError(
                    f"slots of site {site!r} have shape {tuple(rows.shape)} but model "
                    f"{self.geometry.model_name!r} needs (num_slots, {size})"
                )
        check_dial(self.dial, "the prefix")
        if self.relevance is not None:
            self.relevance.check("the prefix")
        object.__setattr__(
            self, "slots", MappingProxyType({site: slots[site] for site in self.geometry.sites})
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
            geometry: Geometry of the model that the prefix is for.
            decoder, encoder, cross: Per layer of the site `(keys, values)`: keys
                `(num_kv_heads, num_slots, key_dim)` after rotary embedding, values
                `(num_kv_heads, num_slots, value_dim)`. A site left out has no slots.

        Raises:
            GeometryMismatchError: If layers or shapes are not those of the model.
            PrefixFormatError: If a value is NaN or infinite.
        """
        sites: dict[Site, Sequence[LayerSlots]] = {
            "decoder": decoder,
            "encoder": encoder,
            "cross": cross,
        }
        slots = {
            site: stack_layers(geometry, site, layers)
            for site, layers in sites.items()
            if len(layers)
        }
        return cls(geometry, slots).require_finite()

    @classmethod
    def random(
        cls, geometry: Geometry, *, num_slots: int, scale: float = 0.02, seed: int | None = None
    ) -> Self:
        """Slots drawn from a normal distribution, at every site.

        Args:
            geometry: Geometry of the model that the prefix is for.
            num_slots: Slots at each site.
            scale: Standard deviation of the values.
            seed: Seed of the draw; left out, another draw at each call.

        Raises:
            RequestError: If `num_slots` is below 0.
        """
        if num_slots < 0:
            raise RequestError(f"num_slots is {num_slots}; it must be 0 or more")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return cls(
            geometry,
            {
                site: torch.randn(
                    num_slots, geometry.slot_size(site), generator=generator, device="cpu"
                )
                * scale
                for site in geometry.sites
            },
        )

    @classmethod
    def joined(cls, prefixes: Sequence["Prefix"]) -> Self:
        """The slots of several prefixes of one geometry as one prefix.

        Args:
            prefixes: At least one.

        Raises:
            UnsupportedModelError: If one is decoupled.
        """
        for prefix in prefixes:
            prefix.require_joint("one prefix of several")
        geometry = prefixes[0].geometry
        return cls(
            geometry,
            {site: torch.cat([p.slots[site] for p in prefixes]) for site in geometry.sites},
        )

    def layer(self, site: Site, index: int) -> LayerSlots:
        """Keys and values of one layer, `(num_kv_heads, num_slots, key_dim or value_dim)`.

        Raises:
            IndexError: If the site has no such layer.
        """
        shape = self.geometry.layers(site)[index]
        columns = self.slots[site].split(self.geometry.split_sizes(site), dim=1)
        return (
            heads_first(columns[2 * index], shape.num_kv_heads),
            heads_first(columns[2 * index + 1], shape.num_kv_heads),
        )

    @property
    def num_slots(self) -> int:
        """Number of slots, at the site with the most."""
        return max((len(rows) for rows in self.slots.values()), default=0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots, the same at every site."""
        return next(iter(self.slots.values())).dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the slots in memory."""
        return sum(rows.numel() * rows.element_size() for rows in self.slots.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of form and slots as float32, independent of dtype, device and metadata."""
        sha = hashlib.sha256(b"" if self.form == "joint" else self.form.encode())
        for slots in self.slots.values():
            sha.update(slots.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The same prefix on another device or in another dtype."""
        slots = {site: rows.to(device=device, dtype=dtype) for site, rows in self.slots.items()}
        return replace(self, slots=slots)

    def first(self, num_slots: int) -> Self:
        """At most this many of the first slots of a prefix that was trained with `nested`.

        Raises:
            RequestError: If `num_slots` is below 1.
        """
        if num_slots < 1:
            raise RequestError(f"num_slots is {num_slots}; it must be 1 or more")
        slots = {site: rows[:num_slots] for site, rows in self.slots.items()}
        return replace(self, slots=slots, dial=(), is_exact=None)

    def strength_at(self, position: float) -> float:
        """The strength at a dial position, proportional to it beyond the last point.

        A position below 0 is that negative strength.

        Raises:
            RequestError: If the prefix has no dial.
        """
        return strength_at(self.dial, position)

    def to_bytes(self, dtype: StorageDtype | None = None) -> bytes:
        """Serialize to one safetensors file: a tensor per site, the geometry, a content hash.

        Args:
            dtype: Storage dtype; left out, the dtype of the slots. `"int8"` keeps one
                bfloat16 scale per slot, layer and kv head, for keys and values each; such a
                file is read back in the dtype the prefix had.

        Raises:
            PrefixFormatError: If a value is NaN or infinite, also after the conversion.
        """
        file_format.require_storage_dtype(dtype)
        prefix = self if dtype in (None, "int8") else self.to(dtype=getattr(torch, str(dtype)))
        prefix.require_finite()
        tensors: dict[str, Tensor] = {str(site): rows for site, rows in prefix.slots.items()}
        header: dict[str, Any] = {"geometry": self.geometry.to_dict()}
        if self.form != "joint":
            header["form"] = self.form
        if self.dial:
            header["dial"] = self.dial
        if self.relevance is not None:
            header["relevance"] = self.relevance.to_dict()
        if dtype == "int8":
            own_dtype = str(self.dtype).removeprefix("torch.")
            header["int8"] = own_dtype if own_dtype in file_format.FLOAT_DTYPES else "float32"
            for site, rows in prefix.slots.items():
                sizes = self.geometry.head_sizes(site)
                tensors[site], tensors[f"{site}.scales"] = file_format.quantize(
                    rows.detach().cpu(), sizes
                )
        return file_format.write(header, tensors, "the prefix")

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "prefix") -> Self:
        """Read what `to_bytes` wrote, and verify its content hash.

        Args:
            data: A whole safetensors file.
            name: What the file is called in errors.

        Raises:
            PrefixFormatError: If bytes are missing or damaged, the format is newer than this
                version, it is not a prefix, or it holds NaN or infinite values.
        """
        header, tensors = file_format.read(data, name)
        if "geometry" not in header or "network" in header:
            raise PrefixFormatError(f"{name} is not a prefix written by controlprefix")
        with file_format.reading(name):
            geometry = Geometry.from_dict(header["geometry"])
            slots = {site: tensors[site] for site in SITES if site in tensors}
            try:
                form = _read_form(header.get("form", "joint"), name)
                prefix = cls(geometry, slots, read_dial(header.get("dial", []), name), form=form)
                if (relevance := header.get("relevance")) is not None:
                    prefix = replace(prefix, relevance=Relevance.from_dict(relevance, name))
                if "int8" in header:  # after the shapes were compared with the geometry
                    sizes = {site: geometry.head_sizes(site) for site in slots}
                    floats = file_format.dequantize_sites(tensors, sizes, header["int8"], name)
                    prefix = replace(prefix, slots=floats)
            except GeometryMismatchError as error:
                raise PrefixFormatError(f"{name} contradicts its own geometry: {error}") from error
            return prefix.require_finite(name)

    def save(self, path: str | Path, dtype: StorageDtype | None = None) -> None:
        """Write the prefix to a safetensors file, in one step.

        Args:
            path: The file; an existing one is replaced.
            dtype: As in `to_bytes`.

        Raises:
            PrefixFormatError: If a value is NaN or infinite.
            StoreError: If the file cannot be written.
        """
        try:
            with atomic_path(Path(path)) as temporary:
                temporary.write_bytes(self.to_bytes(dtype))
        except OSError as error:
            raise StoreError(f"cannot write the prefix file '{path}': {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: The file.

        Raises:
            StoreError: If the file cannot be read.
            PrefixFormatError: As `from_bytes`.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read the prefix file '{path}': {error}") from error
        return cls.from_bytes(data, name=f"the file '{path}'")

    @classmethod
    def from_peft(cls, folder: str | Path, geometry: Geometry) -> Self:
        """Read a PEFT checkpoint of prefix tuning or a cartridge.

        On rotary models it is exact, within a layer's sliding window: logits equal PEFT's. On
        others, whose text has other positions in PEFT, it is a start for training (`is_exact` is
        False). The checkpoint does not say which weights it was made for, so this is not checked.

        Args:
            folder: With `adapter_config.json` and `adapter_model.safetensors`.
            geometry: Geometry of the loaded model: `cp.geometry`.

        Raises:
            PrefixFormatError: If the folder holds another kind of checkpoint. For prompt tuning,
                which needs the model, see `ControlPrefix.prefix_from_peft`.
            RequestError: If `geometry` is not that of a loaded model.
            GeometryMismatchError: If it was made for a model with other shapes.
        """
        checkpoint = read_checkpoint(folder)
        if checkpoint.has_embeddings:
            raise PrefixFormatError(
                f"{folder} holds embeddings, which the model must read: use "
                "ControlPrefix.prefix_from_peft"
            )
        prefix = cls(geometry, {"decoder": checkpoint.slots(geometry)})
        if geometry.shift is None:
            raise RequestError(
                "a PEFT checkpoint needs the geometry of a loaded model; give cp.geometry"
            )
        try:
            shifted = geometry.shift(prefix, -prefix.num_slots)
        except UnsupportedModelError as error:
            _log.warning("%s: its prefix is only a start for training: %s", folder, error)
            return replace(prefix, is_exact=False)
        return replace(prefix, slots=shifted.slots, is_exact=True)

    def to_peft(self, folder: str | Path, geometry: Geometry | None = None) -> None:
        """Write it as a PEFT checkpoint of prefix tuning, for rotary decoders.

        Args:
            folder: Created if it does not exist.
            geometry: Geometry of the loaded model, for a prefix that was read from a file.

        Raises:
            RequestError: If the geometry is not that of a loaded model.
            UnsupportedModelError: If the model's positions are not rotations of keys, or the
                prefix is decoupled.
            GeometryMismatchError: If the prefix is for another model, or layers differ in shape.
            StoreError: If the folder cannot be written.
        """
        self.require_joint("PEFT, whose prefixes are in the KV cache")
        geometry = self.geometry if geometry is None else geometry
        geometry.require(self.geometry, "the prefix")
        if geometry.shift is None:
            raise RequestError(
                "a PEFT checkpoint needs the geometry of a loaded model; give cp.geometry"
            )
        shifted = geometry.shift(self, self.num_slots)
        write_checkpoint(geometry, shifted.slots["decoder"], folder)

    def require_joint(self, what: str) -> None:
        """Check that the slots share their softmax with the tokens.

        Args:
            what: What needs that, in the error.

        Raises:
            UnsupportedModelError: If the prefix is decoupled.
        """
        if self.form != "joint":
            raise UnsupportedModelError(
                f"a prefix of form {self.form!r} has a softmax of its own, which is not possible "
                f"in {what}; train it with form='joint'"
            )

    def require_finite(self, name: str = "prefix") -> Self:
        """Return this prefix if all its values are finite floats.

        Args:
            name: What the prefix is called in errors.

        Raises:
            PrefixFormatError: If a value is NaN, infinite or not a float.
        """
        for site, rows in self.slots.items():
            if not rows.is_floating_point():
                raise PrefixFormatError(f"{name} holds {rows.dtype} values; slots are floats")
            if not bool(torch.isfinite(rows).all()):
                num_bad = int((~torch.isfinite(rows)).any(dim=1).sum())
                raise PrefixFormatError(
                    f"{name} has NaN or infinite values in {num_bad} of its {len(rows)} {site} "
                    f"slots as {rows.dtype}; train it again with a lower learning rate"
                )
        return self

    def __repr__(self) -> str:
        counts = ", ".join(f"{site}: {len(rows)}" for site, rows in self.slots.items())
        form = "" if self.form == "joint" else f", {self.form}"
        return f"Prefix({counts} slots, {self.dtype}{form}, model {self.geometry.model_name!r})"


def _read_form(form: object, name: str) -> Form:
    if form not in FORMS:
        raise PrefixFormatError(
            f"{name} has form {form!r}; this version knows: {', '.join(FORMS)}; upgrade "
            "controlprefix"
        )
    return form
