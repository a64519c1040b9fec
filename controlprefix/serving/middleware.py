"""ASGI middleware: a limit on request bodies, and a count of responses."""

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlprefix.errors import RequestError
from controlprefix.serving.errors import error_response
from controlprefix.serving.openai import ErrorBody


class BodyLimit:
    """Answers 413 when more of a body is received than allowed.

    Args:
        app: The application behind it.
        max_bytes: The limit.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        num_received, has_started = 0, False

        async def counting_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise RequestError("the body is too large")
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal has_started
            if num_received > self._max_bytes and not has_started:
                return  # the application's response to the error above
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


class ResponseCounter:
    """Counts responses by path and status.

    Args:
        app: The application behind it.
        counter: With the labels path and status.
    """

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._counter.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting_send)
