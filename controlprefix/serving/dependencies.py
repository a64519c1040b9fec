"""FastAPI dependencies: the server, and the authenticated client."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

_bearer = HTTPBearer(auto_error=False, description="An API key of a tenant.")


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDependency = Annotated[Server, Depends(_server)]


async def _client(
    server: ServerDependency,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Client:
    api_key = credentials.credentials if credentials else None
    return await run_in_threadpool(server.authenticate, api_key)


ClientDependency = Annotated[Client, Depends(_client)]
