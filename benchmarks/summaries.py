"""Summaries of papers whose length is requested: does it move what it names, at what ROUGE?

Trained on SciTLDR's abstracts, cut to a number of words, with the number of words of each summary
as an ordinal attribute, and with a task prefix alone; beside an instruction and the abstract's
first sentence. For other methods on equal rows see `comparison.py --data-set scitldr`. DATA is a
folder with `summarization_scitldr`.
"""

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr

from controlprefix import ControlPrefix, Example, Request

from lib.datasets import INSTRUCTIONS, read_rows
from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 4
KINDS = ("rouge1", "rouge2", "rougeL")
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of lengths in training, which are requested


def abstracts(folder: Path, split: str, max_words: int) -> dict[str, list[str]]:
    """Abstracts, cut at the end of a sentence, with all of their summaries."""
    papers = {}
    for row in read_rows(folder, "summarization_scitldr", split):
        words = row["source"].split()
        text = " ".join(words[:max_words])
        papers[text if len(words) <= max_words else text.rpartition(". ")[0] + "."] = row["targets"]
    return papers


def example(source: str, text: str, *, with_length: bool) -> Example:
    length = {"words": str(len(text.split()))} if with_length else {}
    return Example(prompt=source, completion=text, task="summarize", attributes=length)


def measured(papers: Mapping[str, Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """ROUGE against the closest of each abstract's summaries, and the mean number of words."""
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    scores = [
        scorer.score_multi(own, text) for own, text in zip(papers.values(), texts, strict=True)
    ]
    return {
        **{
            kind: 100 * statistics.fmean(score[kind].fmeasure for score in scores) for kind in KINDS
        },
        "words": statistics.fmean(len(text.split()) for text in texts),
    }


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    rows = [
        line(name, *(f"{values[key]:.1f}" for key in (*KINDS, "words")))
        for name, values in results.get("texts", {}).items()
    ]
    parts = [
        "# Summaries",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} abstracts of at most "
        f"{options['max_words']} words, {options['num_slots']} slots per prefix, seed "
        f"{options['seed']}, {options['rows']} test abstracts. Written by `{results['command']}` "
        f"at commit {results['commit']}, {results['date']}.",
        "\n".join([header("texts of", "ROUGE-1", "ROUGE-2", "ROUGE-L", "words"), *rows]),
    ]
    if dial := results.get("dial"):
        rows = [line(requested, f"{written:.1f}") for requested, written in dial["written"].items()]
        parts.append(
            "## Length on request\n\nNumber of words requested, and written on the mean; "
            f"correlation {dial['pearson']:.2f} over all texts, {dial['pearson of means']:.2f} of "
            "the means."
        )
        parts.append("\n".join([header("requested", "written"), *rows]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--rows", type=int, default=30, help="test abstracts")
    parser.add_argument("--max-words", type=int, default=110)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("steps", "num_slots", "rows", "max_words", "new_tokens", "seed")
    file = ResultFile("summaries", options, settings=settings, model=frozen, page=page)
    pairs = [
        (source, text)
        for source, texts in abstracts(options.data, "train", options.max_words).items()
        for text in texts
    ]
    random.Random(options.seed).shuffle(pairs)
    pairs = pairs[: options.steps * BATCH_SIZE]
    by_length = sorted(len(text.split()) for _, text in pairs)
    counts = sorted({by_length[round(q * (len(by_length) - 1))] for q in QUANTILES})
    test = dict(list(abstracts(options.data, "test", options.max_words).items())[: options.rows])

    def trained(*, with_length: bool) -> ControlPrefix:
        cp = engine(frozen)
        cp.train(
            [example(*p, with_length=with_length) for p in pairs],
            num_slots=options.num_slots,
            steps=options.steps,
            batch_size=BATCH_SIZE,
            validation=0,
        )
        return cp

    def write(cp: ControlPrefix, prompt: str = "", **fields: Any) -> list[str]:
        requests = [
            Request(prompt=f"{prompt}{source}", max_new_tokens=options.new_tokens, **fields)
            for source in test
        ]
        texts = (c.text.strip().partition("\n")[0].strip() for c in cp.generate(requests))
        return [text or "." for text in texts]

    if "a task prefix" not in (file.get("texts") or {}):
        first = [source.partition(". ")[0] for source in test]
        file.set("texts", "the first sentence", value=measured(test, first))
        instructed = write(engine(frozen), f"{INSTRUCTIONS['scitldr']} ")
        file.set("texts", "an instruction", value=measured(test, instructed))
        alone = write(trained(with_length=False), task="summarize")
        file.set("texts", "a task prefix", value=measured(test, alone))
    if not file.get("dial"):
        cp = trained(with_length=True)
        lengths: dict[str, list[int]] = {}
        for count in counts:
            texts = write(cp, task="summarize", attributes={"words": str(count)})
            lengths[str(count)] = [len(text.split()) for text in texts]
            name = f"task and length, {count} words"
            file.set("texts", name, value=measured(test, texts))
        requested = [int(count) for count, values in lengths.items() for _ in values]
        written = [value for values in lengths.values() for value in values]
        means = {count: statistics.fmean(values) for count, values in lengths.items()}
        value = {
            "written": means,
            "pearson": float(pearsonr(requested, written).statistic)
            if len(set(written)) > 1
            else 0.0,
            "pearson of means": float(pearsonr(counts, list(means.values())).statistic)
            if len(set(means.values())) > 1
            else 0.0,
        }
        file.set("dial", value=value)


if __name__ == "__main__":
    main()
