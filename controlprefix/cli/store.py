"""Commands about what is stored: prefixes, the database, the file of attributes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    ModelOption,
    StoreOption,
    TenantOption,
    kind_of,
    open_engine,
    open_store,
    out,
    prefixes,
    print_prefixes,
    print_versions,
    spaces,
    stores,
)
from controlprefix.errors import RequestError


@prefixes.command("list")
def list_prefixes(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Everything that has a prefix: tasks, labels of attributes, users."""
    with open_store(store, tenant) as opened:
        print_prefixes(opened, None)


@prefixes.command("show")
def show_prefix(
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """The versions of one prefix."""
    with open_store(store, tenant) as opened:
        print_versions(opened, kind_of(kind), name)


@prefixes.command("rollback")
def rollback_prefix(
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    to: Annotated[int, typer.Option(help="The version to make current.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make another version current."""
    open_engine(model, store, tenant).rollback(kind_of(kind), name, to=to)
    out.print(f"{kind} {name!r} is at version {to}")


@stores.command("stats")
def store_stats(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """How much a tenant has stored."""
    with open_store(store, tenant) as opened:
        stats = opened.stats()
    for kind, count in sorted(stats.num_prefixes.items()):
        out.print(f"{count} {kind} prefixes")
    out.print(f"{stats.num_versions} versions, {stats.size_bytes:,} bytes")


@stores.command("verify")
def verify_store(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Read every version of a tenant, and name those that are damaged."""
    damaged = checked = 0
    with open_store(store, tenant) as opened:
        for key, version, whole in opened.verify():
            checked += 1
            if not whole:
                damaged += 1
                out.print(f"{key} version {version} is damaged")
    out.print(f"{checked} versions read, {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@stores.command("prune")
def prune_store(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions to keep of each name.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Remove old versions; the current and the aliased ones stay."""
    with open_store(store, tenant) as opened:
        out.print(f"{opened.prune(keep=keep)} versions removed")


@stores.command("export")
def export_store(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Write all that a tenant has to one file."""
    with open_store(store, tenant) as opened:
        out.print(f"{opened.export_to(file)} versions written to {file}")


@stores.command("import")
def import_store(
    file: Annotated[Path, typer.Argument(help="An exported file.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Add all that an exported file holds to a tenant, or nothing."""
    with open_store(store, tenant) as opened:
        out.print(f"{opened.import_from(file)} versions added")


@stores.command("upgrade")
def upgrade_store(store: StoreOption = STORE) -> None:
    """Bring the database to the schema of this version; back it up before."""
    from controlprefix.store import upgrade

    before, after = upgrade(store)
    if before == after:
        out.print(f"the store is at schema {after} already")
    else:
        out.print(f"upgraded the store from schema {before or 'none'} to {after}")


SpaceFile = Annotated[Path, typer.Argument(help="The file.")]
SPACE = Path("attributes.yaml")


@spaces.command("init")
def init_attributes(
    file: SpaceFile = SPACE, store: StoreOption = STORE, tenant: TenantOption = TENANT
) -> None:
    """Write a file to begin with: the labels that are stored, or an example."""
    from controlprefix.attributes.scaffold import scaffold

    if file.exists():
        raise RequestError(f"{file} exists already; give another name, or remove it")
    with open_store(store, tenant) as opened:
        labels = {found.key.name for found in opened.prefixes("attribute")}
    try:
        file.write_text(scaffold(labels), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error}") from error
    out.print(f"written: {file}; check it with: controlprefix attributes check {file}")


@spaces.command("show")
def show_attributes(
    file: SpaceFile = SPACE, store: StoreOption = STORE, tenant: TenantOption = TENANT
) -> None:
    """All labels, what they mean, and which have a prefix."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(file)
    with open_store(store, tenant) as opened:
        stored = {found.key.name for found in opened.prefixes("attribute")}
    table = Table("attribute", "label", "default", "opposite", "prefix", "description")
    for name, attribute in space.attributes.items():
        for label, about in attribute.labels.items():
            table.add_row(
                name,
                label,
                "yes" if attribute.default == label else "",
                about.opposite or "",
                "yes" if f"{name}={label}" in stored else "none yet",
                about.description,
            )
    out.print(table)


@spaces.command("check")
def check_attributes(file: SpaceFile = SPACE) -> None:
    """Say whether the file makes sense, and which lines do not."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(file)
    labels = sum(len(one.labels) for one in space.attributes.values())
    out.print(f"{file}: {len(space.attributes)} attributes with {labels} labels")
