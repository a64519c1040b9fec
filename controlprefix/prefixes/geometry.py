"""Geometry: the attention shapes and weights fingerprint that a prefix and a model must share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from controlprefix.errors import GeometryMismatchError, PrefixFormatError

Site = Literal["decoder", "encoder", "cross"]
SITES: tuple[Site, ...] = get_args(Site)
# Whether attention normalizes over tokens and slots together, or over the slots by themselves.
Form = Literal["joint", "decoupled"]
FORMS: tuple[Form, ...] = get_args(Form)


# A `Prefix` and the number of positions to move it by -> the `Prefix` there.
Shift = Callable[[Any, int], Any]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of the keys and values that one attention layer reads for one slot."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of values in one slot's keys and in one slot's values."""
        return self.num_kv_heads * self.key_dim, self.num_kv_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class Geometry:
    """Layers, kv heads and head sizes per site, and the fingerprint of the frozen model.

    Attributes:
        decoder, encoder, cross: Layers of each site in order; they may differ in shape. A
            site that the model does not have has no layers.
        fingerprint: SHA-256 of the weights and settings (see `controlprefix.model.fingerprint`).
        model_name: Used in messages only; it does not count when geometries are compared.
        shift: Moves a prefix along the positions of the loaded model; None if none is loaded. It
            is neither stored nor compared.
    """

    decoder: tuple[LayerShape, ...] = ()
    encoder: tuple[LayerShape, ...] = ()
    cross: tuple[LayerShape, ...] = ()
    fingerprint: str = ""
    model_name: str = field(default="model", compare=False)
    shift: Shift | None = field(default=None, compare=False, repr=False)

    @classmethod
    def uniform(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, fingerprint: str = ""
    ) -> Self:
        """A decoder-only geometry whose layers all have the same shape.

        Args:
            num_layers, num_kv_heads, head_dim: As in the model's config.
            fingerprint: SHA-256 of the weights.
        """
        return cls(
            decoder=(LayerShape(num_kv_heads, head_dim, head_dim),) * num_layers,
            fingerprint=fingerprint,
        )

    def layers(self, site: Site) -> tuple[LayerShape, ...]:
        """The layers of one site, in order."""
        layers: tuple[LayerShape, ...] = getattr(self, site)
        return layers

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites this model has."""
        return tuple(site for site in SITES if self.layers(site))

    def split_sizes(self, site: Site) -> list[int]:
        """Sizes that split a slot into layer 0 keys, layer 0 values, layer 1 keys, …"""
        return [size for layer in self.layers(site) for size in layer.sizes]

    def head_sizes(self, site: Site) -> list[int]:
        """Sizes that split a slot into each kv head's keys, then its values, per layer."""
        return [
            size
            for layer in self.layers(site)
            for size in (layer.key_dim, layer.value_dim)
            for _ in range(layer.num_kv_heads)
        ]

    def slot_size(self, site: Site) -> int:
        """Number of values in one slot of a site: its keys and values at every layer."""
        return sum(self.split_sizes(site))

    def require(self, other: "Geometry", what: str) -> None:
        """Check that something made for another geometry fits this model.

        Args:
            other: The geometry it was made for.
            what: What it is called in the error.

        Raises:
            GeometryMismatchError: If a shape or the weights differ.
        """
        for site in SITES:
            layers, other_layers = self.layers(site), other.layers(site)
            if layers == other_layers:
                continue
            if len(layers) != len(other_layers):
                counts = len(other_layers), len(layers)
                difference = (
                    f"{counts[0]} {site} layers but model {self.model_name!r} has {counts[1]}"
                )
            else:
                i = next(i for i in range(len(layers)) if layers[i] != other_layers[i])
                difference = (
                    f"{_describe(other_layers[i])} at {site} layer {i} but model "
                    f"{self.model_name!r} has {_describe(layers[i])}"
                )
            raise GeometryMismatchError(
                f"{what} has {difference}; train it on this model, or load the model it was made "
                f"for ({other.model_name!r})"
            )
        if self.fingerprint != other.fingerprint:
            raise GeometryMismatchError(
                f"{what} was made for the weights {other.fingerprint[:12]!r} of "
                f"{other.model_name!r} but model {self.model_name!r} has the weights "
                f"{self.fingerprint[:12]!r}; train it on this model, or load that one"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable form; `from_dict` reads it back."""
        shapes = {
            site: [[s.num_kv_heads, s.key_dim, s.value_dim] for s in self.layers(site)]
            for site in self.sites
        }
        return {"model": self.model_name, "fingerprint": self.fingerprint, "sites": shapes}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            PrefixFormatError: If the data has another form.
        """
        try:
            sites: dict[str, Any] = {
                site: tuple(LayerShape(*map(_positive_int, shape)) for shape in shapes)
                for site, shapes in data["sites"].items()
            }
            if not sites or not set(sites) <= set(SITES):
                raise ValueError(f"sites {sorted(sites)}")
            return cls(**sites, fingerprint=str(data["fingerprint"]), model_name=str(data["model"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PrefixFormatError(f"the geometry of a prefix cannot be read: {error}") from error


def _positive_int(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 1 << 20:
        raise ValueError(f"{number!r} is not a count")
    return number


def _describe(shape: LayerShape) -> str:
    return f"{shape.num_kv_heads} kv heads of size {shape.key_dim}+{shape.value_dim}"
