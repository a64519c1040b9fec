"""The ASGI application."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from controlprefix import __version__
from controlprefix.errors import StoreError
from controlprefix.serving.errors import add_error_handlers
from controlprefix.serving.middleware import BodyLimit, RequestLog, ServedHosts
from controlprefix.serving.openai import ErrorResponse
from controlprefix.serving.routes import (
    completions,
    feedback,
    jobs,
    models,
    operations,
    prefixes,
    users,
)
from controlprefix.serving.server import Server

_FORGET_INTERVAL_S = 10.0
_log = logging.getLogger(__name__)
_DESCRIPTION = (
    "OpenAI's API for one frozen model. The `model` field may contain a task (`model/task`), "
    "`user` selects a user's prefix, and `attributes`, `strengths` and the other steering fields "
    "go beside OpenAI's fields."
)
_ERRORS = {
    400: "The request cannot be carried out as written.",
    401: "The API key is missing, unknown or revoked.",
    404: "There is no such model, task, label or user.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    421: "A server without API keys is not known by this host name.",
    429: "A rate limit was reached: requests or tokens of an API key, wrong keys of an address, or "
    "large bodies of a tenant.",
    500: "The server failed.",
    503: "The server is overloaded, is shutting down, or cannot reach its store or engine.",
    504: "The request took too long.",
}


def create_app(server: Server, *, allow_origins: Sequence[str] = ()) -> FastAPI:
    """The ASGI application of a server; on shutdown the server finishes its requests.

    Args:
        server: The server.
        allow_origins: Origins such as `https://app.example.com` whose pages may call it from a
            browser; `*` is any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dropping = asyncio.create_task(_drop_forgotten(server))
        yield
        dropping.cancel()
        await run_in_threadpool(server.close)

    app: FastAPI = FastAPIOffline(  # its pages need no other server
        title="controlprefix",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        responses={
            status: {"model": ErrorResponse, "description": description}
            for status, description in _ERRORS.items()
        },
    )
    app.state.server = server
    limits = server.limits
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    if server.is_open:
        app.add_middleware(ServedHosts, names=server.allowed_hosts)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    # Last, so that it is outermost and sees what the others answer.
    app.add_middleware(RequestLog, counter=server.metrics.requests)
    add_error_handlers(app)
    for module in (completions, models, users, feedback, jobs, prefixes, operations):
        app.include_router(module.router)
    _trim_schema(app, server)
    return app


async def _drop_forgotten(server: Server) -> None:
    """Look for what other processes removed, as long as the server runs."""
    while True:
        await asyncio.sleep(_FORGET_INTERVAL_S)
        try:
            await server.work_pools.run_with_store(server.drop_forgotten)
        except StoreError as error:
            _log.warning("forgotten users could not be dropped, trying again: %s", error)


def _trim_schema(app: FastAPI, server: Server) -> None:
    """Leave out of the schema what FastAPI adds and this server does not do."""
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make_schema()
        for operations_of_path in schema["paths"].values():
            for operation in operations_of_path.values():
                operation["responses"].pop("422", None)  # a wrong body is answered 400
                if server.is_open:
                    operation.pop("security", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
