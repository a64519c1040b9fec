"""HTTP connections for uvicorn that are closed when they are idle for long, or too many."""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from controlprefix.serving.settings import ServerLimits

_MAX_HEAD_BYTES = 32 << 10
_GRACE_S = 5.0  # beyond a request's own time limit


def connection_class(limits: ServerLimits) -> type[H11Protocol]:
    """The class of a server's connections; uvicorn's own waits for a request without limit."""

    class LimitedConnection(H11Protocol):
        """One connection."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Begin to wait for a request, and close others that do if there are many."""
            super().connection_made(transport)
            self._timer = self.loop.call_later(limits.header_timeout_s, self._close_if_idle)
            num_surplus = len(self.connections) - limits.max_connections
            if num_surplus > 0:
                others: Any = [c for c in self.connections if c is not self]
                idle = [connection for connection in others if connection.is_idle]
                for connection in idle[:num_surplus]:
                    connection.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop waiting."""
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        @property
        def is_idle(self) -> bool:
            """Whether no request is being received or answered."""
            return self.cycle is None or self.cycle.response_complete

        def _close_if_idle(self) -> None:
            if self.is_idle:
                self.transport.close()
            else:
                self._timer = self.loop.call_later(limits.header_timeout_s, self._close_if_idle)

    return LimitedConnection


def config_for(app: FastAPI, *, host: str, port: int, limits: ServerLimits) -> uvicorn.Config:
    """uvicorn's settings, with limits on connections.

    On SIGTERM or SIGINT the server accepts no more requests, and ends when those under way are
    answered or have used up their time.

    Args:
        app: The application.
        host, port: Where to listen.
        limits: Of connections.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        http=connection_class(limits),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        timeout_keep_alive=int(limits.header_timeout_s),
        timeout_graceful_shutdown=int(limits.timeout_s + _GRACE_S),
    )
