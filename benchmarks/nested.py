"""One nested training against a training for each number of slots, and experts against one prefix.

`nested`: a prefix trained with `nested`, cut to its first slots, beside prefixes trained with so
many slots in as many steps. `experts`: rows of a task clustered by what their prompts are about, a
label for each cluster. On WebNLG: nats per token of held-out prompts of seen and unseen categories.
DATA as for `comparison.py`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.cluster import KMeans

from controlprefix import ControlPrefix, Example
from controlprefix.embeddings import embed

from lib.datasets import Row, load
from lib.models import add_model_options, engine, load_from, nats
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 8


def examples(
    rows: Sequence[Row], task: str | None = None, experts: Sequence[int] = ()
) -> list[Example]:
    """Rows as the library reads them; with experts, the label of each row's cluster."""
    return [
        Example(
            prompt=row.prompt,
            completion=row.completion,
            task=task,
            attributes={"expert": str(experts[i])} if len(experts) else {},
        )
        for i, row in enumerate(rows)
    ]


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    rows = [
        line(name, f"{values['seen']:.3f}", f"{values['unseen']:.3f}")
        for name, values in results["measured"].items()
    ]
    return "\n\n".join(
        [
            "# Nested prefixes and experts",
            f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} rows of WebNLG, seed "
            f"{options['seed']}, {options['rows']} prompts of seen and of unseen categories "
            f"each. Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            "Nats per token of the reference:",
            "\n".join([header("prefix", "seen", "unseen"), *rows]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--num-slots", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--num-experts", type=int, nargs="*", default=[4], help="none to skip")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(argv)

    frozen = load_from(options)
    settings = ("steps", "num_slots", "rows", "seed")
    file = ResultFile("nested", options, settings=settings, model=frozen, page=page)
    data = load(options.data, "webnlg", options.seed, options.steps * BATCH_SIZE)
    seen_rows = [row for row in data.dev if row.is_seen][: options.rows]
    unseen_rows = [row for row in data.test if not row.is_seen][: options.rows]
    most = max(options.num_slots)

    def trained(rows: Sequence[Example], num_slots: int, **fields: Any) -> ControlPrefix:
        cp = engine(frozen)
        cp.train(
            rows,
            num_slots=num_slots,
            steps=options.steps,
            batch_size=BATCH_SIZE,
            validation=0,
            seed=options.seed,
            **fields,
        )
        return cp

    def note(name: str, cp: ControlPrefix, task: str | None, clusters: Any = None) -> None:
        figures = {}
        for kind, rows in (("seen", seen_rows), ("unseen", unseen_rows)):
            experts = () if clusters is None else clusters(rows)
            figures[kind] = nats(cp, examples(rows, task, experts))
        file.set("measured", name, value=figures)

    def is_missing(name: str) -> bool:
        return file.get("measured", name) is None

    if is_missing("none"):
        note("none", engine(frozen), None)
    for num_slots in options.num_slots:
        if is_missing(name := f"{num_slots} slots"):
            note(name, trained(examples(data.train, "describe"), num_slots), "describe")
    names = {count: f"the first {count} of {most} nested slots" for count in options.num_slots}
    if any(map(is_missing, names.values())):
        cp = trained(examples(data.train, "describe"), most, nested=True)
        whole = cp.get("task", "describe")
        for count, name in names.items():
            cp.put("task", "first", whole.first(count))
            note(name, cp, "first")
    for count in options.num_experts:
        name = f"{most // 2} slots of the task, {most // 2} of each of {count} experts"
        if is_missing(name):
            model = KMeans(count, n_init=4, random_state=options.seed)
            model.fit(embed([row.prompt for row in data.train]).numpy())

            def clusters(rows: Sequence[Row], model: KMeans = model) -> list[int]:
                return [int(k) for k in model.predict(embed([r.prompt for r in rows]).numpy())]

            rows = examples(data.train, "describe", clusters(data.train))
            note(name, trained(rows, most // 2), "describe", clusters)


if __name__ == "__main__":
    main()
