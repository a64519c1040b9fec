"""Threads of the server: some for the store, a few for work with the model outside the batch."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from controlprefix.errors import OverloadedError

Result = TypeVar("Result")

_STORE_THREADS = 16
_MODEL_THREADS = 2


class WorkPools:
    """Runs blocking work in threads, so that one tenant's never keeps another's from starting.

    Work with the model (enrolment, prefixes from texts, classification) has few threads of its
    own, one at a time per tenant. Authentication, look-ups and `/ready` have others.

    Args:
        max_model_work: Pieces of work with the model that a tenant may have, those that wait
            included.
    """

    def __init__(self, max_model_work: int) -> None:
        self._max_model_work = max_model_work
        self._store = CapacityLimiter(_STORE_THREADS)
        self._model = CapacityLimiter(_MODEL_THREADS)
        self._of_tenant: dict[str, CapacityLimiter] = {}
        self._num_of_tenant: Counter[str] = Counter()

    async def with_store(self, work: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run work that queries the store, and does not compute with the model."""
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._store)

    async def with_model(
        self, tenant: str, work: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """Run work that computes with the model.

        Raises:
            OverloadedError: If the tenant has too much of it already.
        """
        with self._counted(tenant):
            async with self._of_tenant.setdefault(tenant, CapacityLimiter(1)):
                return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._model)

    @contextlib.contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        if self._num_of_tenant[tenant] >= self._max_model_work:
            raise OverloadedError(
                f"{self._num_of_tenant[tenant]} enrolments or other work with the model are under "
                "way for this tenant; try again later"
            )
        self._num_of_tenant[tenant] += 1
        try:
            yield
        finally:
            self._num_of_tenant[tenant] -= 1
            if not self._num_of_tenant[tenant]:
                del self._num_of_tenant[tenant]
                self._of_tenant.pop(tenant, None)
