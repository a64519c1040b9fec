"""Routes of users."""

import asyncio

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from controlprefix.errors import RequestError
from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.routes.jobs import queue_job
from controlprefix.serving.routes.prefixes import (
    MAX_LISTED,
    After,
    Limit,
    Removed,
    VersionBody,
    Versions,
    names_after,
    versions_of,
)
from controlprefix.serving.user_bodies import EnrolmentBody, LearningBody
from controlprefix.serving.work_pools import disconnection
from controlprefix.store import Job
from controlprefix.users.user_training import usable_texts

router = APIRouter(prefix="/v1/users", tags=["users"], route_class=TenantRoute)


class UserList(BaseModel):
    """Users in order, and whether there are more after them."""

    users: list[str]
    has_more: bool


class EnrolledUser(BaseModel):
    """The version that an enrolment made."""

    user: str
    version: int


@router.get("")
async def list_users(
    client: ClientDependency,
    server: ServerDependency,
    after: After = "",
    limit: Limit = MAX_LISTED,
) -> UserList:
    """The tenant's users that have a prefix, in order, a page at a time."""
    names = await names_after("user", client, server, after, limit)
    return UserList(users=names[:limit], has_more=len(names) > limit)


@router.put("/{user:path}", responses={202: {"model": Job, "description": "A job trains it."}})
async def enroll_user(
    user: str,
    body: EnrolmentBody,
    request: Request,
    response: Response,
    client: ClientDependency,
    server: ServerDependency,
) -> EnrolledUser | Job:
    """Make a prefix for a user from texts they wrote: at once, or with `train` in a job."""
    limit = server.limits.max_texts
    if len(body.texts) > limit:
        raise RequestError(f"{len(body.texts)} texts; this server takes {limit} at once")
    if body.train is not None:
        usable_texts(user, body.texts)  # fail before a job does
        if body.decoder is not None:
            await server.work_pools.run_with_store(client.cp.version_info, "decoder", body.decoder)
        texts = body.texts if body.keep_texts else []
        options = body.job_options()
        return await queue_job("train_user", user, options, response, client, server, texts=texts)
    fields = body.model_dump(exclude={"train"}, exclude_none=True)
    disconnect_task = asyncio.create_task(disconnection(request))
    try:
        version = await server.enroll(client, user, fields, disconnect_task)
    finally:
        disconnect_task.cancel()
    return EnrolledUser(user=user, version=version)


@router.post("/{user:path}/learn", status_code=202)
async def learn_feedback(
    user: str,
    body: LearningBody,
    response: Response,
    client: ClientDependency,
    server: ServerDependency,
) -> Job:
    """Train a user's prefix on the feedback that is kept of them, in a job."""
    if not await server.work_pools.run_with_store(client.cp.store.has_feedback, user):
        raise RequestError(f"no feedback of user {user!r} is kept; send some to /v1/feedback")
    options = body.model_dump(exclude_none=True)
    return await queue_job("learn_feedback", user, options, response, client, server)


@router.post("/{user:path}/rollback")
async def roll_back_user(
    user: str, body: VersionBody, client: ClientDependency, server: ServerDependency
) -> Versions:
    """Make another version of a user's prefix current; none is removed."""
    await server.work_pools.run_with_store(client.cp.rollback, "user", user, to=body.to)
    return await versions_of("user", user, client, server)


@router.get("/{user:path}")
async def get_user(user: str, client: ClientDependency, server: ServerDependency) -> Versions:
    """The versions of a user's prefix; 404 if there is none."""
    return await versions_of("user", user, client, server)


@router.delete("/{user:path}")
async def forget_user(user: str, client: ClientDependency, server: ServerDependency) -> Removed:
    """Remove every version of a user's prefix, kept texts, feedback, jobs and profile."""
    num_versions = await server.forget(client, "user", user)
    return Removed(name=user, num_versions=num_versions)
