"""The command that computes what users and requests take: capacity."""

from typing import Annotated

import typer
from rich.table import Table

from controlprefix.capacity import StorageFormat, Workload
from controlprefix.capacity import capacity as compute
from controlprefix.cli.common import app, out, print_table
from controlprefix.cli.groups import ModelArguments, grouped
from controlprefix.errors import RequestError


@app.command()
@grouped
def capacity(
    users: Annotated[int, typer.Option(help="Users with a prefix.")] = 1000,
    num_slots: Annotated[int, typer.Option(min=1, help="Slots per prefix.")] = 16,
    storage_format: Annotated[StorageFormat, typer.Option(help="How users are stored.")] = "int8",
    requests_per_second: Annotated[float, typer.Option(help="Requests at the peak.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 200,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 200,
    tokens_per_second: Annotated[
        float, typer.Option(help="New tokens per second of one process, measured under load.")
    ] = 100.0,
    seconds_per_user: Annotated[
        float, typer.Option(help="Seconds to train a user, as `users train` reports them.")
    ] = 0.0,
    max_sequences: Annotated[int, typer.Option(help="As in `serve`.")] = 32,
    price_per_hour: Annotated[
        float, typer.Option(help="Price of the machine of one process, per hour.")
    ] = 0.0,
    price_per_gb: Annotated[
        float, typer.Option(help="Price of a gigabyte of the store, per month.")
    ] = 0.0,
    *,
    model: ModelArguments,
) -> None:
    """Compute what a number of users and requests takes: store, memory, processes."""
    frozen = model.load()
    try:
        result = compute(
            Workload.for_model(
                frozen,
                users=users,
                num_slots=num_slots,
                storage_format=storage_format,
                requests_per_second=requests_per_second,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                tokens_per_second=tokens_per_second,
                seconds_per_user=seconds_per_user,
                max_sequences=max_sequences,
                price_per_hour=price_per_hour,
                price_per_gb=price_per_gb,
            )
        )
    except ValueError as error:
        raise RequestError(str(error)) from None
    table = Table("what", "how much", show_header=False)
    table.add_row("a user in the store, with rows and indexes", f"{result.stored_bytes:,} bytes")
    table.add_row(f"{users:,} users in the store", f"{result.store_bytes / 1e9:,.2f} GB")
    table.add_row("a user's prefix in memory", f"{result.prefix_bytes:,} bytes")
    table.add_row("processes", f"{result.num_processes:,}")
    table.add_row("memory of each", f"{result.process_bytes / 1e9:,.1f} GB")
    if seconds_per_user:
        table.add_row("training all users once", f"{result.training_hours:,.1f} hours")
    if price_per_hour or price_per_gb:
        table.add_row("cost of serving and storing, per month", f"{result.monthly_cost:,.2f}")
        what = "storing a million users for a month, and training them once"
        table.add_row(what, f"{result.cost_per_million:,.2f}")
    print_table(table)
    out.print(f"run {result.advice}: see the guide on capacity")
