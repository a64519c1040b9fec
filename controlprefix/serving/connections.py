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
        _write_timer: asyncio.TimerHandle | None = None
        idle_since = 0.0  # when it began to wait for a request

        def connection_made(self, transport: Any) -> None:
            """Begin to wait for a request, and close others that do if there are many."""
            super().connection_made(transport)
            self.idle_since = self.loop.time()
            self._timer = self.loop.call_later(limits.header_timeout_s, self._close_if_idle)
            num_surplus = len(self.connections) - limits.max_connections
            if num_surplus <= 0:
                return
            # The oldest: a client that has just connected is about to send its request.
            others: list[Any] = [other for other in self.connections if other is not self]
            waiting = [other for other in others if other.is_idle]
            idle = sorted(waiting, key=lambda connection: connection.idle_since)
            for connection in idle[:num_surplus]:
                connection.transport.abort()
            if len(idle) < num_surplus:  # all others are being answered
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop waiting."""
            for timer in (self._timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            """Begin to wait for the next request."""
            self.idle_since = self.loop.time()
            super().on_response_complete()

        def pause_writing(self) -> None:
            """Wait for the client to read, for some time."""
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.body_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            """The client has read."""
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        @property
        def is_idle(self) -> bool:
            """Whether no request is being received or answered."""
            return self.cycle is None or self.cycle.response_complete

        def _close_if_idle(self) -> None:
            left_s = self.idle_since + limits.header_timeout_s - self.loop.time()
            if not self.is_idle:
                left_s = limits.header_timeout_s
            if left_s > 0:
                self._timer = self.loop.call_later(left_s, self._close_if_idle)
            else:
                self.transport.close()

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
