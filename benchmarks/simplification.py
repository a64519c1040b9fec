"""Simplification with control ratios: what texts are like, and whether dials move what they name.

Trained on ASSET's references, with three control ratios of each pair as numbers of attributes
(length, similarity, word rank), and with a task prefix alone; compared with an instruction and with
what people wrote. Then each ratio is requested at several values, the others at their medians. DATA
holds `simplification_asset.*.jsonl.gz` with `source` and `asset_refs`.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import pearsonr, spearmanr

from controlprefix import ControlPrefix, Example, Request
from controlprefix.data import control_ratios, with_ratios
from controlprefix.data.files import read_records
from controlprefix.evaluation import grade_level, sari

from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 8
MAX_CHARACTERS = 140
RATIOS = ("length", "similarity", "word_rank")
QUANTILES = (0.1, 0.5, 0.9)


def simplifications(data: Path, split: str) -> dict[str, list[str]]:
    """Short sources with all of their references."""
    records = read_records(data / f"simplification_asset.{split}.jsonl.gz")
    return {
        record.fields["source"]: record.fields["asset_refs"]
        for record in records
        if len(record.fields["source"]) <= MAX_CHARACTERS
    }


def example(source: str, text: str) -> Example:
    return Example(prompt=f"Simplify this sentence: {source}", completion=text, task="simplify")


def measured(pairs: Mapping[str, Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """SARI and grade level of a text for each source, and the share that only copy it."""
    sources = list(pairs)
    return {
        "SARI": sari(sources, texts, [pairs[source] for source in sources]),
        "FKGL": grade_level([text or "None." for text in texts]),
        "copies": statistics.fmean(map(str.__eq__, sources, texts)),
    }


def correlation(
    method: Callable[..., Any], requested: Sequence[float], written: Sequence[float]
) -> float:
    """A correlation; 0 if all texts are alike."""
    return 0.0 if len(set(written)) == 1 else float(method(requested, written).statistic)


def dial(
    name: str,
    values: Sequence[float],
    write: Callable[[Mapping[str, float]], Sequence[str]],
    sources: Sequence[str],
) -> dict[str, Any]:
    """All ratios of texts for which one ratio is requested at several values."""
    written: dict[str, dict[str, float]] = {}
    requested: list[float] = []
    own: list[float] = []
    for value in values:
        ratios = [
            control_ratios(source, text) if text else dict.fromkeys(RATIOS, 0.0)
            for source, text in zip(sources, write({name: value}), strict=True)
        ]
        requested += [value] * len(ratios)
        own += [row[name] for row in ratios]
        written[str(value)] = {
            ratio: statistics.fmean(row[ratio] for row in ratios) for ratio in RATIOS
        }
    means = [row[name] for row in written.values()]
    return {
        "written": written,
        "pearson of means": correlation(pearsonr, values, means),
        "spearman of texts": correlation(spearmanr, requested, own),
    }


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Simplification",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} of ASSET's rows, "
        f"{options['num_slots']} slots per prefix, seed {options['seed']}, {options['rows']} test "
        f"sources. Written by `{results['command']}` at commit {results['commit']}, "
        f"{results['date']}.",
        "SARI: the higher the better; FKGL: school years needed to read the texts. The person's "
        "texts are one reference of each source, compared with the others.",
    ]
    rows = [
        line(name, *(f"{values[key]:.{d}f}" for key, d in (("SARI", 1), ("FKGL", 1))),
             f"{values['copies']:.0%}")
        for name, values in results.get("texts", {}).items()
    ]  # fmt: skip
    parts.append("\n".join([header("texts of", "SARI", "FKGL", "copies of the source"), *rows]))
    for name, values in results.get("dials", {}).items():
        parts.append(
            f"## {name}\n\nRequested and written, mean of each ratio; correlation "
            f"{values['pearson of means']:.2f} of the means, {values['spearman of texts']:.2f} "
            "(Spearman) of single texts."
        )
        parts.append(
            "\n".join(
                [
                    header("requested", *RATIOS),
                    *(
                        line(requested, *(f"{row[ratio]:.2f}" for ratio in RATIOS))
                        for requested, row in values["written"].items()
                    ),
                ]
            )
        )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=40, help="test sources")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(argv)

    frozen = load_from(options)
    settings = ("steps", "num_slots", "rows", "new_tokens", "seed")
    file = ResultFile("simplification", options, settings=settings, model=frozen, page=page)
    pairs = [(s, text) for s, texts in simplifications(options.data, "train").items()
             for text in texts]  # fmt: skip
    random.Random(options.seed).shuffle(pairs)
    pairs = pairs[: options.steps * BATCH_SIZE]
    rows = [example(*pair) for pair in pairs]
    labelled = with_ratios(rows, [source for source, _ in pairs])
    test = dict(list(simplifications(options.data, "test").items())[: options.rows])
    sources = list(test)
    numbers = {
        name: sorted(float(str(row.attributes[name])) for row in labelled) for name in RATIOS
    }
    at = {
        name: [values[round(q * (len(values) - 1))] for q in QUANTILES]
        for name, values in numbers.items()
    }
    medians = {name: values[1] for name, values in at.items()}

    def trained(data: Sequence[Example]) -> ControlPrefix:
        cp = engine(frozen)
        cp.train(data, num_slots=options.num_slots, steps=options.steps, validation=0)
        return cp

    def write(cp: ControlPrefix, ratios: Mapping[str, float] | None, **fields: Any) -> list[str]:
        attributes = {} if ratios is None else {k: str(v) for k, v in {**medians, **ratios}.items()}
        requests = [
            Request(
                prompt=f"Simplify this sentence: {source}",
                attributes=attributes,
                max_new_tokens=options.new_tokens,
                **fields,
            )
            for source in sources
        ]
        return [c.text.strip().split("\n")[0].strip() for c in cp.generate(requests)]

    if "the source itself" not in (file.get("texts") or {}):
        file.set("texts", "the source itself", value=measured(test, sources))
        others = {source: texts[1:] for source, texts in test.items()}
        file.set("texts", "a person", value=measured(others, [t[0] for t in test.values()]))
        plain = write(engine(frozen), None)
        file.set("texts", "an instruction", value=measured(test, plain))
        alone = write(trained(rows), None, task="simplify")
        file.set("texts", "a task prefix", value=measured(test, alone))
    if len(file.get("dials") or {}) < len(RATIOS):
        cp = trained(labelled)
        texts = write(cp, {}, task="simplify")
        file.set("texts", "task and ratios at their medians", value=measured(test, texts))
        for name, values in at.items():
            file.set(
                "dials",
                name,
                value=dial(name, values, lambda r: write(cp, r, task="simplify"), sources),
            )
        best = {"length": at["length"][0], "word_rank": at["word_rank"][0]}
        texts = write(cp, best, task="simplify")
        file.set("texts", "task and ratios, shorter and more common", value=measured(test, texts))


if __name__ == "__main__":
    main()
