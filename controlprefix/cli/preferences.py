"""The command that trains on preferences: train-preferences."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from controlprefix.cli.common import app, out
from controlprefix.cli.groups import ColumnArguments, EngineArguments, grouped
from controlprefix.cli.options import (
    objective_options,
    parse_list,
    parse_validation,
    training_options,
)
from controlprefix.cli.runs import RunArguments, print_saved
from controlprefix.cli.train import NumSlotsOption, ValidationOption
from controlprefix.errors import RequestError


@app.command("train-preferences")
@training_options(
    "epochs",
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "patience",
    "gradient_checkpointing",
    "save_steps",
    "too_long",
    "seed",
    learning_rate=0.01,
)
@objective_options("PreferenceSettings")
@grouped
def train_preferences(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Rows with a prompt, a chosen and a rejected completion; left out, the feedback "
            "that the store keeps."
        ),
    ] = None,
    *,
    training_fields: dict[str, Any],
    objective_fields: dict[str, Any],
    learn: Annotated[
        str | None,
        typer.Option(
            help="What to train: any of task, attributes, user, comma-separated. Left out, the "
            "users if rows name any, or else the task and the attributes."
        ),
    ] = None,
    validation: ValidationOption = "0.1",
    num_slots: NumSlotsOption = 16,
    columns: ColumnArguments,
    run: RunArguments,
    engine: EngineArguments,
) -> None:
    """Train prefixes on which of two completions was preferred, such as users' feedback.

    A row is a preference, such as {"user": "ana", "prompt": "Tell Sam I will be late.",
    "chosen": "Running late, sorry!", "rejected": "Dear Sam, …"}.
    """
    from controlprefix.data import as_preferences

    rows, held_out = None, parse_validation(validation)
    if columns.text_column or columns.completion_column:
        raise RequestError(
            "preferences have a prompt, a chosen and a rejected completion; leave --text and "
            "--completion out, and name those columns so"
        )
    if data is not None:
        rows = as_preferences(data, columns=columns.columns(), defaults=columns.defaults())
    cp = engine.open(create=True)
    with run.recorded("train-preferences", data or Path("feedback")) as recorded:
        report = cp.train_preferences(
            rows,
            columns=columns.columns(),
            task=columns.task,
            learn=cast(Any, None if learn is None else parse_list(learn)),
            validation=held_out,
            num_slots=num_slots,
            **recorded,
            **objective_fields,
            **training_fields,
        )
    print_saved(report)
    accuracy = report.metrics[-1]["accuracy"]
    out.print(
        f"{len(report.losses)} steps on {report.num_examples} preferences ({report.num_held_out} "
        f"held out), {report.seconds:.0f} s; the last step had {accuracy:.2f} of them right"
    )
