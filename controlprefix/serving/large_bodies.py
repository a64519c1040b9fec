"""Large request bodies are parsed one at a time per tenant."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from cachetools import TTLCache
from starlette.requests import ClientDisconnect, Request

from controlprefix.errors import RateLimitError

_LARGE_BYTES = 64 << 10
_MAX_PARSING_SHARE = 0.1  # of the time
_MAX_PAUSE_S = 5.0
_MAX_WAITING = 32
_MAX_TENANTS = 10_000
_KEEP_S = 60.0  # longer than any pause


@dataclass(slots=True)
class _Turns:
    """The large bodies of one tenant."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_waiting: int = 0
    free_at: float = 0.0  # when the next one may be parsed


class LargeBodies:
    """Parses the large bodies of each tenant one after another, with pauses between them.

    Parsing JSON holds Python's global lock, which decoding needs between any two operations; the
    pauses leave the others nine tenths of the time.
    """

    def __init__(self) -> None:
        self._turns: TTLCache[str, _Turns] = TTLCache(_MAX_TENANTS, _KEEP_S)

    async def parse(self, request: Request, tenant: str) -> None:
        """Have a request parse its body when it is the tenant's turn; it keeps the result.

        Args:
            request: A small body is left to the route.
            tenant: Who sent it.

        Raises:
            RateLimitError: If too many large bodies of the tenant wait.
        """
        if not _may_be_large(request):
            return
        turns = self._turns[tenant] = self._turns.get(tenant) or _Turns()  # for another while
        if turns.num_waiting >= _MAX_WAITING:
            raise RateLimitError(
                f"{turns.num_waiting} requests of more than {_LARGE_BYTES >> 10} KiB wait to be "
                "read for this tenant; send fewer at a time",
                1.0,
            )
        turns.num_waiting += 1
        try:
            with contextlib.suppress(ClientDisconnect):  # the route notices it too
                if len(await request.body()) > _LARGE_BYTES:
                    async with turns.lock:
                        await asyncio.sleep(turns.free_at - time.monotonic())
                        await _parse(request, turns)
        finally:
            turns.num_waiting -= 1
            self._turns[tenant] = turns  # for another while


async def _parse(request: Request, turns: _Turns) -> None:
    started = time.monotonic()
    with contextlib.suppress(ValueError, RecursionError):  # the route reports them
        await request.json()
    end = time.monotonic()
    pause_s = (end - started) * (1 / _MAX_PARSING_SHARE - 1)
    turns.free_at = end + min(_MAX_PAUSE_S, pause_s)


def _may_be_large(request: Request) -> bool:
    """Whether a request declares a large body, or none."""
    size = request.headers.get("content-length", "")
    return "transfer-encoding" in request.headers or (size.isdigit() and int(size) > _LARGE_BYTES)
