"""Routes of stored prefixes: versions, rollback, aliases and removal, for tasks and labels."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict

from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=TenantRoute)

MAX_LISTED = 1000
PrefixKind = Annotated[Literal["task", "attribute"], Path(description="What they are for.")]
PrefixName = Annotated[str, Path(description="Such as `email`, or `formality=formal`.")]
After = Annotated[str, Query(description="Only names that come after this one.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED, description="Maximum number of names.")]


class PrefixList(BaseModel):
    """Names in order, and whether there are more after them."""

    names: list[str]
    has_more: bool


class Version(BaseModel):
    """One version of a prefix."""

    version: int
    current: bool
    aliases: list[str]
    num_slots: int
    size_bytes: int
    created_at: str


class Versions(BaseModel):
    """The versions of a prefix, oldest first."""

    name: str
    versions: list[Version]


class Removed(BaseModel):
    """How many versions were removed."""

    name: str
    num_versions: int


def _checked_version(value: object) -> object:
    """Refuse what no version or alias can be; digits are a number."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool):
        raise ValueError("a version is a number or an alias")
    if isinstance(value, int) and not 1 <= value < 1 << 31:
        raise ValueError("a version is a number from 1 on")
    if isinstance(value, str) and not (0 < len(value) <= 64 and value.isprintable()):
        raise ValueError("an alias is up to 64 printable characters")
    return value


VersionOrAlias = Annotated[int | str, BeforeValidator(_checked_version)]


class VersionBody(BaseModel):
    """A version, by its number or alias."""

    model_config = ConfigDict(extra="forbid")

    to: VersionOrAlias


class AliasBody(BaseModel):
    """A version that gets an alias; null removes the alias."""

    model_config = ConfigDict(extra="forbid")

    to: VersionOrAlias | None


@router.get("/{kind}")
async def list_prefixes(
    kind: PrefixKind,
    client: ClientDependency,
    server: ServerDependency,
    after: After = "",
    limit: Limit = MAX_LISTED,
) -> PrefixList:
    """The tasks or labels that have a prefix, in order, a page at a time."""
    names = await names_after(kind, client, server, after, limit)
    return PrefixList(names=names[:limit], has_more=len(names) > limit)


@router.post("/{kind}/{name:path}/rollback")
async def roll_back_prefix(
    kind: PrefixKind,
    name: PrefixName,
    body: VersionBody,
    client: ClientDependency,
    server: ServerDependency,
) -> Versions:
    """Make another version current; none is removed."""
    await server.work_pools.run_with_store(client.cp.rollback, kind, name, to=body.to)
    return await versions_of(kind, name, client, server)


@router.put("/{kind}/{name:path}/aliases/{alias}")
async def set_alias(
    kind: PrefixKind,
    name: PrefixName,
    alias: str,
    body: AliasBody,
    client: ClientDependency,
    server: ServerDependency,
) -> Versions:
    """Give a version an alias such as `canary`, move it, or remove it."""
    await server.work_pools.run_with_store(client.cp.alias, kind, name, alias, to=body.to)
    return await versions_of(kind, name, client, server)


@router.get("/{kind}/{name:path}")
async def get_prefix(
    kind: PrefixKind, name: PrefixName, client: ClientDependency, server: ServerDependency
) -> Versions:
    """The versions of a task's or a label's prefix."""
    return await versions_of(kind, name, client, server)


@router.delete("/{kind}/{name:path}")
async def remove_prefix(
    kind: PrefixKind, name: PrefixName, client: ClientDependency, server: ServerDependency
) -> Removed:
    """Remove every version of a task's or a label's prefix."""
    num_versions = await server.forget(client, kind, name)
    return Removed(name=name, num_versions=num_versions)


async def names_after(
    kind: Literal["task", "attribute", "user"],
    client: Client,
    server: Server,
    after: str,
    limit: int,
) -> list[str]:
    """Names in order; one more than the limit where there are more.

    Args:
        kind: Of which prefixes.
        client, server: Whose they are, and where.
        after, limit: See the routes.
    """
    return await server.work_pools.run_with_store(
        client.cp.names, kind, after=after, limit=limit + 1
    )


async def versions_of(
    kind: Literal["task", "attribute", "user"], name: str, client: Client, server: Server
) -> Versions:
    """The versions of a name.

    Raises:
        UnknownNameError: If there is no such name.
    """
    infos = await server.work_pools.run_with_store(client.cp.versions, kind, name)
    return Versions(
        name=name,
        versions=[
            Version(
                version=info.version,
                current=info.current,
                aliases=list(info.aliases),
                num_slots=info.num_slots,
                size_bytes=info.size_bytes,
                created_at=info.created_at.isoformat(),
            )
            for info in infos
        ],
    )
