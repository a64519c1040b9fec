"""Routes for operators: health, readiness, metrics; and the playground page."""

from importlib import resources

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from controlprefix.serving.dependencies import ServerDependency

router = APIRouter(tags=["operations"])


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
    await server.work.with_store(server.check_health)
    return Status(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(server: ServerDependency) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/playground", include_in_schema=False)
async def playground() -> Response:
    """The playground page."""
    page = resources.files("controlprefix.serving").joinpath("playground.html")
    return Response(page.read_bytes(), media_type="text/html; charset=utf-8")
