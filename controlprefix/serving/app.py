"""The ASGI application."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from controlprefix import __version__
from controlprefix.serving.errors import add_error_handlers
from controlprefix.serving.middleware import BodyLimit, ResponseCounter, ServedHosts
from controlprefix.serving.routes import completions, models, operations, users
from controlprefix.serving.server import Server


def create_app(server: Server) -> FastAPI:
    """The ASGI application of a server; on shutdown the server finishes its requests.

    Args:
        server: The server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(server.close)

    app = FastAPI(
        title="controlprefix",
        version=__version__,
        description=(
            "OpenAI's API for one frozen model. The `model` field may contain a task "
            "(`model/task`), `user` selects a user's prefix, and `attributes`, `strengths` and "
            "the other steering fields go beside OpenAI's fields."
        ),
        lifespan=lifespan,
    )
    app.state.server = server
    app.add_middleware(ResponseCounter, counter=server.metrics.requests)
    limits = server.limits
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    if server.is_open:
        app.add_middleware(ServedHosts, names=server.allowed_hosts)
    add_error_handlers(app)
    for module in (completions, models, users, operations):
        app.include_router(module.router)
    return app
