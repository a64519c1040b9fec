"""Commands that train: train, sweep, shorten, distill."""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    AttributeFileOption,
    EncryptionKeysOption,
    KindArgument,
    ModelOption,
    NameArgument,
    StoreOption,
    TenantOption,
    app,
    is_main_process,
    make_accelerator,
    open_engine,
    out,
    run_folder,
)
from controlprefix.cli.options import parse_list, parse_number, parse_pair, training_options

DataArgument = Annotated[Path, typer.Argument(help="JSON Lines file, one example per line.")]
LearnOption = Annotated[
    str, typer.Option(help="What to train: any of task, attributes, user, with commas.")
]
DefaultTaskOption = Annotated[str | None, typer.Option(help="Task of examples that name none.")]
InitOption = Annotated[
    Literal["text", "tokens", "random", "stored"],
    typer.Option(
        help="What prefixes start from: their training text, random tokens of it, "
        "random values, or the stored version."
    ),
]
NumSlotsOption = Annotated[int, typer.Option(help="Slots of each trained prefix.")]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue from the checkpoint in --folder, by default DATA's name and '.run'.",
    ),
]


@app.command()
@training_options(parameterization="shared; direct if only users are trained")
def train(
    data: DataArgument,
    training_fields: dict[str, Any],
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    num_slots: NumSlotsOption = 16,
    init: InitOption = "text",
    folder: Annotated[
        Path | None, typer.Option(help="Where to write checkpoints and learning curves.")
    ] = None,
    resume: ResumeOption = False,
    tracker: Annotated[
        str | None, typer.Option(help="Log to one of accelerate's trackers, such as tensorboard.")
    ] = None,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
    attribute_file: AttributeFileOption = None,
) -> None:
    """Train prefixes on examples and store them as new versions.

    Each line of the file is an example, such as {"task": "email", "attributes": {"formality":
    "formal"}, "prompt": "Tell Sam I will be late.", "completion": "Dear Sam, …"}.
    `accelerate launch -m controlprefix.cli train …` shares the work between processes.
    """
    from controlprefix.interop import read_examples

    folder = run_folder(data, folder, resume)
    examples = read_examples(data, **({"task": task} if task else {}))
    cp = open_engine(
        model, store, tenant, encryption_keys=encryption_keys, attributes=attribute_file
    )
    kinds = parse_list(learn)
    report = cp.train(
        examples,
        learn=cast(Any, kinds),
        num_slots=num_slots,
        init=init,
        folder=folder,
        resume=resume,
        accelerator=make_accelerator(tracker, folder) if tracker else None,
        **training_fields,
    )
    if not is_main_process():
        return
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.num_tokens} tokens, {report.seconds:.0f} s; "
        f"best loss {report.best_loss:.3f} nats per token at step {report.best_step}"
    )


@app.command()
@training_options("epochs", "steps", "batch_size", "learning_rate", "validation", "seed")
def sweep(
    data: DataArgument,
    training_fields: dict[str, Any],
    num_slots: Annotated[
        str, typer.Option(help="Numbers of slots to try, with commas.")
    ] = "1,2,4,8,16,32",
    parameterizations: Annotated[
        str, typer.Option(help="Any of shared, direct, mlp, shared-kv, with commas.")
    ] = "shared",
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    init: InitOption = "text",
    folder: Annotated[
        Path | None, typer.Option(help="Where to write sweep.json and sweep.png.")
    ] = None,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Train with different numbers of slots, and compare validation losses; stores nothing."""
    from controlprefix.interop import read_examples

    examples = read_examples(data, **({"task": task} if task else {}))
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.sweep(
        examples,
        num_slots=[int(parse_number("--num-slots", item)) for item in parse_list(num_slots)],
        parameterizations=cast(Any, parse_list(parameterizations)),
        learn=cast(Any, parse_list(learn)),
        init=init,
        **training_fields,
    )
    table = Table("parameterization", "slots", "validation loss, nats per token", "seconds")
    for point in report.points:
        table.add_row(
            point.parameterization,
            str(point.num_slots),
            f"{point.loss:.4f}",
            f"{point.seconds:.0f}",
        )
    out.print(table)
    best = report.best
    out.print(f"fewest slots within 0.01 of the lowest: {best.num_slots}, {best.parameterization}")
    if folder is not None:
        report.save(folder)
        out.print(f"written to {folder}")


@app.command()
def shorten(
    kind: KindArgument,
    name: NameArgument,
    data: Annotated[
        Path, typer.Argument(help="JSON Lines file: examples of it that it was not trained on.")
    ],
    keep: Annotated[float, typer.Option(help="Share of the prefix's gain that must stay.")] = 0.95,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Drop the slots that attention uses least, and store the shorter prefix."""
    from controlprefix.interop import read_examples

    examples = read_examples(data)
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.shorten(kind, name, examples, keep=keep)
    table = Table("slots", "nats per token")
    for count, loss in report.curve:
        table.add_row(str(count), f"{loss:.4f}")
    out.print(table)
    out.print(f"stored {kind} {name!r} version {report.version}: {report.num_slots} slots")


@app.command()
@training_options("epochs", "steps", "batch_size", "learning_rate", "validation", "seed")
def distill(
    instruction: Annotated[str, typer.Argument(help="What the prefix should do.")],
    prompts: Annotated[list[Path], typer.Argument(help="Text files, one prompt per line.")],
    training_fields: dict[str, Any],
    task: Annotated[str | None, typer.Option("--task", help="Train this task.")] = None,
    attribute: Annotated[
        str | None, typer.Option("--attribute", "-a", help="Train this label: formality=formal.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="Train this user.")] = None,
    num_slots: NumSlotsOption = 16,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    encryption_keys: EncryptionKeysOption = None,
) -> None:
    """Train a prefix that does what an instruction does; needs prompts, no labelled data."""
    from controlprefix.interop import read_texts

    name, label = parse_pair("--attribute", attribute) if attribute else (None, None)
    cp = open_engine(model, store, tenant, encryption_keys=encryption_keys)
    report = cp.distill(
        instruction,
        read_texts(prompts),
        task=task,
        attribute=name,
        label=label,
        user=user,
        num_slots=num_slots,
        **training_fields,
    )
    for saved, version in report.saved.items():
        out.print(f"stored {saved} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.seconds:.0f} s; divergence from the instructed "
        f"model {report.best_loss:.3f} nats per token at step {report.best_step}"
    )
