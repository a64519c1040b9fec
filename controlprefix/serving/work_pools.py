"""Threads of the server: for the store, for enrolments, and for other work with the model."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from controlprefix.cancellation import stoppable
from controlprefix.errors import (
    ClientDisconnectedError,
    OverloadedError,
    RequestTimeoutError,
    TrainingInterrupted,
)

Result = TypeVar("Result")

_STORE_THREADS = 16
_ENROLMENT_THREADS = 2
_MODEL_THREADS = 2
_TOKENIZING_THREADS = 4
_MAX_TOKENIZED = 1024  # requests of a tenant
_MAX_MODEL_WORK = 64  # of a tenant


class WorkPools:
    """Runs blocking work in threads; work of one tenant never keeps that of another waiting.

    Enrolments, and other work with the model (prefixes from texts, relevance, classification,
    log-probabilities of prompts), have few threads each, one at a time per tenant.
    Authentication, look-ups and `/ready` have others, and so has the tokenizing of prompts.

    Args:
        max_enrolments: Enrolments that a tenant may have, those that wait included.
        timeout_s: Seconds that a piece of work with the model may take, its wait included.
    """

    def __init__(self, max_enrolments: int, timeout_s: float) -> None:
        self._store = CapacityLimiter(_STORE_THREADS)
        self._enrolments = _TenantPool("enrolments", _ENROLMENT_THREADS, max_enrolments, timeout_s)
        what = "requests with when, unseen, echo or texts to classify"
        self._model = _TenantPool(what, _MODEL_THREADS, _MAX_MODEL_WORK, timeout_s)
        self._tokenizing = _TenantPool("requests", _TOKENIZING_THREADS, _MAX_TOKENIZED, timeout_s)

    def stop(self) -> None:
        """Stop what trains or reads prompts; the threads end at their next step."""
        for pool in (self._enrolments, self._model, self._tokenizing):
            pool.stop()

    async def run_with_store(
        self, work: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """Run work that queries the store, and does not compute with the model."""
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._store)

    async def run_tokenizing(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Run work that tokenizes a prompt, or compiles a JSON schema.

        Raises:
            OverloadedError: If the tenant has too much of it already.
        """
        return await self._tokenizing.run(tenant, work)

    async def run_enrolment(
        self, tenant: str, work: Callable[[], Result], *, disconnect_task: "asyncio.Task[None]"
    ) -> Result:
        """Run an enrolment, which may train.

        Args:
            tenant: Whose it is.
            work: The enrolment.
            disconnect_task: Done when the client has disconnected; then the enrolment stops.

        Raises:
            OverloadedError: If the tenant has too many of them already.
            RequestTimeoutError, ClientDisconnectedError: If it was stopped.
        """
        return await self._enrolments.run(tenant, work, disconnect_task)

    async def run_with_model(
        self,
        tenant: str,
        work: Callable[[], Result],
        *,
        disconnect_task: "asyncio.Task[None] | None" = None,
    ) -> Result:
        """Run other work that computes with the model: see `run_enrolment`."""
        return await self._model.run(tenant, work, disconnect_task)


class _TenantPool:
    """A few threads; a tenant gets one at a time.

    Args:
        what: What they do, in the error.
        timeout_s: See `WorkPools`.
        num_threads: Threads, for all tenants together.
        max_per_tenant: Pieces of work of a tenant, those that wait included.
    """

    def __init__(self, what: str, num_threads: int, max_per_tenant: int, timeout_s: float) -> None:
        self._what, self._max_per_tenant, self._timeout_s = what, max_per_tenant, timeout_s
        self._running: set[threading.Event] = set()  # each stops a piece of work
        self._is_stopped = False
        self._threads = CapacityLimiter(num_threads)
        self._by_tenant: dict[str, CapacityLimiter] = {}
        self._counts: Counter[str] = Counter()

    def stop(self) -> None:
        """Stop all work at its next step."""
        self._is_stopped = True
        for event in list(self._running):
            event.set()

    async def run(
        self,
        tenant: str,
        work: Callable[[], Result],
        disconnect_task: "asyncio.Task[None] | None" = None,
    ) -> Result:
        """Run work when it is the tenant's turn.

        It is not waited for beyond its time, or when the client is gone; then it stops at its
        next step, and keeps its thread until that.

        Raises:
            OverloadedError: If the tenant has too much of it already, or the process shuts down.
            RequestTimeoutError, ClientDisconnectedError: If it was not waited for.
        """
        stop = threading.Event()
        task = asyncio.create_task(self._hold(tenant, work, stop))
        ends = {task} if disconnect_task is None else {task, disconnect_task}
        try:
            await asyncio.wait(ends, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            if not task.done():
                stop.set()
                task.add_done_callback(_ignore_result)
        if disconnect_task is not None and disconnect_task.done():
            raise ClientDisconnectedError("the client has disconnected")
        raise RequestTimeoutError(f"not finished within {self._timeout_s:.0f} s")

    async def _hold(self, tenant: str, work: Callable[[], Result], stop: threading.Event) -> Result:
        """Run work in a thread, and hold the tenant's turn as long as the thread runs."""

        def stopping_work() -> Result:
            try:
                with stoppable(stop.is_set):
                    return work()
            except TrainingInterrupted:  # an interrupt would end the event loop
                raise self._stopped() from None

        with self._counted(tenant):
            async with self._by_tenant.setdefault(tenant, CapacityLimiter(1)):
                if stop.is_set() or self._is_stopped:
                    raise self._stopped()
                self._running.add(stop)
                try:
                    return await to_thread.run_sync(stopping_work, limiter=self._threads)
                finally:
                    self._running.discard(stop)

    def _stopped(self) -> OverloadedError | RequestTimeoutError:
        if self._is_stopped:
            return OverloadedError("this process is shutting down; send the request again")
        return RequestTimeoutError(f"not finished within {self._timeout_s:.0f} s")

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


def _ignore_result(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # else asyncio warns that nobody asked for it


async def disconnection(request: Request) -> None:
    """Wait until the client of a request whose body was read disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
