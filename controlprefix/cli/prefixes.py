"""Commands about stored prefixes: list, show, rollback, alias, remove, export, import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from controlprefix.cli.common import (
    KindArgument,
    NameArgument,
    err,
    out,
    prefixes_app,
    print_table,
)
from controlprefix.cli.groups import (
    ALL_OF_A_USER,
    ColumnArguments,
    EngineArguments,
    StoreArguments,
    YesOption,
    grouped,
    require_yes,
)
from controlprefix.cli.options import parse_list, parse_pair
from controlprefix.errors import RequestError
from controlprefix.prefixes.key import Kind

if TYPE_CHECKING:
    from controlprefix.prefixes import PrefixKey
    from controlprefix.store import PrefixStore


FingerprintOption = Annotated[
    str | None,
    typer.Option(
        help="Fingerprint of the model's weights, or its beginning (see `prefixes show`), where "
        "the name is stored for several models."
    ),
]


@prefixes_app.command("list")
@grouped
def list_prefixes(
    kind: Annotated[Kind | None, typer.Option(help="List only this kind.")] = None,
    *,
    store: StoreArguments,
) -> None:
    """List everything that has a prefix: tasks, labels of attributes, users, and decoders."""
    table = Table("kind", "name", "model", "version", "slots", "bytes", "created")
    with store.open_store() as opened:
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
    print_table(table, empty=f"nothing is stored yet in {opened.display_name}")


@prefixes_app.command("relevance")
@grouped
def learn_relevance(
    kind: KindArgument,
    name: NameArgument,
    rows: Annotated[Path, typer.Argument(help="Rows whose prompts it is for.")],
    others: Annotated[
        Path | None, typer.Option(help="Rows whose prompts it is not for, such as another task's.")
    ] = None,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Learn which prompts a prefix is for: `generate --when relevant` leaves it out of others."""
    from controlprefix.data import as_requests
    from controlprefix.inference.relevance import last_user_text
    from controlprefix.request import Request

    def requests_of(path: Path | None) -> list[Request]:
        if path is None:
            return []
        return as_requests(path, columns=columns.columns(), defaults=columns.defaults())

    if kind == "decoder":
        raise RequestError("a decoder is no prefix of its own; name a task, a label or a user")
    requests = requests_of(rows), requests_of(others)
    cp = engine.open()
    decode = cp.frozen_model.request_tokenizer.decode
    own, other = ([last_user_text(row, decode) for row in part] for part in requests)
    learned = cp.learn_relevance(kind, name, own, others=other)
    out.print(
        f"stored {kind} {name!r} version {learned.version}: accepts {learned.accepted:.0%} of "
        "held-out prompts"
    )


@prefixes_app.command("show")
@grouped
def show_prefix(
    kind: KindArgument,
    name: NameArgument,
    *,
    store: StoreArguments,
) -> None:
    """Show the versions of one prefix, with aliases and users forgotten since they were trained."""
    from controlprefix.prefixes import PrefixKey

    key = PrefixKey(kind, name)
    names = ("model", "fingerprint", "version", "current", "aliases", "slots", "dtype", "bytes")
    table = Table(*names, "created", "content", "forgotten users")
    with store.open_store() as opened:
        models = opened.prefixes(kind, key.name)
        if not models:
            raise opened.unknown_name(key)
        for model in models:
            for info in opened.for_model(model.fingerprint).versions(key):
                table.add_row(
                    model.model_name,
                    model.fingerprint[:12],
                    str(info.version),
                    "yes" if info.current else "",
                    ", ".join(info.aliases),
                    str(info.num_slots),
                    info.dtype,
                    f"{info.size_bytes:,}",
                    f"{info.created_at:%Y-%m-%d %H:%M}",
                    info.content_hash[:19],
                    str(info.num_forgotten or ""),
                )
    print_table(table)


@prefixes_app.command("rollback")
@grouped
def rollback_prefix(
    kind: KindArgument,
    name: NameArgument,
    to: Annotated[str, typer.Option(help="Version to make current: its number or an alias.")],
    fingerprint: FingerprintOption = None,
    *,
    store: StoreArguments,
) -> None:
    """Make another version current."""
    from controlprefix.prefixes import PrefixKey

    key = PrefixKey(kind, name)
    with store.open_store() as opened:
        opened.for_model(_one_model(opened, key, fingerprint)).rollback(key, to=_version(to))
    out.print(f"{kind} {name!r} is at version {to}")


@prefixes_app.command("remove")
@grouped
def remove_prefix(
    kind: KindArgument,
    name: NameArgument,
    yes: YesOption = False,
    *,
    store: StoreArguments,
) -> None:
    """Remove every version of a prefix, for all models; for a user, all that is stored."""
    from controlprefix.prefixes import PrefixKey

    what = ALL_OF_A_USER if kind == "user" else "every version"
    require_yes(yes, f"Remove {what} of {kind} {name!r}, for good?")
    with store.open_store() as opened:
        num_removed = opened.forget(PrefixKey(kind, name))
    out.print(f"removed {kind} {name!r}: {num_removed} versions")


@prefixes_app.command("alias")
@grouped
def alias_prefix(
    kind: KindArgument,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="Such as canary.")],
    to: Annotated[
        str | None, typer.Option(help="Version that it names; left out, the alias is removed.")
    ] = None,
    fingerprint: FingerprintOption = None,
    *,
    store: StoreArguments,
) -> None:
    """Give a version an alias, move the alias, or remove it."""
    from controlprefix.prefixes import PrefixKey

    key = PrefixKey(kind, name)
    with store.open_store() as opened:
        version = None if to is None else _version(to)
        opened.for_model(_one_model(opened, key, fingerprint)).alias(key, alias, to=version)
    out.print(f"removed alias {alias!r}" if to is None else f"{alias!r} is version {to} of {key}")


@prefixes_app.command("export")
@grouped
def export_prefix(
    kind: KindArgument,
    name: NameArgument,
    path: Annotated[
        Path, typer.Argument(help="Folder for the prefix and its card; or a .safetensors file.")
    ],
    version: Annotated[
        str | None, typer.Option(help="Number or alias; left out, the current version.")
    ] = None,
    file_format: Annotated[
        Literal["controlprefix", "peft"],
        typer.Option("--format", help="peft writes a PEFT checkpoint of prefix tuning."),
    ] = "controlprefix",
    yes: YesOption = False,
    *,
    engine: EngineArguments,
) -> None:
    """Write one prefix to a folder with a card, to a file, or as a PEFT checkpoint."""
    if path.exists():
        require_yes(yes, f"{path} exists; overwrite it?")
    cp = engine.open()
    number = None if version is None else _version(version)
    if file_format == "peft":
        cp.get(kind, name, version=number).to_peft(path)
    elif path.suffix == ".safetensors":
        cp.get(kind, name, version=number).save(path)
    else:
        cp.export(kind, name, path, version=number)
    out.print(f"written: {path}")


@prefixes_app.command("import")
@grouped
def import_prefix(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="A folder of `prefixes export`, a .safetensors file, the folder of a PEFT "
            "checkpoint of virtual tokens, or a .ckpt or .bin file of the original Prefix-Tuning "
            "or Control Prefixes.",
        ),
    ],
    kind: Annotated[Kind | None, typer.Option(help="What it is for.")] = None,
    name: Annotated[str | None, typer.Option(help="Name; left out, the exported one.")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of the labels of an attribute of an original checkpoint, in order: "
            "cats=Airport,City. Repeatable."
        ),
    ] = None,
    peft_task: Annotated[
        int | None,
        typer.Option(min=0, help="Index of a task in PEFT's multitask prompt tuning."),
    ] = None,
    *,
    engine: EngineArguments,
) -> None:
    """Store one prefix from a folder or a file as a new version."""
    from controlprefix.prefixes import Prefix
    from controlprefix.prefixes.folder import INFO_FILE, load_folder
    from controlprefix.prefixes.peft_files import CONFIG_FILE

    has_name = (path / INFO_FILE).exists()
    is_original = path.suffix in {".ckpt", ".bin"}
    if is_original and (name is None or kind not in (None, "task")):
        raise RequestError(f"{path} holds a task and its labels; give --name, and leave --kind out")
    if not (has_name or is_original) and (kind is None or name is None):
        raise RequestError(f"{path} does not say what it is for; give --kind and --name")
    if labels and not is_original:
        raise RequestError("--labels are for original checkpoints (.ckpt, .bin); leave them out")
    is_peft = not (has_name or is_original) and (path / CONFIG_FILE).exists()
    if peft_task is not None and not is_peft:
        raise RequestError("--peft-task is for PEFT checkpoints; leave it out")
    cp = engine.open(create=True)
    if is_original:
        names = {key: parse_list(value) for key, value in map(_label_names, labels or ())}
        for key_name, number in cp.import_original(path, task=str(name), labels=names).items():
            out.print(f"stored {key_name} version {number}")
        return
    details = {"imported": {"from": str(path)}}
    if has_name:
        key, prefix, saved = load_folder(path)
        kind, name = kind or key.kind, name or key.name
        details = {**saved, **details}
    elif is_peft:
        prefix = cp.prefix_from_peft(path, task=peft_task)
        if not prefix.is_exact:
            err.print("not exact on this model: a start for training only")
    else:
        prefix = Prefix.load(path)
    assert kind is not None
    assert name is not None
    version = cp.put(kind, name, prefix, details=details)
    out.print(f"stored {kind} {name!r} version {version}: {prefix.num_slots} slots")


def _label_names(text: str) -> tuple[str, str]:
    return parse_pair("--labels", text)


def _one_model(store: "PrefixStore", key: "PrefixKey", fingerprint: str | None) -> str:
    """The fingerprint of the one model that a name is stored for.

    Raises:
        UnknownNameError: If there is none.
        RequestError: If there are several, or none with that fingerprint.
    """
    models = store.prefixes(key.kind, key.name)
    if not models:
        raise store.unknown_name(key)
    chosen = [info for info in models if info.fingerprint.startswith(fingerprint or "")]
    if len(chosen) != 1:
        names = ", ".join(f"{info.model_name}: {info.fingerprint[:12]}" for info in models)
        raise RequestError(
            f"{key} is stored for {names}; give the beginning of one of these as --fingerprint"
        )
    return chosen[0].fingerprint


def _version(text: str) -> int | str:
    """A version's number, or an alias."""
    return int(text) if text.isdecimal() else text
