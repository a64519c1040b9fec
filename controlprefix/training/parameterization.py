"""Parameterizations: how slots are produced during training.

Each gives `initial + scale * change`. `initial` is the prefix that training starts from, such
as the keys and values of a text; `scale` is the size of the model's own keys and values per
head; the change is zero at first. So training starts exactly at the initialization, one
learning rate suits models whose keys differ in size, and weight decay pulls towards it.

- `direct`: each value of the change is a parameter.
- `mlp`: a network per prefix, from an embedding per slot (Li & Liang, "Prefix-Tuning", 2021,
  https://arxiv.org/abs/2101.00190).
- `shared`: one network per site for all prefixes, so that task and labels learn from each
  other (Clive et al., "Control Prefixes", 2021, https://arxiv.org/abs/2110.08329).
- `shared-kv`: `shared` with one network for keys and one for values, which read the same
  embedding (Le et al., "Revisiting Prefix-tuning", 2024, https://arxiv.org/abs/2410.02200).

The networks are dropped after training: a `Prefix` is stored and served.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from controlprefix.prefixes import Geometry, Prefix, PrefixKey, Site, UserCode
from controlprefix.prefixes.slot_network import SlotNetwork
from controlprefix.training.settings import ParameterizationName, TrainingSettings

# A whole prefix in two of seven steps.
_NESTED_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.0)


class TrainablePrefixes(nn.Module, ABC):
    """Prefixes in float32 as a function of trainable parameters.

    Attributes:
        keys: The keys of the prefixes.
    """

    keys: tuple[PrefixKey, ...]

    @abstractmethod
    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Compute some of the prefixes, with gradients to the parameters.

        Args:
            keys: Which prefixes.
            seed: Seed of dropout; None: no dropout.
        """

    @abstractmethod
    def initial_digest(self) -> str:
        """A hash of the initialization, so that a run is resumed only where it was started."""

    def materialize(self) -> dict[PrefixKey, Prefix]:
        """All prefixes as detached copies."""
        with torch.no_grad():
            return {
                key: replace(prefix, slots={s: t.clone() for s, t in prefix.slots.items()})
                for key, prefix in self.prefixes(self.keys).items()
            }

    def stored_values(self) -> dict[PrefixKey, Prefix | UserCode]:
        """What is stored of each prefix."""
        return {**self.materialize()}

    def to_device(self, device: torch.device) -> Self:
        """Move the parameters and the initial prefixes."""
        return self.to(device)


class Parameterization(TrainablePrefixes):
    """Several prefixes, produced in one of the ways above.

    Args:
        name: Which way.
        initial: The prefixes to start from, at least one.
        scale: Per site, the unit of change of a slot's values, `(slot_size,)`.
        hidden_size: Size of the networks' embeddings and hidden layers.
        slot_dropout: Probability of leaving a slot out.
        nested: Whether to leave the last slots out at random.
        seed: Seed of the networks' weights.
    """

    def __init__(
        self,
        name: ParameterizationName,
        initial: Mapping[PrefixKey, Prefix],
        scale: Mapping[Site, Tensor],
        *,
        hidden_size: int = 512,
        slot_dropout: float = 0.0,
        nested: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.keys = tuple(initial)
        self._slot_dropout, self._nested = slot_dropout, nested
        self._initial = {key: prefix.to(dtype=torch.float32) for key, prefix in initial.items()}
        self._geometry = next(iter(initial.values())).geometry
        self._scale = {site: scale[site].float() for site in self._geometry.sites}
        generator = torch.Generator().manual_seed(seed)
        self.changes = nn.ModuleDict()
        for site in self._geometry.sites:
            num_slots = {key: len(prefix.slots[site]) for key, prefix in initial.items()}
            num_slots = {key: count for key, count in num_slots.items() if count}
            if name == "direct":
                self.changes[site] = _DirectChange(num_slots, self._geometry.slot_size(site))
            else:
                self.changes[site] = _NetworkChange(
                    num_slots, name, self._geometry, site, hidden_size, generator
                )

    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Compute some of the prefixes; with a seed, slots are left out if that is set."""
        keys = [key for key in self.keys if key in keys]
        slots: dict[PrefixKey, dict[Site, Tensor]] = {k: {**self._initial[k].slots} for k in keys}
        for site in self._geometry.sites:
            for key, change in self.changes[site](keys).items():
                slots[key][site] = slots[key][site] + self._scale[site] * change
        prefixes = {
            key: Prefix(self._geometry, slots[key], form=self._initial[key].form) for key in keys
        }
        if seed is None or not (self._slot_dropout or self._nested):
            return prefixes
        return {key: self._drop_slots(key, prefix, seed) for key, prefix in prefixes.items()}

    def initial_digest(self) -> str:
        """A hash of the initial prefixes."""
        sha = hashlib.sha256()
        for key, prefix in self._initial.items():
            sha.update(f"{key} {prefix.digest}".encode())
        return sha.hexdigest()

    def to_device(self, device: torch.device) -> Self:
        """Move parameters, initial prefixes and scales."""
        self._initial = {key: prefix.to(device=device) for key, prefix in self._initial.items()}
        self._scale = {site: scale.to(device) for site, scale in self._scale.items()}
        return self.to(device)

    def _drop_slots(self, key: PrefixKey, prefix: Prefix, seed: int) -> Prefix:
        """Leave some slots out; a pure function of seed and key, so equal in every process."""
        rng = random.Random(f"{seed}:{key.kind}:{key.name}")
        generator = torch.Generator().manual_seed(rng.randrange(1 << 62))
        if self._nested:
            prefix = prefix.first(max(1, round(rng.choice(_NESTED_SHARES) * prefix.num_slots)))
        draws = torch.rand(prefix.num_slots, generator=generator, device="cpu")
        keep_mask = draws >= self._slot_dropout
        keep_mask[draws.argmax()] = True  # at least one
        slots = {site: rows[keep_mask[: len(rows)]] for site, rows in prefix.slots.items()}
        return replace(prefix, slots=slots)


def parameterize(
    settings: TrainingSettings, initial: Mapping[PrefixKey, Prefix], scale: Mapping[Site, Tensor]
) -> Parameterization:
    """Trainable prefixes at their initialization.

    Args:
        settings: Names the parameterization and its sizes.
        initial: The prefixes to start from.
        scale: Per site, the unit of change of a slot's values, `(slot_size,)`.
    """
    return Parameterization(
        settings.parameterization,
        initial,
        scale,
        hidden_size=settings.hidden_size,
        slot_dropout=settings.slot_dropout,
        nested=settings.nested,
        seed=settings.seed,
    )


class _DirectChange(nn.Module):
    """The change of several prefixes at one site, each value a parameter."""

    def __init__(self, num_slots: Mapping[PrefixKey, int], slot_size: int) -> None:
        super().__init__()
        self._index = {key: i for i, key in enumerate(num_slots)}
        self.values = nn.ParameterList(
            torch.zeros(count, slot_size) for count in num_slots.values()
        )

    def forward(self, keys: Sequence[PrefixKey]) -> dict[PrefixKey, Tensor]:
        return {key: self.values[self._index[key]] for key in keys if key in self._index}


class _NetworkChange(nn.Module):
    """The change of several prefixes at one site: embeddings through one or several networks."""

    def __init__(
        self,
        num_slots: Mapping[PrefixKey, int],
        name: ParameterizationName,
        geometry: Geometry,
        site: Site,
        hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._index = {key: i for i, key in enumerate(num_slots)}
        self._is_shared = name != "mlp"
        self.embeddings = nn.ParameterList()
        self.networks = nn.ModuleList()
        column_groups = _keys_and_values(geometry, site) if name == "shared-kv" else ()
        for count in num_slots.values():
            embeddings = torch.randn(count, hidden_size, generator=generator, device="cpu")
            self.embeddings.append(embeddings)
            if not (self._is_shared and self.networks):
                network = SlotNetwork(
                    hidden_size,
                    hidden_size,
                    geometry.slot_size(site),
                    column_groups=column_groups,
                    generator=generator,
                )
                self.networks.append(network)

    def forward(self, keys: Sequence[PrefixKey]) -> dict[PrefixKey, Tensor]:
        keys = [key for key in keys if key in self._index]
        if not keys:
            return {}
        embeddings = [self.embeddings[self._index[key]] for key in keys]
        if not self._is_shared:
            return {
                key: self.networks[self._index[key]](rows)
                for key, rows in zip(keys, embeddings, strict=True)
            }
        values = self.networks[0](torch.cat(embeddings))
        return dict(zip(keys, values.split([len(rows) for rows in embeddings]), strict=True))


def _keys_and_values(geometry: Geometry, site: Site) -> list[Tensor]:
    """Column indices of a slot that belong to keys, and those that belong to values."""
    columns = torch.arange(geometry.slot_size(site)).split(geometry.split_sizes(site))
    return [torch.cat(columns[0::2]), torch.cat(columns[1::2])]
