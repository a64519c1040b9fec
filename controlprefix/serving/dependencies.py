"""Routes of authenticated clients, and FastAPI dependencies: the server, and the client."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from controlprefix.errors import RequestError
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

_bearer = HTTPBearer(auto_error=False, description="An API key of a tenant.")


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDependency = Annotated[Server, Depends(_server)]


class TenantRoute(APIRoute):
    """A route that authenticates the client before it reads the body, and refuses other queries."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        handle = super().get_route_handler()
        parameters = {field.alias for field in self.dependant.query_params}

        async def handle_authenticated(request: Request) -> Response:
            server = _server(request)
            credentials = await _bearer(request)
            api_key = credentials.credentials if credentials else None
            address = request.client.host if request.client else ""
            client = await server.work_pools.run_with_store(server.authenticate, api_key, address)
            request.state.client = client
            request.state.report = {"tenant": client.tenant, "api_key": client.key_name}
            if unknown := sorted(request.query_params.keys() - parameters):
                allowed = ", ".join(sorted(parameters)) or "none"
                raise RequestError(
                    f"unknown query parameter {unknown[0][:100]!r}; this route has: {allowed}"
                )
            await server.large_bodies.parse(request, client.tenant)
            return await handle(request)

        return handle_authenticated


async def _client(
    request: Request,
    _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],  # for the API's schema
) -> Client:
    client: Client = request.state.client
    return client


ClientDependency = Annotated[Client, Depends(_client)]
