"""Routes of users."""

from fastapi import APIRouter
from pydantic import BaseModel

from controlprefix.errors import RequestError
from controlprefix.serving.bodies import EnrolmentBody
from controlprefix.serving.dependencies import ClientDependency, ServerDependency

router = APIRouter(prefix="/v1/users", tags=["users"])

_MAX_LISTED_USERS = 1000


class UserList(BaseModel):
    """The first thousand users, and how many there are."""

    users: list[str]
    num_users: int


class UserVersion(BaseModel):
    """One version of a user's prefix."""

    version: int
    current: bool
    num_slots: int
    size_bytes: int
    created_at: str


class UserVersions(BaseModel):
    """The versions of a user's prefix, oldest first."""

    user: str
    versions: list[UserVersion]


class EnrolledUser(BaseModel):
    """The version that an enrolment made."""

    user: str
    version: int


class ForgottenUser(BaseModel):
    """How many versions were removed."""

    user: str
    num_versions: int


@router.get("")
async def list_users(client: ClientDependency, server: ServerDependency) -> UserList:
    """The tenant's users that have a prefix."""
    names = await server.work.with_store(client.cp.names, "user")
    return UserList(users=names[:_MAX_LISTED_USERS], num_users=len(names))


@router.put("/{user:path}")
async def enroll_user(
    user: str, body: EnrolmentBody, client: ClientDependency, server: ServerDependency
) -> EnrolledUser:
    """Make a prefix for a user from texts they wrote."""
    limit = server.limits.max_texts
    if len(body.texts) > limit:
        raise RequestError(f"{len(body.texts)} texts; this server takes {limit} at once")
    fields = body.model_dump()
    version = await server.work.with_model(client.tenant, client.cp.enroll, user, **fields)
    return EnrolledUser(user=user, version=version)


@router.get("/{user:path}")
async def get_user(user: str, client: ClientDependency, server: ServerDependency) -> UserVersions:
    """The versions of a user's prefix."""
    infos = await server.work.with_store(client.cp.versions, "user", user)
    versions = [
        UserVersion(
            version=info.version,
            current=info.current,
            num_slots=info.num_slots,
            size_bytes=info.size_bytes,
            created_at=info.created_at.isoformat(),
        )
        for info in infos
    ]
    return UserVersions(user=user, versions=versions)


@router.delete("/{user:path}")
async def forget_user(
    user: str, client: ClientDependency, server: ServerDependency
) -> ForgottenUser:
    """Remove every version of a user's prefix, their kept texts and profile."""
    num_versions = await server.work.with_store(client.cp.forget_user, user)
    return ForgottenUser(user=user, num_versions=num_versions)
