"""Commands that learn: train, sweep, shorten, distill."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from controlprefix.cli.common import (
    MODEL,
    STORE,
    TENANT,
    ModelOption,
    SpaceOption,
    StoreOption,
    TenantOption,
    app,
    is_main_process,
    kind_of,
    listed,
    make_accelerator,
    number,
    one_of,
    open_engine,
    out,
    pair,
    run_folder,
)

DataArgument = Annotated[Path, typer.Argument(help="JSON Lines, an example a line.")]
LearnOption = Annotated[
    str, typer.Option(help="What to learn: any of task, attributes, user, with commas.")
]
DefaultTaskOption = Annotated[str | None, typer.Option(help="For examples that name no task.")]
InitOption = Annotated[str, typer.Option(help="Start from: text, tokens, random, or stored.")]
EpochsOption = Annotated[float, typer.Option(help="Passes over the examples.")]
StepsOption = Annotated[int | None, typer.Option(help="Steps in all, in place of epochs.")]
BatchOption = Annotated[int, typer.Option(help="Examples a step.")]
RateOption = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate, at its highest; left out, the tested one."),
]
ValidationOption = Annotated[float, typer.Option(help="Fraction held out to choose the best step.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the split and the order of examples.")]


@app.command()
def train(
    data: DataArgument,
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    slots: Annotated[int, typer.Option(help="Slots of each learned prefix.")] = 16,
    init: InitOption = "text",
    parameterization: Annotated[
        str | None,
        typer.Option(
            help="How slots are produced: shared, direct, mlp, or shared-kv; left out, "
            "shared, and for users alone direct."
        ),
    ] = None,
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples at a time, where memory is short.")
    ] = None,
    learning_rate: RateOption = None,
    contrast: Annotated[
        float, typer.Option(help="Weight of making other labels' text unlikely: 0 to below 1.")
    ] = 0.0,
    validation: ValidationOption = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a better one.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where to write learning curves and the run's state."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the state in --folder, if there is one; without it, in DATA's "
            "name and '.run'.",
        ),
    ] = False,
    tracker: Annotated[
        str | None, typer.Option(help="Log to one of accelerate's trackers, such as tensorboard.")
    ] = None,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
    attributes: SpaceOption = None,
) -> None:
    """Learn prefixes from examples and store them as new versions.

    Each line of the file is such as {"task": "email", "attributes": {"formality":
    "formal"}, "prompt": "Tell Sam I will be late.", "completion": "Dear Sam, …"}.
    `accelerate launch -m controlprefix.cli train …` shares the work between processes.
    """
    from controlprefix.interop.data_files import read_examples

    folder = run_folder(data, folder, resume)
    examples = read_examples(data, **({"task": task} if task else {}))
    cp = open_engine(model, store, tenant, attributes)
    usual: dict[str, Any] = {"parameterization": parameterization} if parameterization else {}
    report = cp.train(
        examples,
        learn=cast(Any, listed(learn)),
        num_slots=slots,
        init=one_of("--init", init, ("text", "tokens", "random", "stored")),
        folder=folder,
        resume=resume,
        accelerator=make_accelerator(tracker, folder) if tracker else None,
        **usual,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        contrast=contrast,
        validation=validation,
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    if not is_main_process():
        return
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.num_tokens} tokens, {report.seconds:.0f} s; "
        f"best loss {report.best_loss:.3f} nats a token at step {report.best_step}"
    )


@app.command()
def sweep(
    data: DataArgument,
    slots: Annotated[
        str, typer.Option(help="Numbers of slots to try, with commas.")
    ] = "1,2,4,8,16,32",
    parameterization: Annotated[
        str, typer.Option(help="Any of shared, direct, mlp, shared-kv, with commas.")
    ] = "shared",
    learn: LearnOption = "task,attributes",
    task: DefaultTaskOption = None,
    init: InitOption = "text",
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    learning_rate: RateOption = None,
    validation: ValidationOption = 0.1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write sweep.json and sweep.png.")
    ] = None,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn with different numbers of slots, and compare the held-out losses; stores nothing."""
    from controlprefix.interop.data_files import read_examples

    examples = read_examples(data, **({"task": task} if task else {}))
    report = open_engine(model, store, tenant).sweep(
        examples,
        slots=[int(number("--slots", one)) for one in listed(slots)],
        parameterizations=cast(Any, listed(parameterization)),
        learn=cast(Any, listed(learn)),
        init=one_of("--init", init, ("text", "tokens", "random", "stored")),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        seed=seed,
    )
    table = Table("parameterization", "slots", "held-out nats a token", "seconds")
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
    kind: Annotated[str, typer.Argument(help="task, attribute or user.")],
    name: Annotated[str, typer.Argument(help="Such as email, formality=formal, or ana.")],
    data: Annotated[Path, typer.Argument(help="JSON Lines: examples of it, not trained on.")],
    keep: Annotated[float, typer.Option(help="Share of the prefix's gain that must stay.")] = 0.95,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Drop the slots that attention uses least, and store the shorter prefix."""
    from controlprefix.interop.data_files import read_examples

    examples = read_examples(data)
    report = open_engine(model, store, tenant).shorten(kind_of(kind), name, examples, keep=keep)
    table = Table("slots", "nats a token")
    for count, loss in report.curve:
        table.add_row(str(count), f"{loss:.4f}")
    out.print(table)
    out.print(f"stored {kind} {name!r} version {report.version}: {report.num_slots} slots")


@app.command()
def distill(
    instruction: Annotated[str, typer.Argument(help="What the prefix should do.")],
    prompts: Annotated[list[Path], typer.Argument(help="Text files, a prompt a line.")],
    task: Annotated[str | None, typer.Option("--task", help="Learn this task.")] = None,
    attribute: Annotated[
        str | None, typer.Option("--attribute", "-a", help="Learn this label: formality=formal.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="Learn this user.")] = None,
    slots: Annotated[int, typer.Option(help="Slots of the prefix.")] = 16,
    epochs: EpochsOption = 3.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 8,
    learning_rate: RateOption = None,
    validation: ValidationOption = 0.1,
    seed: SeedOption = 0,
    model: ModelOption = MODEL,
    store: StoreOption = STORE,
    tenant: TenantOption = TENANT,
) -> None:
    """Learn a prefix that does what an instruction does; needs prompts, no labelled data."""
    from controlprefix.interop.data_files import read_texts

    named, label = pair("--attribute", attribute) if attribute else (None, None)
    report = open_engine(model, store, tenant).distill(
        instruction,
        read_texts(prompts),
        task=task,
        attribute=named,
        label=label,
        user=user,
        num_slots=slots,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        seed=seed,
    )
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")
    out.print(
        f"{len(report.losses)} steps, {report.seconds:.0f} s; divergence from the instructed "
        f"model {report.best_loss:.3f} nats a token at step {report.best_step}"
    )
