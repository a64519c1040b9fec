"""Prefixes as codes: a few numbers a user, and a decoder that makes slots of them.

A decoder is learned over many users (see `controlprefix.users`), and kept in the store
under a name, in versions. A code means something only beside its decoder, so it names it by
its content. Whoever reads a code from the store gets the prefix.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from controlprefix.errors import GeometryMismatchError, PrefixFormatError
from controlprefix.prefixes import container as payload
from controlprefix.prefixes.container import FLOATS, PayloadDtype
from controlprefix.prefixes.geometry import SITES, Geometry, Site
from controlprefix.prefixes.prefix import Prefix

_LARGEST = 4.0  # standard deviations of a feature; a strange text must not lead far away


@dataclass(frozen=True, eq=False)
class Code:
    """What is kept of a prefix where there is a decoder.

    Attributes:
        decoder: Content hash of the decoder it belongs to.
        numbers: `(num_slots, width)`, float32; all 0 is what users have in common.
    """

    decoder: str
    numbers: Tensor

    def to_bytes(self, dtype: PayloadDtype | None = None) -> bytes:
        """As one safetensors file.

        Args:
            dtype: Of the numbers in the file; left out, `"int8"`, with a scale for each slot.

        Raises:
            PrefixFormatError: If a number is NaN or infinite.
        """
        rows = self.numbers.detach().cpu()
        if not bool(torch.isfinite(rows).all()):
            raise PrefixFormatError("a user code has NaN or infinite numbers")
        about = {"decoder": self.decoder}
        if dtype in FLOATS:
            return payload.write(about, {"code": rows.to(getattr(torch, str(dtype)))})
        code, scales = payload.quantized(rows, [rows.shape[1]])
        return payload.write(about, {"code": code, "scales": scales})

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "code") -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            PrefixFormatError: If it is damaged, or no code.
        """
        about, tensors = payload.read(data, name)
        rows = tensors.get("code")
        if not isinstance(about.get("decoder"), str) or rows is None or rows.ndim != 2:
            raise PrefixFormatError(f"{name} is not a user code written by controlprefix")
        if not rows.is_floating_point():
            rows = payload.dequantized(rows, tensors.get("scales"), [rows.shape[1]], name)
        rows = rows.float()
        if not bool(torch.isfinite(rows).all()):
            raise PrefixFormatError(f"{name} has NaN or infinite numbers")
        return cls(about["decoder"], rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class CodedPrefix(Prefix):
    """A prefix that came out of a decoder; written to bytes, it is its code alone."""

    code: Code

    def to_bytes(self, dtype: PayloadDtype | None = None) -> bytes:
        """Its code: see `Code.to_bytes`."""
        return self.code.to_bytes(dtype)


def code_in(data: bytes, name: str) -> Code | None:
    """The code that bytes hold; None where they hold something else.

    Raises:
        PrefixFormatError: If they are damaged.
    """
    is_code = "decoder" in payload.read_header(data, name)
    return Code.from_bytes(data, name=name) if is_code else None


class PrefixDecoder(nn.Module):
    """Code -> slots: `start + scale * network(embedding + code)`, slot by slot, site by site.

    The network is that of the `shared` parameterization (Control Prefixes, Clive et al.,
    2021): what differs between users is where its slots' embeddings are. It begins at
    `start`, whatever the code.

    Args:
        start: The prefix that all users begin with.
        scale: For each site, the unit of change, `(slot_size,)`.
        width: Numbers of a code for each slot.
        hidden: Of the network.
        features: How many numbers tell what a user's texts are like; from them the
            `generator` guesses a code.
        embedder: What computed them: its name, so that no other is used.
        seed: Of the networks.

    Attributes:
        content_hash: Of the bytes it was read from, which codes name it by.
    """

    def __init__(
        self,
        start: Prefix,
        scale: Mapping[Site, Tensor],
        *,
        width: int = 64,
        hidden: int = 512,
        features: int = 1,
        embedder: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.content_hash = ""
        self._kept_as: PayloadDtype = "float32"
        self.geometry = start.geometry
        self.num_slots, self.width, self.hidden = start.num_slots, width, hidden
        self.embedder = embedder
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict(
            {
                site: _SlotNetwork(start.slots[site], scale[site], width, hidden, generator)
                for site in self.geometry.sites
            }
        )
        self.generator = CodeGenerator(features, self.num_slots * width)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers in its bytes."""
        return getattr(torch, self._kept_as)

    @property
    def scales(self) -> dict[Site, Tensor]:
        """For each site, the unit of change, `(slot_size,)`."""
        return {site: cast(Tensor, self.networks[site].scale) for site in self.geometry.sites}

    def slots(self, numbers: Tensor) -> dict[Site, Tensor]:
        """Slots of a code `(num_slots, width)`, connected to it and to the parameters."""
        return {site: self.networks[site](numbers) for site in self.geometry.sites}

    def guess(self, features: Tensor) -> Code:
        """The code of a user, from what their texts are like, `(texts, num_features)`."""
        numbers = self.generator(features).view(self.num_slots, self.width)
        return Code(self.content_hash, numbers)

    @property
    def common(self) -> Code:
        """The code that users have in the mean."""
        numbers = self.generator.common.view(self.num_slots, self.width)
        return Code(self.content_hash, numbers.clone())

    def decode(self, code: Code) -> CodedPrefix:
        """The prefix of a code, on the decoder's device.

        Raises:
            PrefixFormatError: If the code is another decoder's.
        """
        if code.decoder != self.content_hash or code.numbers.shape != (self.num_slots, self.width):
            raise PrefixFormatError(
                f"a code of decoder {code.decoder[:19]} {tuple(code.numbers.shape)} cannot be read "
                f"by decoder {self.content_hash[:19]} {(self.num_slots, self.width)}"
            )
        with torch.no_grad():
            slots = self.slots(code.numbers.to(next(self.parameters())))
        return CodedPrefix(self.geometry, slots, code=code)

    def frozen(self) -> "PrefixDecoder":
        """As it is published: rounded to bfloat16, and computing with that in float32."""
        return PrefixDecoder.from_bytes(self.to_bytes("bfloat16"))

    def to_bytes(self, dtype: PayloadDtype | None = None) -> bytes:
        """As one safetensors file.

        Args:
            dtype: Of the numbers in the file, other than int8; left out, as they were read.

        Raises:
            PrefixFormatError: If a number is NaN or infinite, or the dtype is int8.
        """
        if dtype == "int8":
            raise PrefixFormatError("a decoder cannot be kept as int8; give bfloat16")
        wanted = getattr(torch, dtype or self._kept_as)
        tensors = {name: rows.to(wanted) for name, rows in self.state_dict().items()}
        for name, rows in tensors.items():
            if not bool(torch.isfinite(rows).all()):
                raise PrefixFormatError(f"the decoder has NaN or infinite numbers in {name}")
        return payload.write(
            {
                "geometry": self.geometry.to_dict(),
                "network": {
                    "width": self.width,
                    "hidden": self.hidden,
                    "features": self.generator.num_features,
                    "embedder": self.embedder,
                },
            },
            tensors,
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "decoder") -> Self:
        """Read what `to_bytes` wrote; it does not learn.

        Raises:
            PrefixFormatError: If it is damaged, or no decoder.
        """
        about, tensors = payload.read(data, name)
        network: Any = about.get("network")
        if network is None or "geometry" not in about:
            raise PrefixFormatError(f"{name} is not a decoder written by controlprefix")
        geometry = Geometry.from_dict(about["geometry"])
        try:
            start = Prefix(geometry, {s: tensors[f"networks.{s}.start"] for s in geometry.sites})
            scale: dict[Site, Tensor] = {
                site: tensors[f"networks.{site}.scale"] for site in SITES if site in geometry.sites
            }
            kept_as = str(start.dtype).removeprefix("torch.")
            decoder = cls(start.to(dtype=torch.float32), scale, **network).float()
            decoder.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, GeometryMismatchError) as error:
            raise PrefixFormatError(f"{name} contradicts itself: {error}") from error
        if kept_as not in FLOATS:
            raise PrefixFormatError(f"{name} holds {kept_as} numbers")
        for rows in tensors.values():
            if not bool(torch.isfinite(rows).all()):
                raise PrefixFormatError(f"{name} has NaN or infinite numbers")
        decoder._kept_as = cast(PayloadDtype, kept_as)
        decoder.content_hash = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return decoder.requires_grad_(False).eval()


class CodeGenerator(nn.Module):
    """What a user's texts are like -> a code: a linear map of the mean of their features.

    One text says less of its writer than sixteen, so the mean of n counts n / (n + doubt).

    Args:
        num_features: Of each text.
        size: Of a code.
    """

    mean: Tensor
    spread: Tensor
    weights: Tensor
    common: Tensor
    doubt: Tensor

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.register_buffer("weights", torch.zeros(num_features, size))
        self.register_buffer("common", torch.zeros(size))
        self.register_buffer("doubt", torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """A code, `(size,)`, from a user's texts, `(texts, num_features)`: at least one."""
        return self.common + self.shrunk(features) @ self.weights

    @property
    def tells(self) -> bool:
        """Whether a code depends on texts at all."""
        return bool(self.weights.any())

    def shrunk(self, features: Tensor) -> Tensor:
        """What the code depends on, `(num_features,)`."""
        each = (features.to(self.mean) - self.mean) / self.spread
        each = each.clamp(-_LARGEST, _LARGEST)
        return each.mean(0) * (len(each) / (len(each) + self.doubt))


class _SlotNetwork(nn.Module):
    start: Tensor
    scale: Tensor

    def __init__(
        self, start: Tensor, scale: Tensor, width: int, hidden: int, seed: torch.Generator
    ) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.embeddings = nn.Parameter(torch.randn(len(start), width, generator=seed))
        self.hidden, self.last = nn.Linear(width, hidden), nn.Linear(hidden, start.shape[1])
        with torch.no_grad():
            self.hidden.weight.normal_(std=width**-0.5, generator=seed)
            for zero in (self.hidden.bias, self.last.weight, self.last.bias):
                zero.zero_()

    def forward(self, numbers: Tensor) -> Tensor:
        embedded = self.embeddings + numbers[: len(self.embeddings)]
        return self.start + self.scale * self.last(torch.tanh(self.hidden(embedded)))
