"""User codes: a user as a small vector, and the decoder network that turns it into a prefix.

A decoder is trained on many users (`controlprefix.users`) and stored in versions under a
name. A code is only meaningful with its decoder, so it contains the decoder's content hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from controlprefix.errors import PrefixFormatError
from controlprefix.prefixes import file_format
from controlprefix.prefixes.file_format import FLOAT_DTYPES, StorageDtype
from controlprefix.prefixes.geometry import Geometry, Site
from controlprefix.prefixes.key import content_hash
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.slot_network import SlotNetwork

_MAX_DEVIATIONS = 4.0  # clamp features, so that an unusual text does not lead far away


@dataclass(frozen=True, eq=False)
class UserCode:
    """A user as one small vector per slot.

    Attributes:
        decoder_hash: Content hash of the decoder that it belongs to.
        values: `(num_slots, width)`, float32; zero is what all users have in common.
    """

    decoder_hash: str
    values: Tensor

    @property
    def num_slots(self) -> int:
        """Slots of the decoded prefix."""
        return len(self.values)

    def to_bytes(self, dtype: StorageDtype | None = None) -> bytes:
        """Serialize to one safetensors file.

        Args:
            dtype: Storage dtype; left out, `"int8"` with one scale per slot.

        Raises:
            PrefixFormatError: If a value is NaN or infinite.
        """
        file_format.require_storage_dtype(dtype)
        values = self.values.detach().cpu()
        header = {"decoder": self.decoder_hash}
        if dtype in FLOAT_DTYPES:
            tensors = {"code": values.to(getattr(torch, str(dtype)))}
        else:
            quantized, scales = file_format.quantize(values, [values.shape[1]])
            tensors = {"code": quantized, "scales": scales}
        return file_format.write(header, tensors, "the user code")

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "user code") -> Self:
        """Read what `to_bytes` wrote.

        Args:
            data: A whole safetensors file.
            name: What the file is called in errors.

        Raises:
            PrefixFormatError: If it is damaged, or not a user code.
        """
        header, tensors = file_format.read(data, name)
        values = tensors.get("code")
        if not isinstance(header.get("decoder"), str) or values is None or values.ndim != 2:
            raise PrefixFormatError(f"{name} is not a user code written by controlprefix")
        if not values.is_floating_point():
            sizes = [values.shape[1]]
            values = file_format.dequantize(values, tensors.get("scales"), sizes, name)
        return cls(header["decoder"], values.float())


def is_user_code(data: bytes, name: str) -> bool:
    """Whether a file holds a user code, from its header alone.

    Raises:
        PrefixFormatError: If the header is damaged.
    """
    return "decoder" in file_format.read_header(data, name)


class PrefixDecoder(nn.Module):
    """User code -> prefix: `initial + scale * network(embedding + code)` per slot and site.

    The network is the shared parameterization of Control Prefixes: users differ in where the
    embeddings of their slots are. Before training every code decodes to `initial`.

    Args:
        initial: The prefix that all users start from.
        scale: Per site, the unit of change of a slot's values, `(slot_size,)`.
        width: Values of a code per slot.
        hidden_size: Size of the networks' hidden layers.
        num_features: Text features per text, from which `predictor` predicts a code.
        feature_set: Name of the text features, so that no others are used.
        seed: Seed of the networks' weights.

    Attributes:
        content_hash: Hash of the file that it was read from, which codes refer to.

    Reference:
        Clive et al., "Control Prefixes", 2021, https://arxiv.org/abs/2110.08329.
    """

    def __init__(
        self,
        initial: Prefix,
        scale: Mapping[Site, Tensor],
        *,
        width: int = 64,
        hidden_size: int = 512,
        num_features: int = 1,
        feature_set: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.content_hash = ""
        self._storage_dtype: StorageDtype = "float32"
        self.geometry = initial.geometry
        self.num_slots, self.width, self.hidden_size = initial.num_slots, width, hidden_size
        self.feature_set = feature_set
        generator = torch.Generator().manual_seed(seed)
        self.sites = nn.ModuleDict(
            {
                site: _SiteDecoder(initial.slots[site], scale[site], width, hidden_size, generator)
                for site in self.geometry.sites
            }
        )
        self.predictor = CodePredictor(num_features, self.num_slots * width)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the weights."""
        return getattr(torch, self._storage_dtype)

    @property
    def scales(self) -> dict[Site, Tensor]:
        """Per site, the unit of change of a slot's values, `(slot_size,)`."""
        return {site: cast(Tensor, self.sites[site].scale) for site in self.geometry.sites}

    def slots(self, values: Tensor) -> dict[Site, Tensor]:
        """Decode code values `(num_slots, width)` with gradients.

        Returns:
            Per site, `(num_slots, slot_size)`.
        """
        return {site: self.sites[site](values) for site in self.geometry.sites}

    def predict_code(self, features: Tensor) -> UserCode:
        """Predict a user's code from the features of their texts, `(num_texts, num_features)`."""
        values = self.predictor(features).view(self.num_slots, self.width)
        return UserCode(self.content_hash, values)

    def merged_code(
        self, first: UserCode, num_first: int, second: UserCode, num_second: int
    ) -> UserCode:
        """The code of all texts, of which two codes were predicted from a part each.

        It equals the prediction from all of them at once: a prediction is linear in the mean of
        the texts' features, and its shrinkage is known.

        Args:
            first, second: Codes of this decoder.
            num_first, num_second: From how many texts each was predicted.
        """
        count = float(self.predictor.pseudo_count)
        mean, total = self.mean_code.values, num_first + num_second
        # A code's distance from the mean is its mean features' times n / (n + pseudo count).
        distance = sum(
            (code.values.to(mean) - mean) * (number + count)
            for code, number in ((first, num_first), (second, num_second))
        )
        return UserCode(self.content_hash, mean + distance / (total + count))

    @property
    def mean_code(self) -> UserCode:
        """The mean code of the users that it was trained on."""
        values = self.predictor.mean_code.view(self.num_slots, self.width)
        return UserCode(self.content_hash, values.clone())

    def decode(self, code: UserCode) -> Prefix:
        """Decode a code, on the decoder's device.

        Raises:
            PrefixFormatError: If the code belongs to another decoder.
        """
        if code.decoder_hash != self.content_hash or code.values.shape != (
            self.num_slots,
            self.width,
        ):
            raise PrefixFormatError(
                f"a code of decoder {code.decoder_hash[:19]} with shape "
                f"{tuple(code.values.shape)} cannot be read by decoder {self.content_hash[:19]} "
                f"with shape {(self.num_slots, self.width)}; decode it with its own, or enroll the "
                "user again"
            )
        with torch.no_grad():
            slots = self.slots(code.values.to(next(self.parameters())))
        return Prefix(self.geometry, slots)

    def rounded(self) -> "PrefixDecoder":
        """A frozen copy with bfloat16 weights, computing in float32: the form it is stored in."""
        return PrefixDecoder.from_bytes(self.to_bytes("bfloat16"))

    def to_bytes(self, dtype: StorageDtype | None = None) -> bytes:
        """Serialize to one safetensors file.

        Args:
            dtype: Storage dtype, except int8; left out, the dtype it was read in.

        Raises:
            PrefixFormatError: If a value is NaN or infinite, or the dtype is int8.
        """
        if dtype == "int8":
            raise PrefixFormatError("a decoder cannot be stored as int8; give bfloat16")
        storage_dtype = getattr(torch, dtype or self._storage_dtype)
        tensors = {name: tensor.to(storage_dtype) for name, tensor in self.state_dict().items()}
        header = {
            "geometry": self.geometry.to_dict(),
            "network": {
                "width": self.width,
                "hidden_size": self.hidden_size,
                "num_features": self.predictor.num_features,
                "feature_set": self.feature_set,
            },
        }
        return file_format.write(header, tensors, "the decoder")

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "decoder") -> Self:
        """Read what `to_bytes` wrote; the result is frozen.

        Args:
            data: A whole safetensors file.
            name: What the file is called in errors.

        Raises:
            PrefixFormatError: If it is damaged, or not a decoder.
        """
        header, tensors = file_format.read(data, name)
        network: Any = header.get("network")
        if not isinstance(network, dict) or "geometry" not in header:
            raise PrefixFormatError(f"{name} is not a decoder written by controlprefix")
        with file_format.reading(name):
            geometry = Geometry.from_dict(header["geometry"])
            sites = geometry.sites
            _require_declared_sizes(network, sites, tensors)
            initial = Prefix(geometry, {site: tensors[f"sites.{site}.initial"] for site in sites})
            scale = {site: tensors[f"sites.{site}.scale"] for site in sites}
            storage_dtype = str(initial.dtype).removeprefix("torch.")
            decoder = cls(initial.to(dtype=torch.float32), scale, **network).float()
            decoder.load_state_dict(tensors)
        if storage_dtype not in FLOAT_DTYPES:
            raise PrefixFormatError(f"{name} holds {storage_dtype} values; weights are floats")
        decoder._storage_dtype = cast(StorageDtype, storage_dtype)
        decoder.content_hash = content_hash(data)
        return decoder.requires_grad_(False).eval()


def _require_declared_sizes(
    network: Mapping[str, Any], sites: Sequence[Site], tensors: Mapping[str, Tensor]
) -> None:
    """Compare a decoder's sizes with its tensors, before anything is allocated for them."""
    sizes = [network[name] for name in ("width", "hidden_size", "num_features")]
    width, hidden_size, num_features = sizes
    if not sites or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"it declares the sizes {sizes}")
    expected: dict[str, tuple[int, ...]] = {}
    num_slots = 0
    for site in sites:
        rows, size = tensors[f"sites.{site}.initial"].shape
        num_slots = max(num_slots, rows)
        expected |= {
            f"sites.{site}.embeddings": (rows, width),
            f"sites.{site}.network.hidden.0.weight": (hidden_size, width),
            f"sites.{site}.network.output.0.weight": (size, hidden_size),
        }
    expected["predictor.feature_mean"] = (num_features,)
    expected["predictor.weights"] = (num_features, num_slots * width)
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensors[name].shape)}, and {shape} is declared"
            )


class CodePredictor(nn.Module):
    """Text features -> user code: a linear map of the shrunk mean of a user's features.

    The mean over n texts is multiplied by n / (n + pseudo_count), a shrinkage estimator: one
    text says less about its author than sixteen.

    Args:
        num_features: Features per text.
        code_size: Values of a code.
    """

    feature_mean: Tensor
    feature_std: Tensor
    weights: Tensor
    mean_code: Tensor
    pseudo_count: Tensor

    def __init__(self, num_features: int, code_size: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))
        self.register_buffer("weights", torch.zeros(num_features, code_size))
        self.register_buffer("mean_code", torch.zeros(code_size))
        self.register_buffer("pseudo_count", torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """Predict a code `(code_size,)` from `(num_texts, num_features)`, at least one text."""
        return self.mean_code + self.shrunk_features(features) @ self.weights

    @property
    def uses_features(self) -> bool:
        """Whether the prediction depends on the features at all."""
        return bool(self.weights.any())

    def shrunk_features(self, features: Tensor) -> Tensor:
        """Standardize, clamp, average and shrink features; returns `(num_features,)`."""
        standardized = (features.to(self.feature_mean) - self.feature_mean) / self.feature_std
        standardized = standardized.clamp(-_MAX_DEVIATIONS, _MAX_DEVIATIONS)
        num_texts = len(standardized)
        return standardized.mean(0) * (num_texts / (num_texts + self.pseudo_count))


class _SiteDecoder(nn.Module):
    """The decoder at one site."""

    initial: Tensor
    scale: Tensor

    def __init__(
        self,
        initial: Tensor,
        scale: Tensor,
        width: int,
        hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.register_buffer("initial", initial.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.embeddings = nn.Parameter(
            torch.randn(len(initial), width, generator=generator, device="cpu")
        )
        self.network = SlotNetwork(width, hidden_size, initial.shape[1], generator=generator)

    def forward(self, values: Tensor) -> Tensor:
        embeddings = self.embeddings + values[: len(self.embeddings)]
        return self.initial + self.scale * self.network(embeddings)
