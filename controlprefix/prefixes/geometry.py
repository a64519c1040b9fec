"""What a prefix must share with a model: the shape of its attention, and its weights."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from controlprefix.errors import GeometryMismatchError, PrefixFormatError

Site = Literal["decoder", "encoder", "cross"]
SITES: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The keys and values that one attention layer reads for one slot."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers in one slot's keys and in one slot's values."""
        return self.num_kv_heads * self.key_dim, self.num_kv_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class Geometry:
    """Layers, kv heads and head sizes per site, and the fingerprint of the frozen weights.

    Layers may differ in shape. A site the model does not have has no layers.
    `model_name` is for messages only: two models with equal weights are equal.
    """

    decoder: tuple[LayerShape, ...] = ()
    encoder: tuple[LayerShape, ...] = ()
    cross: tuple[LayerShape, ...] = ()
    fingerprint: str = ""
    model_name: str = field(default="model", compare=False)

    @classmethod
    def uniform(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, fingerprint: str = ""
    ) -> Self:
        """A decoder-only geometry whose layers are all alike."""
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
        """How one slot's numbers divide into layer 0 keys, layer 0 values, layer 1 keys, …"""
        return [size for layer in self.layers(site) for size in layer.sizes]

    def head_sizes(self, site: Site) -> list[int]:
        """The same divided further: each kv head's keys, then each one's values, layer by layer."""
        return [
            size
            for layer in self.layers(site)
            for size in (layer.key_dim, layer.value_dim)
            for _ in range(layer.num_kv_heads)
        ]

    def slot_size(self, site: Site) -> int:
        """Numbers in one slot of a site: its keys and values at every layer."""
        return sum(self.split_sizes(site))

    def require(self, other: "Geometry", what: str) -> None:
        """Refuse `what`, made for `other`, unless it fits this model exactly.

        Raises:
            GeometryMismatchError: If a shape or the weights differ.
        """
        for site in SITES:
            mine, theirs = self.layers(site), other.layers(site)
            if mine == theirs:
                continue
            if len(mine) != len(theirs):
                difference = (
                    f"{len(theirs)} {site} layers but model {self.model_name!r} has {len(mine)}"
                )
            else:
                i = next(i for i in range(len(mine)) if mine[i] != theirs[i])
                difference = (
                    f"{_heads(theirs[i])} at {site} layer {i} but model {self.model_name!r} has "
                    f"{_heads(mine[i])}"
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
        """A form that JSON can carry; `from_dict` reads it back."""
        shapes = {
            site: [[s.num_kv_heads, s.key_dim, s.value_dim] for s in self.layers(site)]
            for site in self.sites
        }
        return {"model": self.model_name, "fingerprint": self.fingerprint, "sites": shapes}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            PrefixFormatError: If it is not of that form.
        """
        try:
            sites = {
                site: tuple(LayerShape(*map(_count, shape)) for shape in shapes)
                for site, shapes in data["sites"].items()
            }
            if not set(sites) <= set(SITES):
                raise ValueError(f"sites {sorted(sites)}")
            return cls(**sites, fingerprint=str(data["fingerprint"]), model_name=str(data["model"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PrefixFormatError(f"the geometry of a prefix cannot be read: {error}") from error


def _count(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 1 << 20:
        raise ValueError(f"{number!r} is not a count")
    return number


def _heads(shape: LayerShape) -> str:
    return f"{shape.num_kv_heads} kv heads of {shape.key_dim}+{shape.value_dim} numbers"
