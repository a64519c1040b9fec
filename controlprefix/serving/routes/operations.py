"""Routes for operators: health, readiness, metrics; and the playground page."""

import html
from importlib import resources
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from controlprefix import __version__
from controlprefix.serving.dependencies import ServerDependency

router = APIRouter(tags=["operations"])

_LINKS = {
    "/playground": "a page to try users, labels and strengths",
    "/docs": "the documentation of the API",
    "/openapi.json": "its schema",
    "/health": "whether the process runs",
    "/ready": "whether it can serve requests",
    "/metrics": "metrics for Prometheus",
    "/version": "what runs here",
}


class ServerVersion(BaseModel):
    """What runs here."""

    version: str
    model: str
    fingerprint: str


class Status(BaseModel):
    """A status."""

    status: str


@router.get("/health")
async def health() -> Status:
    """Whether the process runs."""
    return Status(status="ok")


@router.get("/ready")
async def ready(server: ServerDependency) -> Status:
    """Whether requests can be served: engine and store answer; otherwise 503."""
    await server.work_pools.run_with_store(server.check_health)
    return Status(status="ready")


@router.get("/version")
async def get_version(server: ServerDependency) -> ServerVersion:
    """The version of controlprefix, and the name and fingerprint of the model."""
    return ServerVersion(version=__version__, model=server.name, fingerprint=server.fingerprint)


@router.get("/", include_in_schema=False)
async def index(server: ServerDependency) -> HTMLResponse:
    """Links to the page, the documentation of the API, and what operators need."""
    links = "".join(
        f'<li><a href="{path}">{path}</a> {about}</li>' for path, about in _LINKS.items()
    )
    name = html.escape(server.name)
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<h1>{name}</h1><p>OpenAI's API is at <code>/v1</code>.</p><ul>{links}</ul></html>"
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(server: ServerDependency) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/playground", include_in_schema=False)
async def playground() -> Response:
    """The playground page."""
    return Response(_playground_file("index.html"), media_type="text/html; charset=utf-8")


@router.get("/playground/{name}", include_in_schema=False)
async def playground_script(name: Literal["compare.js", "users.js"]) -> Response:
    """A script of the playground."""
    return Response(_playground_file(name), media_type="text/javascript; charset=utf-8")


def _playground_file(name: str) -> bytes:
    return resources.files("controlprefix.serving").joinpath("playground", name).read_bytes()
