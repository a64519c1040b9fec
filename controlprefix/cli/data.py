"""Commands about files of rows: data show."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controlprefix.cli.common import data_app, out
from controlprefix.cli.groups import ColumnArguments, ModelArguments, grouped
from controlprefix.errors import shortened

_MAX_NAMES = 20


@data_app.command("show")
@grouped
def show_data(
    data: Annotated[
        Path, typer.Argument(help="Rows as JSON Lines, JSON, CSV, TSV or Parquet, also gzipped.")
    ],
    tokens: Annotated[
        bool,
        typer.Option(help="Count tokens, and rows that are too long, with --model; else words."),
    ] = True,
    *,
    columns: ColumnArguments,
    model: ModelArguments,
) -> None:
    """Show what is understood of a file before anything is trained: rows, lengths, labels."""
    from controlprefix.data import as_examples, summarize

    examples = as_examples(data, columns=columns.columns(), defaults=columns.defaults())
    if tokens:
        tokenizer = model.load().request_tokenizer
        summary = summarize(examples, num_tokens=tokenizer.num_tokens, fits=tokenizer.fits)
    else:
        summary = summarize(examples)
    prompts = f"{summary.num_prompts} different prompts"
    if summary.num_without_prompt:
        prompts += f", {summary.num_without_prompt} texts without a prompt"
    out.print(f"{summary.num_rows} rows: {prompts}, {summary.num_duplicates} duplicates")
    lengths = Table(summary.unit, "shortest", "median", "longest")
    for name, values in (
        ("prompt", summary.prompt_lengths),
        ("completion", summary.completion_lengths),
    ):
        lengths.add_row(name, str(values.shortest), str(values.median), str(values.longest))
    out.print(lengths)
    names = Table("field", "name", "rows")
    groups = {"task": summary.tasks, **summary.labels, "user": summary.users}
    for group, counts in groups.items():
        for name, count in list(counts.items())[:_MAX_NAMES]:
            names.add_row(group, name, str(count))
        if len(counts) > _MAX_NAMES:
            names.add_row(group, f"… {len(counts)} in all", "")
    if names.row_count:
        out.print(names)
    if summary.too_long:
        out.print(
            f"{len(summary.too_long)} rows do not fit the model's context: "
            f"{shortened(summary.too_long)}; --too-long cut or skip takes care of them"
        )
