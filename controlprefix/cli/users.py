"""Commands about users: enroll, train, decoder, audit, and what is stored of them."""

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
    app,
    audits,
    open_engine,
    open_store,
    out,
    print_prefixes,
    print_versions,
    run_folder,
    users,
)

DecoderOption = Annotated[
    str | None, typer.Option("--decoder", help="A stored decoder: see `users decoder`.")
]
UsersArgument = Annotated[
    Path, typer.Argument(help='JSON Lines, a text a line: {"user": "ana", "text": "…"}.')
]


@app.command()
def enroll(
    user: Annotated[str, typer.Argument(help="Who.")],
    texts: Annotated[list[Path], typer.Argument(help="Text files, a text a line.")],
    decoder: DecoderOption = None,
    refine: Annotated[bool, typer.Option("--refine", help="Train from there.")] = False,
    slots: Annotated[
        int, typer.Option(help="Without a decoder: slots at most; one token of text fills one.")
    ] = 64,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make a usable prefix for a user at once, from texts they wrote, without training."""
    from controlprefix.interop.data_files import read_texts

    written = read_texts(texts)
    version = open_engine(model, store, tenant).enroll(
        user, written, decoder=decoder, refine=refine, num_slots=slots
    )
    out.print(f"stored user {user!r} version {version}, from {len(written)} texts")


@users.command("train")
def train_users(
    data: UsersArgument,
    decoder: DecoderOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="With a decoder: learn all slots, not a code.")
    ] = False,
    slots: Annotated[int, typer.Option(help="Of each prefix, without a decoder.")] = 16,
    epochs: Annotated[float, typer.Option(help="Passes over a user's texts.")] = 3.0,
    together: Annotated[int, typer.Option(help="Users at a time.")] = 16,
    folder: Annotated[Path | None, typer.Option(help="Where it is noted who is done.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out who is noted there; else in DATA's name.")
    ] = False,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn a prefix for each of many users, and store each as soon as it is done."""
    from controlprefix.interop.data_files import read_users

    folder = run_folder(data, folder, resume)
    texts = read_users(data)
    report = open_engine(model, store, tenant).train_users(
        texts,
        decoder=decoder,
        as_codes=not full,
        num_slots=slots,
        epochs=epochs,
        together=together,
        folder=folder,
        resume=resume,
    )
    for user, reason in report.failed.items():
        out.print(f"not stored: user {user!r}: {reason}")
    skipped = f", {len(report.skipped)} were done before" if report.skipped else ""
    out.print(
        f"stored {len(report.users)} of {len(texts)} users in {report.seconds:.0f} s{skipped}"
    )


@users.command("decoder")
def learn_decoder(
    data: UsersArgument,
    name: Annotated[str, typer.Option(help="Of the decoder.")] = "users",
    slots: Annotated[int, typer.Option(help="Of the prefixes.")] = 16,
    width: Annotated[int, typer.Option(help="Numbers of a slot's code.")] = 64,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.")] = 3.0,
    folder: Annotated[Path | None, typer.Option(help="For the run's state and curves.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state in --folder, or in DATA's name.")
    ] = False,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn from many users what they have in common, and how they differ."""
    from controlprefix.interop.data_files import read_users

    folder = run_folder(data, folder, resume)
    report = open_engine(model, store, tenant).learn_decoder(
        read_users(data),
        name=name,
        num_slots=slots,
        width=width,
        epochs=epochs,
        folder=folder,
        resume=resume,
    )
    out.print(
        f"stored decoder {name!r} version {report.version}, from {report.num_users} users; texts "
        f"tell {report.told:.0%} of how their codes differ"
    )


@audits.command("user")
def audit_user(
    name: Annotated[str, typer.Argument(help="Who.")],
    texts: Annotated[Path, typer.Option(help="What the prefix was learned from, a text a line.")],
    held_out: Annotated[Path, typer.Option(help="Other texts of the same author, a text a line.")],
    canaries: Annotated[
        int, typer.Option(help="Secret numbers to plant, and to learn the prefix again with.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of those.")] = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """What a user's prefix gives away of the texts it was learned from."""
    from controlprefix.interop.data_files import read_texts

    report = open_engine(model, store, tenant).audit_user(
        name, read_texts([texts]), read_texts([held_out]), canaries=canaries, seed=seed
    )
    table = Table("measure", "found", "where nothing is given away")
    table.add_row("gain on held-out texts, nats a token", f"{report.gain:.3f}", "")
    table.add_row("membership told (area under the curve)", f"{report.membership:.2f}", "0.50")
    table.add_row(
        "texts continued word for word",
        f"{report.extracted:.0%}",
        f"{report.extracted_without:.0%}",
    )
    if report.exposure is not None:
        most = f"about 1 (at most {report.most_exposure:.0f})"
        table.add_row("exposure of planted numbers, bits", f"{report.exposure:.1f}", most)
    out.print(table)


@users.command("list")
def list_users(store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Users that have a prefix."""
    with open_store(store, tenant) as opened:
        print_prefixes(opened, "user")


@users.command("show")
def show_user(name: str, store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """The versions of a user's prefix."""
    with open_store(store, tenant) as opened:
        print_versions(opened, "user", name)


@users.command("forget")
def forget_user(name: str, store: StoreOption = STORE, tenant: TenantOption = TENANT) -> None:
    """Remove every version of a user's prefix, for every model."""
    from controlprefix.store import PrefixKey

    with open_store(store, tenant) as opened:
        removed = opened.forget(PrefixKey("user", name))
    out.print(f"forgot user {name!r}: {removed} versions removed")


@users.command("rollback")
def rollback_user(
    name: str,
    to: Annotated[int, typer.Option(help="The version to make current.")],
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Make another version of a user's prefix current."""
    open_engine(model, store, tenant).rollback("user", name, to=to)
    out.print(f"user {name!r} is at version {to}")
