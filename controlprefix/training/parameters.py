"""How prefixes are produced while training: directly, each number of a slot a parameter."""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from torch import Tensor, nn

from controlprefix.geometry import Geometry, Site
from controlprefix.prefix import Prefix

Key = TypeVar("Key", bound=Hashable)


class DirectSlots(nn.Module, Generic[Key]):
    """The slots of several prefixes as parameters, in float32.

    Args:
        start: For each prefix to learn, its slots at the start.
    """

    def __init__(self, start: Mapping[Key, Prefix]) -> None:
        super().__init__()
        self._geometry: dict[Key, Geometry] = {}
        self._index: dict[Key, dict[Site, int]] = {}
        self.slots = nn.ParameterList()
        for name, prefix in start.items():
            self._geometry[name] = prefix.geometry
            self._index[name] = {}
            for site, rows in prefix.slots.items():
                if len(rows):
                    self._index[name][site] = len(self.slots)
                    self.slots.append(nn.Parameter(rows.detach().clone().float()))

    def prefixes(self) -> dict[Key, Prefix]:
        """The prefixes as they stand, connected to the parameters."""
        return {
            name: Prefix(self._geometry[name], {site: self.slots[i] for site, i in index.items()})
            for name, index in self._index.items()
        }

    def materialized(self) -> dict[Key, Prefix]:
        """The prefixes as they stand, as values of their own."""

        def own(rows: Tensor) -> Tensor:
            return rows.detach().clone()

        return {
            name: Prefix(prefix.geometry, {site: own(rows) for site, rows in prefix.slots.items()})
            for name, prefix in self.prefixes().items()
        }
