"""Commands about users: enroll, users, audit."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    EncryptionKeysOption,
    ModelOption,
    StoreOption,
    TenantOption,
    app,
    audit_app,
    open_engine,
    open_store,
    out,
    run_folder,
    users_app,
)
from controlprefix.cli.options import training_options
from controlprefix.errors import RequestError

DecoderOption = Annotated[
    str | None, typer.Option("--decoder", help="A stored decoder: see `users decoder`.")
]
UserArgument = Annotated[str, typer.Argument(help="Name of the user.")]
_DATA_HELP = 'JSON Lines file, one text per line: {"user": "ana", "text": "…"}.'


@app.command()
def enroll(
    user: UserArgument,
    texts: Annotated[list[Path], typer.Argument(help="Text files, one text per line.")],
    decoder: DecoderOption = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Then train the prefix on the texts, for some seconds.")
    ] = False,
    num_slots: Annotated[
        int, typer.Option(help="Without a decoder: slots at most, one per token of text.")
    ] = 64,
    keep_texts: Annotated[
        bool, typer.Option("--keep-texts", help="Store the texts too, for `users train`.")
    ] = False,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Store a usable prefix for a user at once, from texts they wrote, without training."""
    from controlprefix.interop import read_texts

    user_texts = read_texts(texts)
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    version = cp.enroll(
        user,
        user_texts,
        decoder=decoder,
        refine=refine,
        num_slots=num_slots,
        keep_texts=keep_texts,
    )
    out.print(f"stored user {user!r} version {version}, from {len(user_texts)} texts")


@users_app.command("train")
@training_options(
    "epochs", "steps", "batch_size", "learning_rate", "validation", "patience", "seed",
    batch_size=4, patience=2,
)  # fmt: skip
def train_users(
    training_fields: dict[str, Any],
    data: Annotated[
        Path | None,
        typer.Argument(help=f"{_DATA_HELP} Left out: the texts kept in the store."),
    ] = None,
    decoder: DecoderOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="With a decoder: train all slots, not a code.")
    ] = False,
    num_slots: Annotated[int, typer.Option(help="Slots per prefix, without a decoder.")] = 16,
    concurrent_users: Annotated[int, typer.Option(help="Users at a time.")] = 16,
    folder: Annotated[
        Path | None, typer.Option(help="Folder where finished users are recorded.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Skip users recorded in --folder, by default DATA's name and '.run'."
        ),
    ] = False,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Train a prefix for each of many users, and store each as soon as it is finished."""
    from controlprefix.interop import read_users

    texts = None if data is None else read_users(data)
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.train_users(
        texts,
        decoder=decoder,
        as_codes=not full,
        num_slots=num_slots,
        concurrent_users=concurrent_users,
        folder=run_folder(data or Path("users"), folder, resume),
        resume=resume,
        **training_fields,
    )
    for user, reason in report.failed.items():
        out.print(f"not stored: user {user!r}: {reason}")
    num_users = len(report.users) + len(report.failed) + len(report.skipped)
    skipped = f", {len(report.skipped)} were finished before" if report.skipped else ""
    out.print(f"stored {len(report.users)} of {num_users} users in {report.seconds:.0f} s{skipped}")


@users_app.command("decoder")
@training_options(
    "epochs", "steps", "batch_size", "learning_rate", "validation", "seed", batch_size=16
)
def learn_decoder(
    data: Annotated[Path, typer.Argument(help=_DATA_HELP)],
    training_fields: dict[str, Any],
    name: Annotated[str, typer.Option(help="Name of the decoder.")] = "users",
    num_slots: Annotated[int, typer.Option(help="Slots of the prefixes.")] = 16,
    width: Annotated[int, typer.Option(help="Values of a code per slot.")] = 64,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write checkpoints and learning curves.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the checkpoint in --folder, by default DATA's name and '.run'.",
        ),
    ] = False,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Train a decoder of user codes: what many users have in common, and how they differ."""
    from controlprefix.interop import read_users

    texts = read_users(data)
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.learn_decoder(
        texts,
        name=name,
        num_slots=num_slots,
        width=width,
        folder=run_folder(data, folder, resume),
        resume=resume,
        **training_fields,
    )
    out.print(
        f"stored decoder {name!r} version {report.version}, from {report.num_users} users; codes "
        f"are predicted from texts with R² {report.r2:.2f}"
    )


@users_app.command("texts")
def show_texts(
    user: UserArgument,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Print the texts of a user that are kept in the store."""
    with open_store(store, tenant, encryption_keys) as opened:
        texts = opened.samples(user)
    if not texts:
        raise RequestError(f"no texts of user {user!r} are kept; enroll with --keep-texts")
    for text in texts:
        out.print(text, soft_wrap=True)


@users_app.command("forget")
def forget_user(
    user: UserArgument, store: StoreOption = STORE, tenant: TenantOption = TENANT
) -> None:
    """Remove every version of a user's prefix, for all models, and their kept texts."""
    from controlprefix.prefixes import PrefixKey

    with open_store(store, tenant) as opened:
        num_removed = opened.forget(PrefixKey("user", user))
    out.print(f"forgot user {user!r}: {num_removed} versions removed")


@audit_app.command("user")
def audit_user(
    user: UserArgument,
    texts: Annotated[Path, typer.Option(help="Texts it was trained on, one per line.")],
    held_out: Annotated[Path, typer.Option(help="Other texts of the author, one per line.")],
    num_canaries: Annotated[
        int, typer.Option(help="Secret numbers to plant, to train the prefix again with.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the secret numbers.")] = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Measure what a user's prefix reveals of the texts it was trained on."""
    from controlprefix.interop import read_texts

    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.audit_user(
        user,
        read_texts([texts]),
        read_texts([held_out]),
        num_canaries=num_canaries,
        seed=seed,
    )
    table = Table("measure", "value", "if nothing is revealed")
    table.add_row("gain on held-out texts, nats per token", f"{report.gain:.3f}", "")
    table.add_row("membership inference, AUC", f"{report.membership_auc:.2f}", "0.50")
    table.add_row(
        "texts continued word for word",
        f"{report.extraction_rate:.0%}",
        f"{report.extraction_rate_without:.0%}",
    )
    if report.exposure_bits is not None:
        chance = f"about 1 (at most {report.max_exposure_bits:.0f})"
        table.add_row("exposure of planted numbers, bits", f"{report.exposure_bits:.1f}", chance)
    out.print(table)
