"""ASGI middleware: limits on request bodies, hosts that are served, and a count of responses."""

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Collection
from datetime import UTC, datetime

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlprefix.errors import RequestError
from controlprefix.serving.errors import error_response
from controlprefix.serving.openai import ErrorBody

_request_log = logging.getLogger("controlprefix.requests")


class BodyLimit:
    """Answers 413 when more of a body is received than allowed, and 408 when it takes too long.

    Args:
        app: The application behind it.
        max_bytes: The limit.
        timeout_s: Seconds from the head of a request to the end of its body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        num_received, has_started, is_whole, is_late = 0, False, False, False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s

        async def counting_receive() -> Message:
            nonlocal num_received, is_whole, is_late
            if is_whole:  # from here on it waits for the client to disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except TimeoutError:
                is_late = True
                raise RequestError("the body did not arrive in time") from None
            is_whole = not message.get("more_body", False)
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise RequestError("the body is too large")
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal has_started
            if (is_late or num_received > self._max_bytes) and not has_started:
                return  # the application's response to the errors above
            has_started = True
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, counting_receive, guarded_send)
        if num_received > self._max_bytes and not has_started:
            error = ErrorBody(
                message=f"the body is larger than {self._max_bytes:,} bytes",
                type="invalid_request_error",
                code="body_too_large",
            )
            await error_response(413, error)(scope, receive, send)
        elif is_late and not has_started:
            error = ErrorBody(
                message=f"the body did not arrive within {self._timeout_s:.0f} s",
                type="invalid_request_error",
                code="timeout",
            )
            await error_response(408, error, Connection="close")(scope, receive, send)


class ServedHosts:
    """Answers only requests for known hosts, so that a page cannot reach a server without keys.

    By DNS rebinding a page of another site would send requests here under its own name. IP
    addresses and `localhost` cannot be rebound.

    Args:
        app: The application behind it.
        names: Further host names.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and not self._is_served(Headers(scope=scope).get("host", "")):
            error = ErrorBody(
                message="this server without API keys is not known by that host name; allow it "
                "with --allow-host",
                type="invalid_request_error",
                code="unknown_host",
            )
            await error_response(421, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_served(self, host: str) -> bool:
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


class RequestLog:
    """Counts responses by path and status, and logs a line of JSON for each request.

    A line never contains texts or users.

    Args:
        app: The application behind it.
        counter: With the labels path and status.
    """

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._counter.labels(_path(scope), str(status)).inc()
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            if not status:  # it is answered outside of this middleware
                status = 500
                self._counter.labels(_path(scope), str(status)).inc()
            raise
        finally:
            if _request_log.isEnabledFor(logging.INFO):
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "method": scope["method"],
                    "path": _path(scope),
                    "status": status,
                    "seconds": round(time.monotonic() - started, 3),
                    **scope.get("state", {}).get("report", {}),
                }
                _request_log.info("%s", json.dumps(line))


def _path(scope: Scope) -> str:
    """The path of the route, in which a user stands as `{user}`."""
    return getattr(scope.get("route"), "path", "other")
