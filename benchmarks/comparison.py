"""`compare` on public data sets: every way to adapt a model, on equal rows and steps.

DATA is a folder with the files formality_pavlick, sentiment_yelp, e2e, webnlg,
summarization_scitldr, varieties (see lib/datasets.py) and email_aeslc, whose texts measure
forgetting. Attribute classifiers are trained on rows that no method gets. Measurements that the
result file has are not repeated.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlprefix import ControlPrefix, Example
from controlprefix.evaluation import AttributeClassifier
from controlprefix.evaluation.comparison import METHODS, ComparisonReport, compare
from controlprefix.store import PrefixStore

from lib.datasets import DATA_SETS, DataSet, Row, labelled, load, read_rows, shuffled
from lib.models import add_model_options, load_from
from lib.results import arguments, save

MAX_CLASSIFIER_ROWS = 3000


def example(data: DataSet, row: Row) -> Example:
    """A row as the library reads it."""
    attributes = {data.attribute: row.label} if data.attribute and row.label else {}
    return Example(
        prompt=row.prompt,
        raw=not row.prompt,
        completion=row.completion,
        task=data.task,
        attributes=attributes,
    )


def held_out(data: DataSet, rows: Sequence[Row], count: int) -> list[Example]:
    """Examples of the first rows, one for each reference."""
    return [
        example(data, replace(row, completion=text))
        for row in rows[:count]
        for text in row.references or (row.completion,)
    ]


def classifiers(folder: Path, data: DataSet, num_rows: int) -> list[AttributeClassifier]:
    """A classifier of the labels, of training rows after the first, which methods get."""
    if not data.has_few_labels:
        return []
    files = {"formality": "formality_pavlick", "sentiment": "sentiment_yelp"}
    rows = shuffled(labelled(folder, files[data.name], data.name, "train"), 0)
    others = rows[num_rows:][:MAX_CLASSIFIER_ROWS]
    texts, labels = [row.completion for row in others], [str(row.label) for row in others]
    return [AttributeClassifier.train(data.name, texts, labels)]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    report = ComparisonReport.from_dict(results)
    options = report.options
    rows = options["rows"]
    return (
        f"# Ways to adapt one model: {results['data set']}\n\n"
        f"{options['model']} in {options['dtype']}; {options['steps']} steps of "
        f"{options['batch_size']} of {rows['training']} rows, {options['num_slots']} slots, "
        f"{rows['validation']} rows to choose one of {options['num_rates']} learning rates, "
        f"{rows['test']} to measure on. Means over seeds, with the standard deviation. Written by "
        f"`{results['command']}` at commit {results['commit']}, {results['date']}.\n\n"
        + "".join(f"{note}\n\n" for note in results.get("notes", ()))
        + report.markdown()
    ).replace("\n### ", "\n## ")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--data-set", choices=DATA_SETS, default="formality")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--training-rows", type=int, default=480)
    parser.add_argument(
        "--all-references", action="store_true", help="each reference of e2e and webnlg is a row"
    )
    parser.add_argument("--rates", type=int, default=3, help="learning rates that each tries")
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48, help="test rows, and validation rows")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--folder", type=Path, help="where an interrupted run continues")
    options: argparse.Namespace = parser.parse_args(argv)
    data = load(
        options.data,
        options.data_set,
        0,
        options.training_rows,
        all_references=options.all_references,
    )
    general = [Example(prompt="", raw=True, completion=text) for text in emails(options.data)]
    report = compare(
        ControlPrefix(load_from(options), PrefixStore("sqlite://")),
        [example(data, row) for row in data.train],
        validation=held_out(data, data.dev, options.rows),
        test=held_out(data, data.test, options.rows),
        methods=options.methods,
        steps=options.steps,
        batch_size=options.batch_size,
        num_slots=options.num_slots,
        num_rates=options.rates,
        seeds=options.seeds,
        num_rows=options.rows,
        max_new_tokens=options.new_tokens,
        instruction=data.instruction(Row("", label="{labels}")).strip(),
        classifiers=classifiers(options.data, data, options.training_rows),
        general=general[: options.rows],
        folder=options.folder,
    )
    name = f"comparison-{options.data_set}-{options.steps}"
    if options.training_rows != parser.get_default("training_rows"):
        name += f"-{options.training_rows}-rows"
    if options.device != "cpu":
        name += "-cuda"
    save(
        options.results,
        options.name or name,
        {"data set": options.data_set, **report.to_dict()},
        page,
    )


def emails(folder: Path) -> list[str]:
    """Texts of no task."""
    texts = [str(row["body"]) for row in read_rows(folder, "email_aeslc", "test")]
    return [" ".join(text.split()[:60]) for text in texts if text.strip()]


if __name__ == "__main__":
    main()
