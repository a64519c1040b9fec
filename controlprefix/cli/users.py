"""Commands about users: enroll, users, audit."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from controlprefix.cli.common import app, audit_app, out, print_table, print_text, users_app
from controlprefix.cli.groups import (
    ALL_OF_A_USER,
    ClusterArguments,
    ColumnArguments,
    EngineArguments,
    StoreArguments,
    YesOption,
    grouped,
    require_yes,
)
from controlprefix.cli.options import training_options
from controlprefix.cli.runs import RunArguments, UsersRunArguments, exit_when_interrupted
from controlprefix.errors import RequestError

if TYPE_CHECKING:
    from controlprefix.users import EnrolmentReport, UsersReport

DecoderOption = Annotated[
    str | None, typer.Option("--decoder", help="A stored decoder: see `users decoder`.")
]
RefineOption = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="Train for some seconds: the predicted code, or, without a decoder, up to 16 slots "
        "from the first tokens.",
    ),
]
EnrolledSlotsOption = Annotated[
    int | None, typer.Option(min=1, help="Without a decoder: slots at most; left out, 64.")
]
KeepTextsOption = Annotated[
    bool, typer.Option("--keep-texts", help="Store the texts too, for `users train`.")
]
GuardOption = Annotated[
    bool,
    typer.Option(
        "--guard",
        help="With a decoder: shrink the predicted code towards the mean code, by the factor with "
        "the lowest loss on held-out texts of the user.",
    ),
]
KeepProfileOption = Annotated[
    bool, typer.Option("--keep-profile", help="Store the mean embedding of the texts too.")
]
UserArgument = Annotated[str, typer.Argument(help="Name of the user.")]
SplitOption = Annotated[
    Literal["line", "paragraph", "file"],
    typer.Option(help="What is one text in a plain text file."),
]
_DATA_HELP = 'Rows such as {"user": "ana", "text": "…"}: JSON Lines, JSON, CSV, TSV or Parquet.'


@app.command()
@grouped
def enroll(
    user: UserArgument,
    texts: Annotated[
        list[Path],
        typer.Argument(
            help="Text files, or files of rows, of which those of the user are taken; - for "
            "standard input."
        ),
    ],
    split: SplitOption = "line",
    decoder: DecoderOption = None,
    refine: RefineOption = False,
    num_slots: EnrolledSlotsOption = None,
    keep_texts: KeepTextsOption = False,
    keep_profile: KeepProfileOption = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="With the decoder of the earlier enrolment: update the code with them too.",
        ),
    ] = False,
    guard: GuardOption = False,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Store a usable prefix for a user at once, from texts they wrote; only --refine trains."""
    from controlprefix.data import read_texts
    from controlprefix.store.records import check_name
    from controlprefix.users.enrolment import EnrolmentOptions

    check_name("user", user)
    options = EnrolmentOptions(
        decoder=decoder,
        refine=refine,
        num_slots=num_slots,
        keep_texts=keep_texts,
        keep_profile=keep_profile,
        add=add,
        guard=guard,
    )
    user_texts = read_texts(texts, split=split, columns=columns.columns(), user=user)
    cp = engine.open(create=True)
    version = cp.enroll(user, user_texts, **asdict(options))
    info = cp.version_info("user", user, version=version)
    read = f"{len(user_texts)} texts"
    if decoder is None and not refine:
        read += f", {info.details['enrolled']['tokens']} tokens, in {info.num_slots} slots"
    if guard:
        share = info.details["enrolled"]["share"]
        read += f"; guard kept {share:.0%} of the code's distance from the mean code"
    out.print(f"stored user {user!r} version {version}, from {read}")


@users_app.command("train")
@training_options(
    "epochs", "steps", "batch_size", "learning_rate", "validation", "patience", "seed",
    batch_size=4, patience=2,
)  # fmt: skip
@grouped
def train_users(
    training_fields: dict[str, Any],
    data: Annotated[
        Path | None,
        typer.Argument(help=f"{_DATA_HELP} Left out: the texts kept in the store."),
    ] = None,
    decoder: DecoderOption = None,
    as_codes: Annotated[
        bool | None,
        typer.Option(
            help="With a decoder: train and store codes only (the default), or all slots."
        ),
    ] = None,
    num_slots: Annotated[
        int | None,
        typer.Option(min=1, help="Slots per prefix, without a decoder; left out, 16."),
    ] = None,
    concurrent_users: Annotated[int, typer.Option(help="Users at a time.")] = 16,
    *,
    columns: ColumnArguments,
    run: UsersRunArguments,
    cluster: ClusterArguments,
    engine: EngineArguments,
) -> None:
    """Train a prefix for each of many users, and store each as soon as it is finished."""
    from controlprefix.data import read_users

    texts = None if data is None else read_users(data, columns=columns.columns())
    options = {
        "decoder": decoder,
        "as_codes": as_codes,
        "num_slots": num_slots,
        "concurrent_users": concurrent_users,
        **training_fields,
    }
    if not cluster.is_used():
        cp = engine.open(create=True)
        with run.recorded("users train", data or Path("users")) as recorded:
            report = cp.train_users(texts, **recorded, **options)
    else:
        if texts is None:
            raise RequestError("a cluster trains on texts of a file; give one")
        if run != UsersRunArguments():
            raise RequestError("--ray has no run folder; leave the options of one out")
        with exit_when_interrupted():
            report = cluster.connect(engine).train_users(texts, **options)
    _print_stored(report)


@users_app.command("enroll")
@grouped
def enroll_users(
    data: Annotated[Path, typer.Argument(help=_DATA_HELP)],
    decoder: DecoderOption = None,
    refine: RefineOption = False,
    num_slots: EnrolledSlotsOption = None,
    keep_texts: KeepTextsOption = False,
    keep_profile: KeepProfileOption = False,
    guard: GuardOption = False,
    *,
    columns: ColumnArguments,
    cluster: ClusterArguments,
    engine: EngineArguments,
) -> None:
    """Store a usable prefix for each of many users at once, from texts they wrote."""
    from controlprefix.data import read_users

    texts = read_users(data, columns=columns.columns())
    options: dict[str, Any] = {
        "decoder": decoder,
        "refine": refine,
        "num_slots": num_slots,
        "keep_texts": keep_texts,
        "keep_profile": keep_profile,
        "guard": guard,
    }
    with exit_when_interrupted():
        if not cluster.is_used():
            report = engine.open(create=True).enroll_users(texts, **options)
        else:
            report = cluster.connect(engine).enroll_users(texts, **options)
    _print_stored(report)


def _print_stored(report: "UsersReport | EnrolmentReport") -> None:
    for user, reason in report.failed.items():
        out.print(f"not stored: user {user!r}: {reason}")
    num_users = len(report.users) + len(report.failed) + len(report.skipped)
    skipped = f", {len(report.skipped)} were finished before" if report.skipped else ""
    out.print(f"stored {len(report.users)} of {num_users} users in {report.seconds:.0f} s{skipped}")
    if report.failed:
        raise typer.Exit(1)


@users_app.command("migrate")
@grouped
def migrate_users(
    source: Annotated[
        str, typer.Option("--from", help="The model that users have codes of, as in --model.")
    ],
    decoder: Annotated[
        str, typer.Option("--decoder", help="The new model's decoder: see `users decoder`.")
    ] = "users",
    from_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the model of --from.")
    ] = None,
    *,
    engine: EngineArguments,
) -> None:
    """Give the users of one model codes of another, without their texts.

    What codes become is learned from users who have one on both: eight at least.
    """
    new = engine.open()
    old = replace(engine, model=source, revision=from_revision).open()
    report = new.migrate_users(old, decoder=decoder)
    for user, reason in report.skipped.items():
        out.print(f"not migrated: user {user!r}: {reason}")
    out.print(
        f"stored {len(report.saved)} users; learned from {report.num_shared}, cross-validated R² "
        f"{report.r2:.2f}"
    )


@users_app.command("decoder")
@training_options(
    "epochs", "steps", "batch_size", "learning_rate", "validation", "seed", batch_size=16
)
@grouped
def learn_decoder(
    data: Annotated[Path, typer.Argument(help=_DATA_HELP)],
    training_fields: dict[str, Any],
    name: Annotated[str, typer.Option(help="Name of the decoder.")] = "users",
    num_slots: Annotated[int, typer.Option(min=1, help="Slots of the prefixes.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Values of a code per slot.")] = 64,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="sentence-transformers model of the text features; left out, all-MiniLM-L6-v2."
        ),
    ] = None,
    *,
    columns: ColumnArguments,
    run: RunArguments,
    engine: EngineArguments,
) -> None:
    """Train a decoder of user codes: what many users have in common, and how they differ."""
    from controlprefix.data import read_users

    texts = read_users(data, columns=columns.columns())
    cp = engine.open(create=True)
    if embedder is not None:
        training_fields["embedder"] = embedder
    with run.recorded("users decoder", data) as recorded:
        report = cp.learn_decoder(
            texts,
            name=name,
            num_slots=num_slots,
            width=width,
            **recorded,
            **training_fields,
        )
    out.print(
        f"stored decoder {name!r} version {report.version}, from {report.num_users} users; codes "
        f"are predicted from texts with R² {report.r2:.2f}"
    )


@users_app.command("texts")
@grouped
def show_texts(
    user: UserArgument,
    *,
    store: StoreArguments,
) -> None:
    """Print the texts of a user that are kept in the store."""
    with store.open_store() as opened:
        texts = opened.user_texts(user)
    if not texts:
        raise RequestError(f"no texts of user {user!r} are kept; enroll with --keep-texts")
    for text in texts:
        print_text(text)


@users_app.command("forget")
@grouped
def forget_user(user: UserArgument, yes: YesOption = False, *, store: StoreArguments) -> None:
    """Remove every version of a user's prefix, kept texts, feedback, jobs and profile."""
    from controlprefix.prefixes import PrefixKey

    require_yes(yes, f"Remove {ALL_OF_A_USER} of user {user!r}, for good?")
    with store.open_store() as opened:
        num_removed = opened.forget(PrefixKey("user", user))
    out.print(f"forgot user {user!r}: {num_removed} versions removed")


@audit_app.command("user")
@grouped
def audit_user(
    user: UserArgument,
    texts: Annotated[
        Path, typer.Option(help="File of the texts it was trained on; of rows, the user's.")
    ],
    held_out: Annotated[Path, typer.Option(help="File of other texts of the author.")],
    num_canaries: Annotated[
        int, typer.Option(help="Secret numbers to plant, to train the prefix again with.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the secret numbers.")] = 0,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Measure what a user's prefix reveals of the texts it was trained on."""
    from controlprefix.data import read_texts

    trained_on, others = (
        read_texts([file], columns=columns.columns(), user=user) for file in (texts, held_out)
    )
    report = engine.open().audit_user(
        user,
        trained_on,
        others,
        num_canaries=num_canaries,
        seed=seed,
    )
    table = Table("measure", "value", "if nothing is revealed")
    table.add_row("gain on held-out texts, nats per token", f"{report.gain:.3f}", "")
    table.add_row("membership inference, AUC", f"{report.membership_auc:.2f}", "0.50")
    rates = (report.extraction_rate, report.extraction_rate_without)
    table.add_row(
        f"of {report.num_long_texts} long texts, continued word for word",
        *("not measured" if rate is None else f"{rate:.0%}" for rate in rates),
    )
    if report.exposure_bits is not None:
        chance = f"about 1.4 (at most {report.max_exposure_bits:.0f})"
        table.add_row("exposure of planted numbers, bits", f"{report.exposure_bits:.1f}", chance)
    print_table(table)
