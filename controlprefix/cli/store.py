"""Commands about what is stored: prefixes, store, attributes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    EncryptionKeysOption,
    KindArgument,
    ModelOption,
    NameArgument,
    StoredKind,
    StoreOption,
    TenantOption,
    attributes_app,
    open_engine,
    open_store,
    out,
    prefixes_app,
    store_app,
)
from controlprefix.errors import RequestError


@prefixes_app.command("list")
def list_prefixes(
    kind: Annotated[StoredKind | None, typer.Option(help="List only this kind.")] = None,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """List everything that has a prefix: tasks, labels of attributes, users."""
    table = Table("kind", "name", "model", "version", "slots", "bytes", "created")
    with open_store(store, tenant) as opened:
        for info in opened.prefixes(kind):
            current = info.current
            table.add_row(
                info.key.kind,
                info.key.name,
                info.model_name,
                str(current.version),
                str(current.num_slots),
                f"{current.size_bytes:,}",
                f"{current.created_at:%Y-%m-%d %H:%M}",
            )
    out.print(table if table.row_count else "nothing is stored yet")


@prefixes_app.command("show")
def show_prefix(
    kind: KindArgument,
    name: NameArgument,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Show the versions of one prefix."""
    from controlprefix.prefixes import PrefixKey

    key = PrefixKey(kind, name)
    table = Table("model", "version", "current", "slots", "dtype", "bytes", "created", "content")
    with open_store(store, tenant) as opened:
        models = [info for info in opened.prefixes(kind) if info.key == key]
        if not models:
            raise opened.unknown_name(key)
        for model in models:
            for info in opened.for_model(model.fingerprint).versions(key):
                table.add_row(
                    model.model_name,
                    str(info.version),
                    "yes" if info.current else "",
                    str(info.num_slots),
                    info.dtype,
                    f"{info.size_bytes:,}",
                    f"{info.created_at:%Y-%m-%d %H:%M}",
                    info.content_hash[:19],
                )
    out.print(table)


@prefixes_app.command("rollback")
def rollback_prefix(
    kind: KindArgument,
    name: NameArgument,
    to: Annotated[int, typer.Option(help="Version to make current.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make another version current."""
    open_engine(model, store, tenant).rollback(kind, name, to=to)
    out.print(f"{kind} {name!r} is at version {to}")


@prefixes_app.command("remove")
def remove_prefix(
    kind: KindArgument,
    name: NameArgument,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Remove every version of a prefix, for all models."""
    from controlprefix.prefixes import PrefixKey

    with open_store(store, tenant) as opened:
        num_removed = opened.forget(PrefixKey(kind, name))
    out.print(f"removed {kind} {name!r}: {num_removed} versions")


@store_app.command("stats")
def store_stats(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Show how much a tenant has stored."""
    with open_store(store, tenant) as opened:
        stats = opened.stats()
    for kind, count in sorted(stats.num_prefixes.items()):
        out.print(f"{count} {kind} prefixes")
    out.print(f"{stats.num_versions} versions, {stats.size_bytes:,} bytes")


@store_app.command("verify")
def verify_store(
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Read every version of a tenant, and list those that are damaged."""
    num_damaged = num_checked = 0
    with open_store(store, tenant, encryption_keys) as opened:
        for key, version, intact in opened.verify():
            num_checked += 1
            if not intact:
                num_damaged += 1
                out.print(f"{key} version {version} is damaged, or its key is missing")
    out.print(f"{num_checked} versions read, {num_damaged} damaged")
    if num_damaged:
        raise typer.Exit(1)


@store_app.command("prune")
def prune_store(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions to keep of each name.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Remove old versions, except current ones and those with an alias."""
    with open_store(store, tenant) as opened:
        out.print(f"{opened.prune(keep=keep)} versions removed")


@store_app.command("rotate-keys")
def rotate_keys(
    encryption_keys: EncryptionKeysOption,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Re-encrypt everything that is not encrypted with the tenant's current key."""
    if encryption_keys is None:
        raise RequestError("give the file of keys with --encryption-keys")
    with open_store(store, tenant, encryption_keys) as opened:
        out.print(f"{opened.rotate_keys()} versions re-encrypted")


@store_app.command("audit")
def show_audit(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """List what was removed on request, and when."""
    table = Table("time (UTC)", "action", "kind", "name", "versions")
    with open_store(store, tenant) as opened:
        for entry in opened.audit():
            at = f"{entry.at:%Y-%m-%d %H:%M}"
            table.add_row(at, entry.action, entry.key.kind, entry.key.name, str(entry.num_versions))
    out.print(table if table.row_count else "nothing has been removed yet")


@store_app.command("export")
def export_store(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Write all prefixes, versions and aliases of a tenant to one file, decrypted."""
    with open_store(store, tenant, encryption_keys) as opened:
        out.print(f"{opened.export_to(file)} versions written to {file}")


@store_app.command("import")
def import_store(
    file: Annotated[Path, typer.Argument(help="An exported file.")],
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Add everything in an exported file to a tenant, or nothing."""
    with open_store(store, tenant, encryption_keys) as opened:
        out.print(f"{opened.import_from(file)} versions added")


@store_app.command("upgrade")
def upgrade_store(store: StoreOption = STORE) -> None:
    """Upgrade the database to this version's schema; back it up before."""
    from controlprefix.store import upgrade

    before, after = upgrade(store)
    if before == after:
        out.print(f"the store is at schema {after} already")
    else:
        out.print(f"upgraded the store from schema {before or 'none'} to {after}")


FileArgument = Annotated[Path, typer.Argument(help="The attribute file.")]
ATTRIBUTE_FILE = Path("attributes.yaml")


@attributes_app.command("init")
def init_attributes(
    file: FileArgument = ATTRIBUTE_FILE,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Write a new attribute file with the stored labels, or an example."""
    from controlprefix.attributes.scaffold import scaffold

    if file.exists():
        raise RequestError(f"{file} exists already; give another name, or remove it")
    with open_store(store, tenant) as opened:
        labels = {info.key for info in opened.prefixes("attribute")}
    try:
        file.write_text(scaffold(labels), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error}") from error
    out.print(f"written: {file}; check it with: controlprefix attributes check {file}")


@attributes_app.command("show")
def show_attributes(
    file: FileArgument = ATTRIBUTE_FILE,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """List all labels, what they mean, and which have a prefix."""
    from controlprefix.attributes import AttributeSpace
    from controlprefix.prefixes import PrefixKey

    space = AttributeSpace.read(file)
    with open_store(store, tenant) as opened:
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
    out.print(table)


@attributes_app.command("check")
def check_attributes(file: FileArgument = ATTRIBUTE_FILE) -> None:
    """Check an attribute file, and list the lines that are wrong."""
    from controlprefix.attributes import AttributeSpace

    space = AttributeSpace.read(file)
    counts = f"{len(space.attributes)} attributes with {len(space.keys())} labels"
    out.print(f"{file}: {counts}", soft_wrap=True)
