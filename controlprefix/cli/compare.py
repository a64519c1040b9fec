"""The command that compares ways to adapt a model: compare."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from controlprefix.cli.common import app, out, print_table
from controlprefix.cli.evaluate import train_classifiers
from controlprefix.cli.groups import ColumnArguments, ModelArguments, grouped
from controlprefix.cli.options import is_on_command_line, parse_list, parse_number
from controlprefix.errors import RequestError, known_names

if TYPE_CHECKING:
    from controlprefix.data import Columns

_LOADING = ("model", "device", "dtype", "revision", "quantization")
_EXPERIMENT = (
    "rows",
    "columns",
    *_LOADING,
    "validation",
    "test",
    "methods",
    "steps",
    "batch_size",
    "num_slots",
    "seeds",
    "num_rates",
    "num_rows",
    "max_new_tokens",
    "instruction",
    "labelled_texts",
    "general",
    "other_prompts",
    "too_long",
)


@app.command()
@grouped
def compare(
    context: typer.Context,
    rows: Annotated[
        Path | None, typer.Argument(help="Rows to train on; the experiment's if left out.")
    ] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with rows and any of these options, such as steps = 60; options on "
            "the command line come first."
        ),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Rows that choose learning rates, or a share.  [0.1]")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Rows to measure on, or a share.  [0.2]")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, with semicolons; left out, all. See --list.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each method.  [24]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.  [8]")] = None,
    num_slots: Annotated[
        int | None, typer.Option(help="Slots, or virtual tokens, of each method.  [8]")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma-separated.  [0]")] = None,
    num_rates: Annotated[
        int | None, typer.Option(help="Learning rates that each method tries, 1 to 3.  [3]")
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option(help="Test and validation rows, at most.  [48]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens per text.  [32]")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="The instruction of instructed models; {labels} are a row's labels."),
    ] = None,
    labelled_texts: Annotated[
        Path | None, typer.Option(help="Rows to train attribute classifiers on, as in eval.")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Texts of no task, to measure forgetting on.")
    ] = None,
    other_prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts of another task, one per line, to measure divergence on."),
    ] = None,
    too_long: Annotated[
        str | None,
        typer.Option(help="Rows beyond the model's context: refuse or skip.  [refuse]"),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Folder of the report; an interrupted run continues there.")
    ] = Path("comparison"),
    list_methods: Annotated[
        bool, typer.Option("--list", help="List the methods and exit.")
    ] = False,
    *,
    columns: ColumnArguments,
    model: ModelArguments,
) -> None:
    """Train prefixes, adapters and others on the same rows, and compare what each does and costs.

    A table on the screen, and a page, tables and a plot in the folder.
    """
    from controlprefix.data import as_examples
    from controlprefix.engine import ControlPrefix
    from controlprefix.evaluation import comparison
    from controlprefix.store import PrefixStore

    if list_methods:
        out.print("\n".join(comparison.METHODS))
        return
    arguments = locals()
    options: dict[str, Any] = {} if experiment is None else _read_experiment(experiment)
    own = [name for name in _EXPERIMENT if name not in ("columns", *_LOADING)]
    options |= {name: arguments[name] for name in own if arguments[name] is not None}
    if "rows" not in options:
        raise RequestError("give rows to train on, or an experiment that names them")
    data = Path(options.pop("rows"))
    for name in ("validation", "test"):
        if name in options:
            options[name] = _rows_or_share(name, options[name])
    if isinstance(options.get("methods"), str):
        options["methods"] = [name.strip() for name in options["methods"].split(";")]
    methods = options.get("methods", ())
    if not isinstance(methods, (list, tuple)) or not all(isinstance(m, str) for m in methods):
        raise RequestError(f"methods are {methods!r}; give a text with semicolons, or a list")
    comparison.require_methods(methods)
    if isinstance(options.get("seeds"), str):
        numbers = [parse_number("--seeds", item) for item in parse_list(options["seeds"])]
        options["seeds"] = [int(n) if n.is_integer() else n for n in numbers]
    if "labelled_texts" in options:
        texts = Path(options.pop("labelled_texts"))
        options["classifiers"] = train_classifiers(texts, 0)
    if "general" in options:
        options["general"] = Path(options["general"])
    if "other_prompts" in options:
        options["other_prompts"] = _read_lines(Path(options["other_prompts"]))
    named_columns = columns.columns()
    if "columns" in options:
        named_columns = _merged(_columns(options.pop("columns")), named_columns)
    loading = {name: options.pop(name) for name in _LOADING if name in options}
    wrong = next((name for name, value in loading.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise RequestError(f"{wrong} of the experiment is {loading[wrong]!r}; it must be a text")
    model = replace(
        model, **{k: v for k, v in loading.items() if not is_on_command_line(context, k)}
    )
    # Files are read first, to fail before a model is loaded.
    defaults = columns.defaults()
    examples = as_examples(data, columns=named_columns, defaults=defaults)
    for name in ("validation", "test", "general"):
        if isinstance(options.get(name), Path):
            named = named_columns if name != "general" else None
            options[name] = as_examples(options[name], columns=named, defaults=defaults)
    cp = ControlPrefix(model.load(), PrefixStore("sqlite://"))
    report = comparison.compare(
        cp,
        examples,
        folder=folder,
        **options,
    )
    for title, header, lines in report.tables():
        table = Table("method", *(column.heading for column in header), title=title)
        for name, cells in lines:
            table.add_row(name, *(cell for cell, _ in cells))
        print_table(table)
    for name, reason in report.skipped.items():
        out.print(f"skipped {name}: {reason}")
    out.print(f"the report is in {report.save(folder)}")
    if not any(method.get("runs") for method in report.methods.values()):
        raise typer.Exit(1)


def _merged(first: "Columns", second: "Columns | None") -> "Columns":
    """Columns of an experiment, replaced by those of the command line."""
    if second is None:
        return first
    update = {item.name: getattr(second, item.name) for item in fields(second)}
    return replace(first, **{name: value for name, value in update.items() if value})


def _read_experiment(path: Path) -> dict[str, Any]:
    """The options in a TOML file; paths in it are relative to it.

    Raises:
        RequestError: If it cannot be read, or has an unknown entry.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read the experiment {path}: {error}") from error
    for name, value in entries.items():
        if name not in _EXPERIMENT:
            raise RequestError(
                f"{path} has an unknown entry {name!r}; it can have: "
                f"{known_names(name, _EXPERIMENT)}"
            )
        is_path = name in ("rows", "labelled_texts", "general", "other_prompts")
        if is_path or (name in ("validation", "test") and isinstance(value, str)):
            entries[name] = str(path.parent / str(value))
    return entries


def _columns(entries: Any) -> "Columns":
    """The columns that an experiment names.

    Raises:
        RequestError: If they cannot be read.
    """
    from controlprefix.data import Columns

    try:
        columns = Columns(**entries)
        if not isinstance(columns.attributes, Mapping):
            raise TypeError
        return columns
    except TypeError:
        raise RequestError(
            f"columns of the experiment are {entries!r}; they have text, prompt, completion, user "
            "and task, each the name of a column, and attributes, a table of such names"
        ) from None


def _rows_or_share(name: str, value: str | float) -> float | Path:
    """A share of the rows, or a file of rows."""
    if isinstance(value, float | int):
        return float(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        path = Path(str(value))
    if not path.is_file():
        raise RequestError(f"--{name} {value}: there is no such file; give rows, or a share")
    return path


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]
