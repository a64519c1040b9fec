"""Commands that measure what prefixes do: eval, eval-users, calibrate."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from controlprefix.cli.common import TaskOption, app, out, print_table
from controlprefix.cli.groups import (
    ClusterArguments,
    ColumnArguments,
    EngineArguments,
    grouped,
)
from controlprefix.cli.options import parse_list, parse_number, parse_pair
from controlprefix.errors import RequestError
from controlprefix.labels import label_text

if TYPE_CHECKING:
    from controlprefix.data.files import Record
    from controlprefix.evaluation import AttributeClassifier

LabelledTextsOption = Annotated[
    Path,
    typer.Option(
        "--labelled-texts",
        help='Rows to train attribute classifiers on: {"text": "…", "attributes": '
        '{"tone": "warm"}}. They must not contain texts that prefixes were trained on.',
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option(help="Maximum number of tokens per text.")]
SeedOption = Annotated[
    int, typer.Option(help="Seed of sampling, of classifiers and of the choice of users.")
]


@app.command("eval")
@grouped
def evaluate(
    rows: Annotated[Path, typer.Argument(help="Held-out rows.")],
    labelled_texts: LabelledTextsOption,
    folder: Annotated[
        Path, typer.Option(help="Folder of the report; an interrupted run continues there.")
    ] = Path("report"),
    strengths: Annotated[
        str, typer.Option(help="Strengths of the curves, comma-separated; 0 and 1 among them.")
    ] = "0,0.1,0.25,0.5,1,2,4",
    curve_rows: Annotated[int, typer.Option(help="Rows per strength of each label.")] = 32,
    max_new_tokens: MaxNewTokensOption = 48,
    seed: SeedOption = 0,
    *,
    columns: ColumnArguments,
    engine: EngineArguments,
) -> None:
    """Measure attribute accuracy, strength, cross-talk, NLL and diversity; write an HTML report."""
    from controlprefix import evaluation
    from controlprefix.data import as_examples

    examples = as_examples(rows, columns=columns.columns(), defaults=columns.defaults())
    classifiers = train_classifiers(labelled_texts, seed)
    cp = engine.open()
    report = evaluation.evaluate(
        cp,
        examples,
        classifiers,
        strengths=[parse_number("--strengths", item) for item in parse_list(strengths)],
        curve_rows=curve_rows,
        max_new_tokens=max_new_tokens,
        seed=seed,
        folder=folder,
    )
    table = Table("label", "accuracy", "without it", "monotonicity")
    for name, estimate in report.attribute_accuracy.items():
        table.add_row(
            name,
            estimate.text(),
            f"{report.attribute_accuracy_without[name].mean:.2f}",
            f"{report.monotonicity[name]:.2f}",
        )
    print_table(table)
    if report.not_classified:
        out.print(f"not classified: {', '.join(report.not_classified)}")
    out.print(f"base-model NLL {report.quality.base_model_nll.mean:.2f} nats per token")
    out.print(f"the report is in {report.save(folder)}")


@app.command("eval-users")
@grouped
def evaluate_users(
    rows: Annotated[Path, typer.Argument(help="Held-out rows with users.")],
    groups: Annotated[
        Path | None,
        typer.Option(help='JSON file of groupings: {"gender": {"ana": "female", …}}.'),
    ] = None,
    group_columns: Annotated[
        str,
        typer.Option(help="Columns of the rows that group their users, comma-separated."),
    ] = "",
    min_group_size: Annotated[
        int, typer.Option(help="Groups with fewer users are not reported.")
    ] = 8,
    num_texts: Annotated[
        int,
        typer.Option(
            help="Texts to write per user, by which a classifier guesses the users' groups."
        ),
    ] = 0,
    folder: Annotated[Path, typer.Option(help="Folder of users.html, .json and .png.")] = Path(
        "report"
    ),
    seed: SeedOption = 0,
    *,
    columns: ColumnArguments,
    cluster: ClusterArguments,
    engine: EngineArguments,
) -> None:
    """Measure for whom user prefixes work: gains over other users' prefixes, harm, groups."""
    from controlprefix import evaluation
    from controlprefix.data import as_examples
    from controlprefix.data.files import read_records
    from controlprefix.evaluation.users_report import harmed_text

    groupings = {} if groups is None else _read_groups(groups)
    names, of_rows = columns.columns(), parse_list(group_columns)
    source: Any = rows
    if of_rows:
        records = list(read_records(rows))
        user_column = names.user if names is not None and names.user is not None else "user"
        for name in of_rows:
            groupings[name] = _groups_of_column(records, name, user_column)
        unused = set(of_rows) - (names.named if names else set())  # no field of a row
        source = [record.without(unused) for record in records]
    examples = as_examples(source, columns=names, defaults=columns.defaults())
    options: dict[str, Any] = {
        "groups": groupings,
        "min_group_size": min_group_size,
        "seed": seed,
    }
    if not cluster.is_used():
        result = evaluation.evaluate_users(engine.open(), examples, num_texts=num_texts, **options)
    elif num_texts:
        raise RequestError("--num-texts has no effect with --ray; leave one of them out")
    else:
        result = cluster.connect(engine).evaluate_users(examples, **options)
    table = Table("users", "gain, nats per token (95 % interval)")
    gains = [("all", result.gain)]
    for grouping, by_group in result.groups.items():
        gains += [(f"{grouping}={group}", gain) for group, gain in by_group.items()]
    for name, gain in gains:
        table.add_row(name, gain.text(".3f"))
    print_table(table)
    out.print(
        f"{len(result.users)} users, {result.num_too_few} with too few rows to tell; harmed: "
        f"{harmed_text(result)}; worst tenth: {result.worst_decile:.3f} nats per token"
    )
    for grouping, own in result.revealed.items():
        out.print(
            f"{grouping}: told from texts of users' prefixes {own.written.text('.0%')}, without "
            f"users {own.without.text('.0%')}, from their own rows {own.own.text('.0%')} "
            f"(balanced accuracy; chance {own.chance:.0%})"
        )
    if result.too_small:
        out.print(f"fewer than {min_group_size} users: {', '.join(result.too_small)}")
    out.print(f"written to {result.save(folder)}")


def _groups_of_column(records: Sequence["Record"], column: str, user_column: str) -> dict[str, str]:
    """Each user's group, as a column of the rows states it.

    Raises:
        RequestError: If no row has the column, or a user's rows differ.
    """
    groups: dict[str, str] = {}
    for record in records:
        user, group = (record.fields.get(name) for name in (user_column, column))
        if user in (None, "") or group in (None, ""):
            continue
        name, group = str(label_text(user)), str(label_text(group))
        if groups.setdefault(name, group) != group:
            raise RequestError(
                f"{record.place}: user {name!r} is {group!r} in the column {column!r}, and "
                f"{groups[name]!r} in an earlier row; give a user one group"
            )
    if not groups:
        raise RequestError(
            f"no row has a user in {user_column!r} and a group in the column {column!r}"
        )
    return groups


def _read_groups(path: Path) -> dict[str, dict[str, str]]:
    try:
        groups: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(groups, dict):
            raise ValueError("it is no JSON object")
        pairs = [pair for group_of in groups.values() for pair in group_of.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(
            f"cannot read groupings from {path}: {error}; a file is such as "
            '{"gender": {"ana": "female"}}'
        ) from error
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise RequestError(f"the groups in {path} must be texts")
    return groups


@app.command()
@grouped
def calibrate(
    label: Annotated[str, typer.Argument(help="A stored label: formality=formal.")],
    labelled_texts: LabelledTextsOption,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt to measure with; left out, an empty one."),
    ] = None,
    task: TaskOption = None,
    num_samples: Annotated[int, typer.Option(help="Texts per strength.")] = 64,
    max_new_tokens: MaxNewTokensOption = 32,
    seed: SeedOption = 0,
    *,
    engine: EngineArguments,
) -> None:
    """Give a label a dial: positions at which its measured probability moves evenly."""
    from controlprefix import evaluation
    from controlprefix.request import Request

    attribute, name = parse_pair("the label", label)
    classifiers = {c.attribute: c for c in train_classifiers(labelled_texts, seed)}
    if attribute not in classifiers:
        raise RequestError(
            f"{labelled_texts} has no texts labelled with {attribute!r}; it has: "
            f"{', '.join(classifiers)}"
        )
    cp = engine.open()
    request = Request(
        prompt=prompt or "", raw=prompt is None, task=task, max_new_tokens=max_new_tokens
    )
    calibration = evaluation.calibrate(
        cp, request, attribute, name, classifiers[attribute], num_samples=num_samples, seed=seed
    )
    table = Table("strength", "probability of the label", "base-model NLL")
    for point in calibration.curve:
        mean, low, high = point.probability
        table.add_row(
            f"{point.strength:g}",
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            f"{point.base_model_nll:.2f}",
        )
    print_table(table)
    points = ", ".join(f"{position:g} → {strength:.3g}" for position, strength in calibration.dial)
    out.print(f"dial of {label} (version {calibration.version}): {points}")


def train_classifiers(path: Path, seed: int) -> "list[AttributeClassifier]":
    """Classifiers of all attributes in a file of labelled texts."""
    from controlprefix.data import read_labelled
    from controlprefix.evaluation import AttributeClassifier

    classifiers = []
    for attribute, pairs in read_labelled(path).items():
        texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
        classifier = AttributeClassifier.train(attribute, texts, labels, seed=seed)
        classifiers.append(classifier)
        out.print(
            f"classifier of {attribute}: accuracy {classifier.accuracy:.0%} on held-out texts, "
            f"calibration error {classifier.calibration_error:.2f}"
        )
    return classifiers
