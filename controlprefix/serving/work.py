"""Threads of the server: for the store, for enrolments, and for other work with the model."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from controlprefix.errors import OverloadedError

Result = TypeVar("Result")

_STORE_THREADS = 16
_ENROLMENT_THREADS = 2
_MODEL_THREADS = 2
_MAX_MODEL_WORK = 64  # of a tenant


class WorkPools:
    """Runs blocking work in threads, so that one tenant's never keeps another's from starting.

    Enrolments, and other work with the model (prefixes from texts, relevance, classification,
    log-probabilities of prompts), have few threads each, one at a time per tenant.
    Authentication, look-ups and `/ready` have others.

    Args:
        max_enrolments: Enrolments that a tenant may have, those that wait included.
    """

    def __init__(self, max_enrolments: int) -> None:
        self._store = CapacityLimiter(_STORE_THREADS)
        self._enrolments = _TenantPool("enrolments", _ENROLMENT_THREADS, max_enrolments)
        self._model = _TenantPool(
            "requests with when, unseen, echo or texts to classify", _MODEL_THREADS, _MAX_MODEL_WORK
        )

    async def with_store(self, work: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run work that queries the store, and does not compute with the model."""
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._store)

    async def enroll(
        self, tenant: str, work: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """Run an enrolment, which may train.

        Raises:
            OverloadedError: If the tenant has too many of them already.
        """
        return await self._enrolments.run(tenant, partial(work, *args, **kwargs))

    async def with_model(
        self, tenant: str, work: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """Run other work that computes with the model.

        Raises:
            OverloadedError: If the tenant has too much of it already.
        """
        return await self._model.run(tenant, partial(work, *args, **kwargs))


class _TenantPool:
    """A few threads; a tenant gets one at a time.

    Args:
        what: What they do, in the error.
        num_threads: Threads, for all tenants together.
        max_per_tenant: Pieces of work of a tenant, those that wait included.
    """

    def __init__(self, what: str, num_threads: int, max_per_tenant: int) -> None:
        self._what, self._max_per_tenant = what, max_per_tenant
        self._threads = CapacityLimiter(num_threads)
        self._by_tenant: dict[str, CapacityLimiter] = {}
        self._counts: Counter[str] = Counter()

    async def run(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Run work when it is the tenant's turn.

        Raises:
            OverloadedError: If the tenant has too much of it already.
        """
        with self._counted(tenant):
            async with self._by_tenant.setdefault(tenant, CapacityLimiter(1)):
                return await to_thread.run_sync(work, limiter=self._threads)

    @contextlib.contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        if self._counts[tenant] >= self._max_per_tenant:
            raise OverloadedError(
                f"{self._counts[tenant]} {self._what} of this tenant are under way or waiting; try "
                "again later"
            )
        self._counts[tenant] += 1
        try:
            yield
        finally:
            self._counts[tenant] -= 1
            if not self._counts[tenant]:
                del self._counts[tenant]
                self._by_tenant.pop(tenant, None)
