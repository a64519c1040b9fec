"""The waiting queue of a batcher: tenants take turns by tokens, in order within each tenant."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_MAX_PASSED = 64  # items that may pass one that needs more rows than are free
_MAX_LOOKED_AT = 16  # items of a tenant that are tried in place of its first


@dataclass(slots=True)
class _Queue(Generic[Item]):
    items: deque[Item] = field(default_factory=deque)
    served: float = 0.0  # tokens taken so far, or as many as others had when it was last empty
    num_passed: int = 0  # items taken before its first one, which did not fit


class WaitingQueue(Generic[Item]):
    """A queue per tenant; the tenant that was served the fewest tokens is next.

    Args:
        num_rows: Rows that an item needs.
        num_tokens: Tokens that an item may take.

    Reference:
        Start-time fair queueing: Goyal et al., SIGCOMM 1996. For language models: Sheng et al.,
        "Fairness in Serving Large Language Models", 2024, https://arxiv.org/abs/2401.00588.
    """

    def __init__(
        self, num_rows: Callable[[Item], int], num_tokens: Callable[[Item], float]
    ) -> None:
        self._num_rows, self._num_tokens = num_rows, num_tokens
        self._queues: dict[str, _Queue[Item]] = {}
        self._num_items = 0  # read by threads that do not hold the owner's lock
        self._clock = 0.0  # virtual time: `served` of the tenant taken last, before that

    def __len__(self) -> int:
        return self._num_items

    @property
    def num_rows(self) -> int:
        """Rows that all items need."""
        return sum(self._num_rows(item) for q in self._queues.values() for item in q.items)

    def num_waiting(self, tenant: str) -> int:
        """Items of a tenant that wait."""
        queue = self._queues.get(tenant)
        return len(queue.items) if queue else 0

    @property
    def tenants(self) -> list[str]:
        """Those that have something waiting."""
        return [tenant for tenant, queue in self._queues.items() if queue.items]

    def add(self, tenant: str, item: Item) -> None:
        """Put an item at the end of its tenant's queue."""
        queue = self._queues.setdefault(tenant, _Queue())
        if not queue.items:  # idle tenants accumulate no credit
            queue.served = max(queue.served, self._clock)
        queue.items.append(item)
        self._num_items += 1

    def take(self, free_rows: int, quotas: Mapping[str, int]) -> Item | None:
        """Remove the next item that fits.

        Args:
            free_rows: Rows that are free.
            quotas: Per tenant, the rows that it may take beside those that it has.

        Returns:
            None if nothing fits, or if an item that does not fit was passed by many others.
        """
        passed: list[_Queue[Item]] = []
        for tenant in sorted(self.tenants, key=self.served):
            queue, quota = self._queues[tenant], quotas[tenant]
            fitting = next(
                (
                    i
                    for i, item in enumerate(itertools.islice(queue.items, _MAX_LOOKED_AT))
                    if self._num_rows(item) <= min(free_rows, quota)
                ),
                None,
            )
            if fitting != 0:
                if queue.num_passed >= _MAX_PASSED:
                    if self._num_rows(queue.items[0]) <= quota:
                        return None  # the rows that become free are kept for it
                    fitting = None  # it waits for rows of its own tenant, which get no more
                passed.append(queue)
            if fitting is not None:
                return self._taken(queue, fitting, passed)
        return None

    def _taken(self, queue: _Queue[Item], index: int, passed: Iterable[_Queue[Item]]) -> Item:
        item = queue.items[index]
        del queue.items[index]
        self._num_items -= 1
        if index == 0:
            queue.num_passed = 0
        for other in passed:
            other.num_passed += 1
        self._clock = max(self._clock, queue.served)
        queue.served += self._num_tokens(item)
        self._forget_idle()
        return item

    def served(self, tenant: str) -> float:
        """Tokens that a tenant was served; comparable between tenants."""
        queue = self._queues.get(tenant)
        return queue.served if queue else self._clock

    def remove(self, condition: Callable[[Item], bool]) -> list[Item]:
        """Remove the items that satisfy a condition, and return them."""
        removed: list[Item] = []
        for queue in self._queues.values():
            if matching := [item for item in queue.items if condition(item)]:
                removed += matching
                self._num_items -= len(matching)
                queue.items = deque(item for item in queue.items if item not in matching)
        return removed

    def _forget_idle(self) -> None:
        """Forget tenants that have nothing waiting and no more than others were served."""
        idle = [
            tenant
            for tenant, queue in self._queues.items()
            if not queue.items and queue.served <= self._clock
        ]
        for tenant in idle:
            del self._queues[tenant]
