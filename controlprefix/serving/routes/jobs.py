"""Routes of jobs: training that was accepted and is done in the background."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, TypeAdapter
from sse_starlette import EventSourceResponse

from controlprefix.errors import ControlPrefixError, InternalServerError, OverloadedError
from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.errors import error_body
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client
from controlprefix.store import Job, JobKind

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=TenantRoute)

_POLL_S = 0.5
_MAX_WATCHERS = 16  # streams of a tenant
_JSON = TypeAdapter(Job)


class JobList(BaseModel):
    """Jobs, the newest first."""

    jobs: list[Job]


async def queue_job(
    kind: JobKind,
    user: str,
    options: dict[str, Any],
    response: Response,
    client: Client,
    server: Server,
    *,
    texts: Sequence[str] = (),
) -> Job:
    """Queue a job, and answer with where to look for it; texts are kept with it."""
    job = await server.work_pools.run_with_store(
        client.cp.store.add_job, kind, user, options, server.fingerprint, texts
    )
    server.wake_worker()
    response.status_code = 202
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("")
async def list_jobs(
    client: ClientDependency,
    server: ServerDependency,
    user: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JobList:
    """The tenant's jobs, the newest first, of one user if it is named."""
    jobs = await server.work_pools.run_with_store(client.cp.store.jobs, user=user, limit=limit)
    return JobList(jobs=jobs)


@router.get("/{job_id}")
async def get_job(job_id: str, client: ClientDependency, server: ServerDependency) -> Job:
    """A job; 404 if there is none, as after its user was forgotten."""
    return await server.work_pools.run_with_store(client.cp.store.job, job_id)


@router.get("/{job_id}/events")
async def watch_job(
    job_id: str, client: ClientDependency, server: ServerDependency
) -> EventSourceResponse:
    """The job as server-sent events: as it is, at each change, and last as it ended.

    A stream ends after the time that the server gives a request; watch again then.
    """
    first = await get_job(job_id, client, server)
    watchers = server.num_watchers
    if watchers[client.tenant] >= _MAX_WATCHERS:
        raise OverloadedError(
            f"{_MAX_WATCHERS} jobs of this tenant are watched; end a stream, or ask for the job"
        )

    async def events() -> AsyncIterator[str]:
        latest, end = first, time.monotonic() + server.limits.timeout_s
        watchers[client.tenant] += 1  # here, since a stream may never begin
        try:
            yield _JSON.dump_json(latest).decode()
            while not latest.is_finished and server.is_ready and time.monotonic() < end:
                await asyncio.sleep(_POLL_S)
                try:
                    job = await get_job(job_id, client, server)
                except Exception as error:  # the status line is sent, so the stream says it
                    if not isinstance(error, ControlPrefixError):
                        error = InternalServerError(str(error))
                    yield json.dumps({"id": job_id, "error": error_body(error)[1].message})
                    return
                if job != latest:
                    latest = job
                    yield _JSON.dump_json(latest).decode()
        finally:
            watchers[client.tenant] -= 1

    return EventSourceResponse(events())


@router.delete("/{job_id}")
async def cancel_job(job_id: str, client: ClientDependency, server: ServerDependency) -> Job:
    """Cancel a job; one that runs ends after its current training step."""
    return await server.work_pools.run_with_store(client.cp.store.cancel_job, job_id)
