"""What all commands share: the app, options, and how a model or a store is opened."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from controlprefix.errors import RequestError

if TYPE_CHECKING:
    from controlprefix.engine import ControlPrefix
    from controlprefix.store import Kind, PrefixStore

app = typer.Typer(
    name="controlprefix",
    help="One frozen language model; every task, tone and user a small learned prefix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
users = typer.Typer(help="Learn, see, roll back and forget users.", no_args_is_help=True)
prefixes = typer.Typer(help="See and roll back stored prefixes.", no_args_is_help=True)
stores = typer.Typer(help="Look after the database.", no_args_is_help=True)
api_keys = typer.Typer(help="API keys of tenants, for a server.", no_args_is_help=True)
audits = typer.Typer(help="What stored prefixes give away.", no_args_is_help=True)
spaces = typer.Typer(help="The file that says which attributes there are.", no_args_is_help=True)
app.add_typer(users, name="users")
app.add_typer(api_keys, name="keys")
app.add_typer(audits, name="audit")
app.add_typer(spaces, name="attributes")
app.add_typer(prefixes, name="prefixes")
app.add_typer(stores, name="store")
# Into a file or a log, tables may be wider than the 80 columns rich assumes.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ModelOption = Annotated[
    str, typer.Option("--model", help="A folder, a hub id, or 'smollm2', the one pip installs.")
]
StoreOption = Annotated[
    str, typer.Option("--store", envvar="CONTROLPREFIX_STORE", help="Where prefixes are kept.")
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose prefixes these are.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="The task's prefix.")]
UserOption = Annotated[str | None, typer.Option("--user", help="The user's prefix.")]
SpaceOption = Annotated[
    Path | None,
    typer.Option(
        "--attributes",
        envvar="CONTROLPREFIX_ATTRIBUTES",
        help="A file that says which attributes there are.",
    ),
]
MODEL, STORE, TENANT = "smollm2", "sqlite:///prefixes.db", "default"


def open_engine(
    model: str, store: str, tenant: str, attributes: Path | None = None
) -> "ControlPrefix":
    from accelerate import PartialState

    from controlprefix.engine import ControlPrefix

    quiet()
    # A GPU if there is one, and each process that accelerate started has its own.
    device = PartialState().device
    return ControlPrefix.from_pretrained(
        model, store=store, tenant=tenant, device=device, attributes=attributes
    )


def make_accelerator(tracker: str, folder: Path | None) -> Any:
    """An Accelerator that logs to a tracker."""
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=tracker, project_dir=folder or ".")
        accelerator.init_trackers("controlprefix")
    except (ValueError, ImportError) as error:
        raise RequestError(f"--tracker {tracker!r}: {error}") from error
    return accelerator


def run_folder(data: Path, folder: Path | None, resume: bool) -> Path | None:
    """Of a run: as given, or to go on from without being told, by the data's name."""
    return Path(f"{data.stem}.run") if resume and folder is None else folder


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def listed(text: str) -> list[str]:
    """`a, b` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def quiet() -> None:
    """Leave transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def open_store(url: str, tenant: str) -> "PrefixStore":
    """The store alone."""
    from controlprefix.store import PrefixStore

    return PrefixStore(url, tenant=tenant)


def print_prefixes(store: "PrefixStore", kind: "Kind | None") -> None:
    """A table of what is stored."""
    table = Table("kind", "name", "model", "version", "slots", "bytes", "made")
    for found in store.prefixes(kind):
        version = found.current
        table.add_row(
            found.key.kind,
            found.key.name,
            found.model_name,
            str(version.version),
            str(version.num_slots),
            f"{version.size_bytes:,}",
            f"{version.created_at:%Y-%m-%d %H:%M}",
        )
    out.print(table if table.row_count else "nothing is stored yet")


def print_versions(store: "PrefixStore", kind: "Kind", name: str) -> None:
    """A table of all versions of a name."""
    from controlprefix.store import PrefixKey

    key = PrefixKey(kind, name)
    models = [found for found in store.prefixes(kind) if found.key == key]
    if not models:
        raise store.unknown(key, None)
    table = Table("model", "version", "current", "slots", "dtype", "bytes", "made", "content")
    for model in models:
        for one in store.versions(key, model.fingerprint):
            table.add_row(
                model.model_name,
                str(one.version),
                "yes" if one.current else "",
                str(one.num_slots),
                one.dtype,
                f"{one.size_bytes:,}",
                f"{one.created_at:%Y-%m-%d %H:%M}",
                one.content_hash[:19],
            )
    out.print(table)


def kind_of(written: str) -> "Kind":
    """A kind of prefix, by its name."""
    return cast("Kind", one_of("kind", written, ("task", "attribute", "user")))


def one_of(option: str, written: str, choices: tuple[str, ...]) -> Any:
    """One of those choices."""
    if written not in choices:
        raise RequestError(f"{option} is {written!r}; it must be one of: {', '.join(choices)}")
    return written


def pair(option: str, written: str) -> tuple[str, str]:
    """`name=value` in two."""
    name, _, value = written.partition("=")
    if not name or not value:
        raise RequestError(f"{option} {written!r} is not of the form name=value")
    return name, value


def is_number(written: str) -> bool:
    """Whether it is one."""
    try:
        float(written)
    except ValueError:
        return False
    return True


def number(option: str, written: str) -> float:
    """The number written there."""
    if not is_number(written):
        raise RequestError(f"{option} has {written!r} where a number belongs")
    return float(written)
