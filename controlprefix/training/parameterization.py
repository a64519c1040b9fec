"""How slots are produced while training.

Every parameterization gives `start + scale * change`: the start is that of each prefix (the
keys and values of a text, say), the scale the model's own (the size of its keys and values,
head by head), and the change is zero when training begins. So each starts exactly from a
text, networks too, with nothing to fit first; one learning rate serves models whose keys
differ in size; and weight decay pulls towards the start.

- `direct`: each number of the change is a parameter.
- `mlp`: a network for each prefix, from an embedding of each slot (Li & Liang, 2021,
  https://arxiv.org/abs/2101.00190).
- `shared`: one network a site, from embeddings of the slots of all prefixes, so that task
  and labels learn from each other (Control Prefixes, Clive et al., 2021,
  https://arxiv.org/abs/2110.08329).
- `shared-kv`: the same, with one network for the keys and one for the values. They read the
  same embedding of a slot: that tie between its key and its value is the shared structure of
  Le et al., "Revisiting Prefix-tuning", 2024, https://arxiv.org/abs/2410.02200. In `mlp` and
  `shared` key and value share the hidden layer too, and part at its last matrix.

The networks are dropped at the end: what is stored and served is a `Prefix`.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from controlprefix.errors import TrainingDataError
from controlprefix.prefixes.geometry import Geometry, Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.store import PrefixKey

ParameterizationName = Literal["direct", "mlp", "shared", "shared-kv"]


class LearnedSlots(nn.Module, ABC):
    """Prefixes while they are learned, in float32, as a function of its parameters.

    Attributes:
        keys: Whose prefixes.
    """

    keys: tuple[PrefixKey, ...]

    @abstractmethod
    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Prefixes as they stand, connected to the parameters; no others are computed.

        Args:
            keys: Which.
            seed: Of what is drawn while learning; None where nothing may be.
        """

    @abstractmethod
    def start_digest(self) -> str:
        """Of what they start from, so that a run is taken up only where it was begun."""

    def materialized(self) -> dict[PrefixKey, Prefix]:
        """All prefixes as they stand, as values of their own."""
        with torch.no_grad():
            return {
                key: Prefix(prefix.geometry, {s: t.clone() for s, t in prefix.slots.items()})
                for key, prefix in self.prefixes(self.keys, None).items()
            }

    def to_device(self, device: torch.device) -> Self:
        """Move all there is, parameters and what they change."""
        return self.to(device)


class Parameterization(LearnedSlots):
    """The slots of several prefixes, produced in one of the ways above.

    Args:
        name: Which.
        start: The prefixes as they begin, at least one.
        scale: For each site, the unit of change of a slot's numbers, `(slot_size,)`.
        width: Of the networks' embeddings and hidden layers.
        slot_dropout: Chance of each slot to be left out, where something may be drawn.
        freeze_first_slot: Each prefix's first slot stays as it begins (as in Eyuboglu et al.,
            "Cartridges", 2025, https://arxiv.org/abs/2506.06266).
        seed: Of the networks.
    """

    def __init__(
        self,
        name: ParameterizationName,
        start: Mapping[PrefixKey, Prefix],
        scale: Mapping[Site, Tensor],
        *,
        width: int = 512,
        slot_dropout: float = 0.0,
        freeze_first_slot: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.keys = tuple(start)
        self._slot_dropout = slot_dropout
        self._start = {key: prefix.to(dtype=torch.float32) for key, prefix in start.items()}
        self._num_frozen = int(freeze_first_slot)
        if freeze_first_slot and all(one.num_slots == 1 for one in start.values()):
            raise TrainingDataError(
                "the first slot stays as it begins, so there is nothing to learn in 1; give 2 "
                "slots or more"
            )
        self._geometry = next(iter(start.values())).geometry
        self._scale = {site: scale[site].float() for site in self._geometry.sites}
        generator = torch.Generator().manual_seed(seed)
        self.changes = nn.ModuleDict()
        for site in self._geometry.sites:
            counts = {k: len(prefix.slots[site]) - self._num_frozen for k, prefix in start.items()}
            counts = {key: count for key, count in counts.items() if count > 0}
            size = self._geometry.slot_size(site)
            columns = [torch.arange(size)]
            if name == "shared-kv":
                columns = _columns_of_keys_and_values(self._geometry, site)
            if name == "direct":
                self.changes[site] = _Direct(counts, size)
            elif name == "mlp":
                self.changes[site] = _OneEach(counts, columns, width, generator)
            else:
                self.changes[site] = _Networks(counts, columns, width, generator)

    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Prefixes as they stand; with a seed, some slots are left out where that is set."""
        wanted = [key for key in self._start if key in keys]
        slots: dict[PrefixKey, dict[Site, Tensor]] = {k: {**self._start[k].slots} for k in wanted}
        for site in self._geometry.sites:
            for key, change in self.changes[site](wanted).items():
                change = pad(change, (0, 0, self._num_frozen, 0))
                slots[key][site] = slots[key][site] + self._scale[site] * change
        found = {key: Prefix(self._geometry, slots[key]) for key in wanted}
        if seed is None or not self._slot_dropout:
            return found
        return {key: self._dropped(key, prefix, seed) for key, prefix in found.items()}

    def start_digest(self) -> str:
        """Of the starts."""
        sha = hashlib.sha256()
        for key, prefix in self._start.items():
            sha.update(f"{key} {prefix.digest}".encode())
        return sha.hexdigest()

    def to_device(self, device: torch.device) -> Self:
        """Move parameters, starts and scales."""
        self._start = {key: prefix.to(device=device) for key, prefix in self._start.items()}
        self._scale = {site: scale.to(device) for site, scale in self._scale.items()}
        return self.to(device)

    def _dropped(self, key: PrefixKey, prefix: Prefix, seed: int) -> Prefix:
        """Without some of its slots: a draw of its own, the same in every process."""
        own = random.Random(f"{seed}:{key.kind}:{key.name}").randrange(1 << 62)
        chance = torch.rand(prefix.num_slots, generator=torch.Generator().manual_seed(own))
        stays = chance >= self._slot_dropout
        stays[chance.argmax()] = True  # one at least
        return Prefix(
            prefix.geometry,
            {site: rows[stays[: len(rows)]] for site, rows in prefix.slots.items()},
        )


class _Direct(nn.Module):
    def __init__(self, counts: Mapping[PrefixKey, int], size: int) -> None:
        super().__init__()
        self._index = {key: i for i, key in enumerate(counts)}
        self.slots = nn.ParameterList(torch.zeros(count, size) for count in counts.values())

    def forward(self, keys: Sequence[PrefixKey]) -> dict[PrefixKey, Tensor]:
        return {key: self.slots[self._index[key]] for key in keys if key in self._index}


class _Networks(nn.Module):
    """Embedding of a slot -> linear, tanh, linear -> its numbers; one such for each group of them.

    Args:
        counts: Slots of each prefix.
        columns: The numbers of a slot, in groups.
        width, generator: Of the networks.
    """

    def __init__(
        self,
        counts: Mapping[PrefixKey, int],
        columns: Sequence[Tensor],
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._index = {key: i for i, key in enumerate(counts)}
        self._order = torch.argsort(torch.cat(list(columns)))
        self.embeddings = nn.ParameterList(
            torch.randn(count, width, generator=generator) for count in counts.values()
        )
        self.hidden, self.last = nn.ModuleList(), nn.ModuleList()
        for group in columns:
            hidden, last = nn.Linear(width, width), nn.Linear(width, len(group))
            with torch.no_grad():
                hidden.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
                for zero in (hidden.bias, last.weight, last.bias):
                    zero.zero_()
            self.hidden.append(hidden)
            self.last.append(last)

    def forward(self, keys: Sequence[PrefixKey]) -> dict[PrefixKey, Tensor]:
        chosen = [key for key in keys if key in self._index]
        if not chosen:
            return {}
        rows = [self.embeddings[self._index[key]] for key in chosen]
        embedded = torch.cat(rows)
        groups = [
            last(torch.tanh(hidden(embedded)))
            for hidden, last in zip(self.hidden, self.last, strict=True)
        ]
        numbers = groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)[:, self._order]
        return dict(zip(chosen, numbers.split([len(one) for one in rows]), strict=True))


class _OneEach(nn.Module):
    """A network of its own for each prefix."""

    def __init__(
        self,
        counts: Mapping[PrefixKey, int],
        columns: Sequence[Tensor],
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._index = {key: i for i, key in enumerate(counts)}
        self.networks = nn.ModuleList(
            _Networks({key: count}, columns, width, generator) for key, count in counts.items()
        )

    def forward(self, keys: Sequence[PrefixKey]) -> dict[PrefixKey, Tensor]:
        return {
            key: self.networks[self._index[key]]([key])[key] for key in keys if key in self._index
        }


def _columns_of_keys_and_values(geometry: Geometry, site: Site) -> list[Tensor]:
    """Which numbers of a slot belong to keys, and which to values."""
    pieces = torch.arange(geometry.slot_size(site)).split(geometry.split_sizes(site))
    return [torch.cat(pieces[0::2]), torch.cat(pieces[1::2])]
