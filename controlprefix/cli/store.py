"""Commands about the database and the attribute file: store, attributes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controlprefix.cli.common import (
    attributes_app,
    out,
    print_table,
    store_app,
)
from controlprefix.cli.groups import (
    EngineArguments,
    StoreArguments,
    YesOption,
    grouped,
    require_yes,
)
from controlprefix.errors import RequestError


@store_app.command("stats")
@grouped
def store_stats(*, store: StoreArguments) -> None:
    """Show how much a tenant has stored."""
    with store.open_store(must_exist=True) as opened:
        stats = opened.stats()
    for kind, count in sorted(stats.num_prefixes.items()):
        out.print(f"{count} {kind} prefixes")
    out.print(f"store {opened.display_name}, tenant {opened.tenant!r}", soft_wrap=True)
    out.print(f"{stats.num_versions} versions, {stats.size_bytes:,} bytes")


@store_app.command("verify")
@grouped
def verify_store(
    *,
    store: StoreArguments,
) -> None:
    """Read every version of a tenant, and list those that are damaged."""
    num_damaged = num_checked = 0
    with store.open_store(must_exist=True) as opened:
        for key, version, intact in opened.verify():
            num_checked += 1
            if not intact:
                num_damaged += 1
                out.print(f"{key} version {version} is damaged, or its key is missing")
    out.print(f"{num_checked} versions read, {num_damaged} damaged")
    if num_damaged:
        raise typer.Exit(1)


@store_app.command("prune")
@grouped
def prune_store(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions to keep of each name.")],
    yes: YesOption = False,
    *,
    store: StoreArguments,
) -> None:
    """Remove old versions, except current ones and those with an alias."""
    require_yes(yes, f"Remove all but the {keep} newest versions of each name, for good?")
    with store.open_store(must_exist=True) as opened:
        out.print(f"{opened.prune(keep=keep)} versions removed")


@store_app.command("purge")
@grouped
def purge_store(*, store: StoreArguments) -> None:
    """Overwrite what was removed or forgotten in the database's files; other processes wait."""
    with store.open_store(must_exist=True) as opened:
        opened.purge()
    out.print("purged; backups and archived logs are not touched")


@store_app.command("rotate-keys")
@grouped
def rotate_keys(
    *,
    store: StoreArguments,
) -> None:
    """Re-encrypt everything that is not encrypted with the tenant's current key."""
    if store.encryption_keys is None:
        raise RequestError("give the file of keys with --encryption-keys")
    with store.open_store(must_exist=True) as opened:
        out.print(f"{opened.rotate_keys()} versions re-encrypted")


@store_app.command("audit-log")
@grouped
def show_audit_log(*, store: StoreArguments) -> None:
    """List what was removed on request, and when."""
    table = Table("time (UTC)", "action", "kind", "name", "versions")
    with store.open_store(must_exist=True) as opened:
        for entry in opened.audit_log():
            at = f"{entry.at:%Y-%m-%d %H:%M}"
            table.add_row(at, entry.action, entry.key.kind, entry.key.name, str(entry.num_versions))
    print_table(table, empty="nothing has been removed yet")


@store_app.command("export")
@grouped
def export_store(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    yes: YesOption = False,
    *,
    store: StoreArguments,
) -> None:
    """Write all prefixes, versions and aliases of a tenant to one file, decrypted."""
    if file.exists():
        require_yes(yes, f"{file} exists; overwrite it?")
    with store.open_store(must_exist=True) as opened:
        out.print(f"{opened.export_to(file)} versions written to {file}")


@store_app.command("import")
@grouped
def import_store(
    file: Annotated[Path, typer.Argument(help="An exported file.")],
    *,
    store: StoreArguments,
) -> None:
    """Add everything in an exported file to a tenant, or nothing."""
    with store.open_store(create=True) as opened:
        out.print(f"{opened.import_from(file)} versions added")


@store_app.command("rebind")
@grouped
def rebind_store(*, engine: EngineArguments) -> None:
    """Store again what version 0.1.0 stored for this model, under its present fingerprint.

    Only if all weights are those that it was stored for. Old versions stay.
    """
    from controlprefix.engine.rebinding import rebind

    keys = rebind(engine.open())
    for key in keys:
        out.print(f"stored again: {key}")
    out.print(f"{len(keys)} names stored again; what had a version for this model was left alone")


@store_app.command("upgrade")
@grouped
def upgrade_store(
    service_role: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL role of the servers, which may then read and write rows and nothing "
            "else; run this command as another role, which owns the tables."
        ),
    ] = None,
    *,
    store: StoreArguments,
) -> None:
    """Upgrade the database to this version's schema; back it up before."""
    from controlprefix.store import upgrade
    from controlprefix.store.urls import full_url, sqlite_path

    path = sqlite_path(full_url(store.store))
    if path is not None and not path.exists():
        raise RequestError(f"there is no store {store.store}; the first that is stored creates it")
    before, after = upgrade(store.store, service_role=service_role)
    if before == after:
        out.print(f"the store is at schema {after} already")
    else:
        out.print(f"upgraded the store from schema {before or 'none'} to {after}")


FileArgument = Annotated[Path, typer.Argument(help="The attribute file.")]
ATTRIBUTE_FILE = Path("attributes.yaml")


def _existing(file: Path) -> Path:
    """The file, after a check that it is there."""
    if not file.exists():
        raise RequestError(
            f"there is no {file}; write one with: controlprefix attributes init {file}"
        )
    return file


@attributes_app.command("init")
@grouped
def init_attributes(
    file: FileArgument = ATTRIBUTE_FILE,
    *,
    store: StoreArguments,
) -> None:
    """Write a new attribute file with the stored labels, or an example."""
    from controlprefix.attributes.scaffold import scaffold

    if file.exists():
        raise RequestError(f"{file} exists already; give another name, or remove it")
    with store.open_store() as opened:
        labels = {info.key for info in opened.prefixes("attribute")}
    try:
        file.write_text(scaffold(labels), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error}") from error
    out.print(f"written: {file}; check it with: controlprefix attributes check {file}")


@attributes_app.command("show")
@grouped
def show_attributes(
    file: FileArgument = ATTRIBUTE_FILE,
    *,
    store: StoreArguments,
) -> None:
    """List all labels, what they mean, and which have a prefix."""
    from controlprefix.attributes import AttributeSpace
    from controlprefix.prefixes import PrefixKey

    space = AttributeSpace.read(_existing(file))
    with store.open_store() as opened:
        stored = {info.key for info in opened.prefixes("attribute")}
    table = Table("attribute", "label", "default", "opposite", "prefix", "description")
    for name, attribute in space.attributes.items():
        for label, entry in attribute.labels.items():
            table.add_row(
                name,
                label,
                "yes" if attribute.default == label else "",
                entry.opposite or "",
                "yes" if PrefixKey.for_label(name, label) in stored else "none yet",
                entry.description,
            )
    print_table(table)


@attributes_app.command("check")
def check_attributes(file: FileArgument = ATTRIBUTE_FILE) -> None:
    """Check an attribute file, and list the lines that are wrong."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(_existing(file))
    counts = f"{len(space.attributes)} attributes with {len(space.keys())} labels"
    out.print(f"{file}: {counts}", soft_wrap=True)
