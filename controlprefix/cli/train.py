"""Commands that train: train, sweep, shorten, distill."""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.table import Table

from controlprefix.cli.common import NameArgument, app, out, print_table
from controlprefix.cli.groups import ColumnArguments, EngineArguments, grouped
from controlprefix.cli.options import (
    parse_list,
    parse_number,
    parse_pair,
    parse_validation,
    training_options,
)
from controlprefix.cli.runs import RunArguments, exit_when_interrupted, print_saved
from controlprefix.errors import RequestError

DataArgument = Annotated[
    Path,
    typer.Argument(
        help="Rows as JSON Lines, JSON, CSV, TSV or Parquet, also gzipped; - for standard input."
    ),
]
LearnOption = Annotated[
    str | None,
    typer.Option(
        help="What to train: any of task, attributes, user, comma-separated. Left out, the task "
        "and the attributes, as far as the rows have them."
    ),
]
ValidationOption = Annotated[
    str,
    typer.Option(
        help="Fraction of the rows to hold out, by prompt and by user, to choose the best step; "
        "or a file of rows to use instead. 0 keeps the last step."
    ),
]
InitOption = Annotated[
    Literal["text", "tokens", "random", "stored"],
    typer.Option(
        help="What prefixes start from: their training text, random tokens of it, "
        "random values, or the stored version."
    ),
]
NumSlotsOption = Annotated[int, typer.Option(min=1, help="Slots of each trained prefix.")]


@app.command()
@training_options(parameterization="shared; direct if only users are trained")
@grouped
def train(
    data: DataArgument,
    training_fields: dict[str, Any],
    learn: LearnOption = None,
    validation: ValidationOption = "0.1",
    num_slots: NumSlotsOption = 16,
    init: InitOption = "text",
    *,
    columns: ColumnArguments,
    run: RunArguments,
    engine: EngineArguments,
) -> None:
    """Train prefixes on examples and store them as new versions.

    A row is an example, such as {"task": "email", "attributes": {"formality": "formal"},
    "prompt": "Tell Sam I will be late.", "completion": "Dear Sam, …"}.
    `accelerate launch -m controlprefix.cli train …` shares the work between processes.
    """
    from controlprefix.data import as_examples
    from controlprefix.training.preparation import kinds_to_learn

    held_out, names = parse_validation(validation), columns.columns()
    defaults = columns.defaults()
    examples = as_examples(data, columns=names, defaults=defaults)
    if isinstance(held_out, str):  # fail before a model is loaded
        held_out = cast(Any, as_examples(held_out, columns=names, defaults=defaults))
    kinds: Any = None if learn is None else parse_list(learn)
    kinds_to_learn(examples, kinds)
    cp = engine.open(create=True)
    with run.recorded("train", data) as recorded:
        report = cp.train(
            examples,
            learn=kinds,
            validation=held_out,
            num_slots=num_slots,
            init=init,
            **recorded,
            **training_fields,
        )
    print_saved(report)
    if report.num_cut or report.num_skipped:
        out.print(
            f"too long for the model's context: {report.num_cut} rows cut, "
            f"{report.num_skipped} skipped"
        )
    if report.untrained:
        out.print(f"not stored, since no step had a row of it: {', '.join(report.untrained)}")
    out.print(
        f"{len(report.losses)} steps on {report.num_examples} rows ({report.num_held_out} held "
        f"out), {report.num_tokens} tokens, {report.seconds:.0f} s; best loss "
        f"{report.best_loss:.3f} nats per token at step {report.best_step}"
    )


@app.command()
@training_options("epochs", "steps", "batch_size", "learning_rate", "too_long", "seed")
@grouped
def sweep(
    data: DataArgument,
    training_fields: dict[str, Any],
    num_slots: Annotated[
        str, typer.Option(help="Numbers of slots to try, comma-separated.")
    ] = "1,2,4,8,16,32",
    parameterizations: Annotated[
        str, typer.Option(help="Any of shared, direct, mlp, shared-kv, comma-separated.")
    ] = "shared",
    learn: LearnOption = None,
    validation: ValidationOption = "0.1",
    init: InitOption = "text",
    folder: Annotated[
        Path | None, typer.Option(help="Where to write sweep.json and sweep.png.")
    ] = None,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Train with different numbers of slots, and compare validation losses; stores nothing."""
    from controlprefix.data import as_examples
    from controlprefix.training import TrainingSettings

    held_out, names = parse_validation(validation), columns.columns()
    if isinstance(held_out, str):
        held_out = cast(Any, as_examples(held_out, columns=names, defaults=columns.defaults()))
    numbers = [parse_number("--num-slots", item) for item in parse_list(num_slots)]
    if not all(number.is_integer() and number >= 1 for number in numbers):
        raise RequestError(f"--num-slots is {num_slots!r}; give whole numbers from 1, such as 4,8")
    counts = [int(number) for number in numbers]
    for name in parse_list(parameterizations):
        TrainingSettings.from_options({"parameterization": name})
    examples = as_examples(data, columns=names, defaults=columns.defaults())
    cp = engine.open()
    with exit_when_interrupted():
        report = cp.sweep(
            examples,
            num_slots=counts,
            parameterizations=cast(Any, parse_list(parameterizations)),
            learn=cast(Any, None if learn is None else parse_list(learn)),
            validation=held_out,
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
    print_table(table)
    best = report.best
    out.print(f"fewest slots within 0.01 of the lowest: {best.num_slots}, {best.parameterization}")
    if folder is not None:
        report.save(folder)
        out.print(f"written to {folder}")


@app.command()
@grouped
def shorten(
    kind: Annotated[
        Literal["task", "attribute", "user"], typer.Argument(help="task, attribute or user.")
    ],
    name: NameArgument,
    data: Annotated[Path, typer.Argument(help="Rows that name it and were not trained on.")],
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prefix's gain that must stay.")
    ] = 0.95,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Store a shorter prefix: the slots attended to most, with refitted keys and values."""
    from controlprefix.data import as_examples

    examples = as_examples(data, columns=columns.columns(), defaults=columns.defaults())
    report = engine.open().shorten(kind, name, examples, keep=keep)
    table = Table("slots", "nats per token")
    for count, loss in report.curve:
        table.add_row(str(count), f"{loss:.4f}")
    print_table(table)
    out.print(f"stored {kind} {name!r} version {report.version}: {report.num_slots} slots")


@app.command()
@training_options("epochs", "steps", "batch_size", "learning_rate", "too_long", "seed")
@grouped
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
    *,
    run: RunArguments,
    engine: EngineArguments,
) -> None:
    """Train a prefix that does what an instruction does; needs prompts, no labelled data."""
    from controlprefix.data import read_texts
    from controlprefix.training.distillation import distillation_target

    name, label = parse_pair("--attribute", attribute) if attribute else (None, None)
    distillation_target(task=task, attribute=name, label=label, user=user)
    texts = read_texts(prompts)
    cp = engine.open(create=True)
    with run.recorded("distill", prompts[0]) as recorded:
        report = cp.distill(
            instruction,
            texts,
            task=task,
            attribute=name,
            label=label,
            user=user,
            num_slots=num_slots,
            **recorded,
            **training_fields,
        )
    print_saved(report)
    out.print(
        f"{len(report.losses)} steps, {report.seconds:.0f} s; divergence from the instructed "
        f"model {report.best_loss:.3f} nats per token at step {report.best_step}"
    )
