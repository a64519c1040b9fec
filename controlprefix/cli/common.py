"""What all commands share: the app, its command groups, and common arguments."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from controlprefix import __version__
from controlprefix.prefixes.key import Kind
from controlprefix.processes import is_main_process

app = typer.Typer(
    name="controlprefix",
    help="One frozen language model; every task, tone and user is a small learned prefix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
users_app = typer.Typer(
    help="Train, enroll, migrate and forget users; their decoders and kept texts.",
    no_args_is_help=True,
)
jobs_app = typer.Typer(help="Training jobs that servers have queued.", no_args_is_help=True)
prefixes_app = typer.Typer(
    help="List, show, export, import, roll back, alias, gate and remove stored prefixes.",
    no_args_is_help=True,
)
store_app = typer.Typer(help="Maintain the database.", no_args_is_help=True)
api_keys_app = typer.Typer(help="API keys of tenants, for a server.", no_args_is_help=True)
audit_app = typer.Typer(help="What stored prefixes reveal.", no_args_is_help=True)
data_app = typer.Typer(help="Files of examples and texts.", no_args_is_help=True)
attributes_app = typer.Typer(help="The file that defines the attributes.", no_args_is_help=True)
app.add_typer(users_app, name="users")
app.add_typer(jobs_app, name="jobs")
app.add_typer(prefixes_app, name="prefixes")
app.add_typer(store_app, name="store")
app.add_typer(api_keys_app, name="api-keys")
app.add_typer(audit_app, name="audit")
app.add_typer(attributes_app, name="attributes")
app.add_typer(data_app, name="data")

# In a file or a log, tables may be wider than the 80 columns that rich assumes.
out = Console(
    highlight=False,
    markup=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 110,
    quiet=not is_main_process(),  # the others have the same to say
)
_WIDE = out.options.update(max_width=10_000)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(table: Table, *, empty: str = "") -> None:
    """Print a table, or what to say in place of one without rows; names are never cut.

    In a pipe or a file it is as wide as its cells, a line per row.
    """
    if not table.row_count and empty:
        out.print(empty)
        return
    for column in table.columns:
        column.overflow = "fold"
    if sys.stdout.isatty():
        out.print(table)
        return
    width = out.width
    out.width = max(width, Measurement.get(out, _WIDE, table).maximum)
    out.print(table)
    out.width = width


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a generated or kept text as it is: `Console` changes tabs and line ends."""
    if not out.quiet:
        typer.echo(text + end, nl=False)


TaskOption = Annotated[str | None, typer.Option("--task", help="Task whose prefix to use.")]
KindArgument = Annotated[Kind, typer.Argument(help="task, attribute, user or decoder.")]
NameArgument = Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One frozen language model; every task, tone and user is a small learned prefix."""
    if version:
        out.print(f"controlprefix {__version__}")
        raise typer.Exit


def silence_transformers() -> None:
    """Keep transformers' progress bars and notes out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
