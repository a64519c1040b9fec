"""A number as a label: the length of a simplification, relative to its source (ASSET).

Trained on ASSET's references with their own length ratios, then requested for ratios between the
trained labels. DATA holds `simplification_asset.*.jsonl.gz` with `source` and `asset_refs`.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import pearsonr, spearmanr

from controlprefix import Request
from controlprefix.data.files import read_records

from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 8
MAX_CHARACTERS = 140


def simplifications(data: Path, split: str) -> list[tuple[str, str]]:
    """Sources with one of their references each, all of them, short sources only."""
    records = read_records(data / f"simplification_asset.{split}.jsonl.gz")
    return [
        (record.fields["source"], reference)
        for record in records
        for reference in record.fields["asset_refs"]
        if len(record.fields["source"]) <= MAX_CHARACTERS
    ]


def ratio(source: str, text: str) -> float:
    """Length of a text relative to its source, in characters."""
    return round(len(text) / len(source), 2)


def prompt(source: str) -> str:
    return f"Simplify this sentence: {source}"


def correlation(
    method: Callable[..., Any], requested: Sequence[float], written: Sequence[float]
) -> float:
    """A correlation; 0 if all texts have the same length."""
    return 0.0 if len(set(written)) == 1 else float(method(requested, written).statistic)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options, measured = results["options"], results["measured"]
    lines = [
        line(requested, f"{values['mean']:.2f}", f"{values['sd']:.2f}", f"{values['cut']:.0%}")
        for requested, values in measured["written"].items()
    ]
    return "\n\n".join(
        [
            "# Numbers as labels",
            f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} of ASSET's rows, seed "
            f"{options['seed']}. Trained labels: {', '.join(measured['labels'])}. Written by "
            f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
            "Length of the text that was written for a requested length, both relative to the "
            f"source, over {options['rows']} test sources:",
            "\n".join([header("requested", "written, mean", "SD", "cut at the limit"), *lines]),
            f"Correlation over requested lengths: {measured['correlation_of_means']:.3f} of the "
            f"means; {measured['pearson']:.2f} (Pearson) and {measured['spearman']:.2f} (Spearman) "
            "of single texts.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=40, help="test sources")
    parser.add_argument("--lengths", type=float, nargs="+", default=[0.4, 0.55, 0.7, 0.85, 1.0])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(argv)

    frozen = load_from(options)
    settings = ("steps", "num_slots", "rows", "lengths", "new_tokens", "seed")
    file = ResultFile("ordinal", options, settings=settings, model=frozen, page=page)
    if file.get("measured"):
        return
    pairs = simplifications(options.data, "train")
    random.Random(options.seed).shuffle(pairs)
    rows = [
        {
            "prompt": prompt(source),
            "completion": text,
            "task": "simplify",
            "attributes": {"length": min(1.1, max(0.3, ratio(source, text)))},
        }
        for source, text in pairs[: options.steps * BATCH_SIZE]
    ]
    cp = engine(frozen)
    cp.train(rows, num_slots=options.num_slots, steps=options.steps, validation=0, progress=False)
    sources = list(dict.fromkeys(source for source, _ in simplifications(options.data, "test")))
    sources = sources[: options.rows]
    requests = [
        Request(
            prompt=prompt(source),
            task="simplify",
            attributes={"length": str(length)},
            max_new_tokens=options.new_tokens,
            repetition_penalty=1.1,
        )
        for length in options.lengths
        for source in sources
    ]
    completions = cp.generate(requests)
    requested = [length for length in options.lengths for _ in sources]
    written = [
        ratio(source, completion.text.strip())
        for source, completion in zip(sources * len(options.lengths), completions, strict=True)
    ]
    by_length: dict[float, list[int]] = {}
    for i, length in enumerate(requested):
        by_length.setdefault(length, []).append(i)
    table = {
        str(length): {
            "mean": statistics.fmean(written[i] for i in ids),
            "sd": statistics.pstdev(written[i] for i in ids),
            "cut": statistics.fmean(completions[i].finish_reason == "length" for i in ids),
        }
        for length, ids in by_length.items()
    }
    means = [values["mean"] for values in table.values()]
    file.set(
        "measured",
        value={
            "labels": [name.removeprefix("length=") for name in cp.names("attribute")],
            "correlation_of_means": correlation(pearsonr, options.lengths, means),
            "pearson": correlation(pearsonr, requested, written),
            "spearman": correlation(spearmanr, requested, written),
            "written": table,
        },
    )


if __name__ == "__main__":
    main()
