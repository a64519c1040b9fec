"""Commands about files of rows: data show, data ratios."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controlprefix.cli.common import data_app, out, print_table
from controlprefix.cli.groups import (
    ColumnArguments,
    ModelArguments,
    YesOption,
    grouped,
    require_yes,
)
from controlprefix.errors import RequestError, TrainingDataError, shortened

_MAX_NAMES = 20


@data_app.command("show")
@grouped
def show_data(
    data: Annotated[
        Path, typer.Argument(help="Rows as JSON Lines, JSON, CSV, TSV or Parquet, also gzipped.")
    ],
    tokens: Annotated[
        bool,
        typer.Option(
            help="Count tokens, and list rows longer than the context, which loads --model; or "
            "count words."
        ),
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
    print_table(lengths)
    names = Table("field", "name", "rows")
    groups = {"task": summary.tasks, **summary.labels, "user": summary.users}
    for group, counts in groups.items():
        for name, count in list(counts.items())[:_MAX_NAMES]:
            names.add_row(group, name, str(count))
        if len(counts) > _MAX_NAMES:
            names.add_row(group, f"… {len(counts)} in all", "")
    if names.row_count:
        print_table(names)
    if summary.too_long:
        out.print(
            f"{len(summary.too_long)} rows do not fit the model's context: "
            f"{shortened(summary.too_long)}; --too-long cut or skip takes care of them"
        )


@data_app.command("ratios")
@grouped
def add_ratios(
    data: Annotated[
        Path, typer.Argument(help="Rows as JSON Lines, JSON, CSV, TSV or Parquet, also gzipped.")
    ],
    output: Annotated[Path, typer.Argument(help="Where to write them, as JSON Lines.")],
    source: Annotated[
        str | None,
        typer.Option(help="Column of the texts that completions were made of; else the prompts."),
    ] = None,
    ratio: Annotated[
        list[str] | None,
        typer.Option(help="length, similarity or word_rank; left out, all three. Repeatable."),
    ] = None,
    language: Annotated[str, typer.Option(help="Language of the texts.")] = "en",
    yes: YesOption = False,
    *,
    columns: ColumnArguments,
) -> None:
    """Add control ratios to rows: how a completion relates to its source, as numbers of attributes.

    Training learns numbers as a scale, so that a request can ask for any value between.
    """
    from controlprefix._io import atomic_path
    from controlprefix.data import as_examples, with_ratios
    from controlprefix.data.files import read_records
    from controlprefix.data.ratios import RATIOS

    sources: list[str] = []
    records = list(read_records(data))
    names, defaults = columns.columns(), columns.defaults()
    for record in records:
        if record.problem:
            continue  # reported with all others
        if source is not None and not isinstance(record.fields.get(source), str):
            raise TrainingDataError(f"{record.place}: there is no text in the column {source!r}")
    # Most sources are no field of an example.
    unused = ({source} if source else set()) - (names.named if names else set()) - {"prompt"}
    rows = [record.without(unused) for record in records]
    examples = as_examples(rows, columns=names, defaults=defaults)
    by_place = {record.place: record for record in records}
    without = []
    for example in examples:
        place = example.place(0)
        own = by_place[place].fields[source] if source else example.texts[-1]
        sources.append(own)
        if not own.strip():
            without.append(place)
    if without:
        raise TrainingDataError(
            f"there is no source text in {shortened(without)}; name its column with --source"
        )
    if output.exists():
        if data.exists() and output.samefile(data):  # `-` is standard input
            raise RequestError(f"{output} is the file that is read; write to another one")
        require_yes(yes, f"{output} exists; overwrite it?")
    labelled = with_ratios(examples, sources, ratio or RATIOS[:3], language=language)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for example in labelled:
                named = example.model_fields_set | {"attributes"}
                fields = example.model_dump(mode="json", include=named)
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error}") from error
    out.print(f"{len(labelled)} rows written to {output}")
