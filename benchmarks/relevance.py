"""Prefixes that know which prompts they are for: prompts accepted, and prompts of others.

Each task learns from prompts of its training split, and is then asked about prompts of its test
split, of the other tasks' test splits, and about general ones. A second table is of tasks that
learned to refuse the others' training prompts too. DATA is a folder with the files
e2e, webnlg, simplification_asset, summarization_scitldr and politeness_stanford.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from controlprefix.data.general import general_prompts
from controlprefix.embeddings import embed
from controlprefix.inference.relevance import learn_relevance

from lib.datasets import read_rows
from lib.results import arguments, save
from lib.tables import Column, table


def _triples(row: Mapping[str, Any]) -> str:
    return "; ".join(" | ".join(triple) for triple in row["triples"])


TASKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "restaurants from tables": ("e2e", lambda row: str(row["mr"])),
    "texts from triples": ("webnlg", _triples),
    "simplification": ("simplification_asset", lambda row: str(row["source"])),
    "summaries of papers": ("summarization_scitldr", lambda row: str(row["source"])),
    "replies to requests": ("politeness_stanford", lambda row: str(row["text"])),
}
COLUMNS: tuple[Column, ...] = (
    ("accepted", "own accepted", 3),
    ("rejected, general", "general rejected", 3),
    ("rejected, other tasks", "other tasks rejected", 3),
    ("lowest rejected", "of the nearest task", 3),
)


def prompts(folder: Path, task: str, split: str, count: int) -> list[str]:
    """Different prompts of a split."""
    name, read = TASKS[task]
    texts = list(dict.fromkeys(map(read, read_rows(folder, name, split))))
    return random.Random(0).sample(texts, min(count, len(texts)))


def measure(folder: Path, count: int, *, knows_others: bool) -> dict[str, dict[str, float]]:
    """Per task, the shares of prompts accepted and rejected."""
    training = {task: prompts(folder, task, "train", count) for task in TASKS}
    test = {task: embed(prompts(folder, task, "test", count)) for task in TASKS}
    general = embed(general_prompts(measuring=True))
    figures = {}
    for task in TASKS:
        others = [
            text for other in TASKS if other != task and knows_others for text in training[other]
        ]
        relevance, _ = learn_relevance(training[task], others)

        def accepted(embeddings: Any, relevance: Any = relevance) -> float:
            return statistics.fmean(map(relevance.includes, embeddings))

        rejected = {other: 1 - accepted(rows) for other, rows in test.items() if other != task}
        figures[task] = {
            "accepted": round(accepted(test[task]), 4),
            "rejected, general": round(1 - accepted(general), 4),
            "rejected, other tasks": round(statistics.fmean(rejected.values()), 4),
            "lowest rejected": round(min(rejected.values()), 4),
        }
    return figures


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    return (
        "# Prefixes that know which prompts they are for\n\n"
        f"Up to {results['prompts']} prompts of each task to learn from, and as many others to "
        "measure. **own accepted**: prompts of the task's test split; **general rejected**: 32 "
        "general prompts; **of the nearest task**: of the task whose prompts are mistaken most "
        f"often. Written by `{results['command']}` at commit {results['commit']}, "
        f"{results['date']}.\n\n"
        "## General prompts alone set the threshold\n\n"
        f"{table('task', results['general'], COLUMNS)}\n\n"
        "## With prompts of the other tasks\n\n"
        f"{table('task', results['others'], COLUMNS)}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    options: argparse.Namespace = parser.parse_args(argv)
    results = {
        "prompts": options.prompts,
        "general": measure(options.data, options.prompts, knows_others=False),
        "others": measure(options.data, options.prompts, knows_others=True),
    }
    save(options.results, "relevance", results, page)
    print(page({**results, "command": "", "commit": "", "date": ""}))


if __name__ == "__main__":
    main()
