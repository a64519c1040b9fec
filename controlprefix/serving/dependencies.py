"""FastAPI dependencies: the server, and the authenticated client."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

_bearer = HTTPBearer(auto_error=False, description="An API key of a tenant.")


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDependency = Annotated[Server, Depends(_server)]


async def _client(
    request: Request,
    server: ServerDependency,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Client:
    api_key = credentials.credentials if credentials else None
    address = request.client.host if request.client else ""
    client = await server.work.with_store(server.authenticate, api_key, address)
    request.state.report = {"tenant": client.tenant, "api_key": client.key_name}
    return client


ClientDependency = Annotated[Client, Depends(_client)]
