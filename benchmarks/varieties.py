"""Varieties of language: a label learned from plain text, united with a task learned in English.

The task is to say an English sentence again, learned from English alone; the variety (Naija, that
is Nigerian Pidgin, and Shakespeare's English) is learned from texts alone. Their union has never
been trained (the setting of TADA, Held et al., 2023, https://arxiv.org/abs/2305.16651). It is
measured on held-out pairs beside the task alone and prefixes trained on the pairs themselves; and
each prefix on plain texts of every variety, for what adapting one costs the others. DATA is a
folder with `varieties` and `style_shakespeare`.
"""

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from controlprefix import ControlPrefix, Example, Request

from lib.datasets import read_rows
from lib.models import add_model_options, engine, load_from, nats
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 8
MAX_WORDS = 30
NAMES = {"naija": "Nigerian Pidgin", "shakespeare": "Shakespeare's English"}
TRAINED, OTHERS = tuple(NAMES), ("welsh", "gaelic", "standard")
Pair = tuple[str, str]  # an English sentence, and the same in the variety


def pairs_of(folder: Path, split: str, seed: int) -> dict[str, list[Pair]]:
    """Pairs of each variety in random order; a text without a translation is its own."""
    pairs: dict[str, list[Pair]] = {name: [] for name in (*TRAINED, *OTHERS)}
    for row in read_rows(folder, "varieties", split):
        pairs[row["variety"]].append((row["english"] or row["text"], row["text"]))
    for row in read_rows(folder, "style_shakespeare", split):
        pairs["shakespeare"].append((row["modern"], row["original"]))
    for name, rows in pairs.items():
        rows = [row for row in rows if all(len(text.split()) <= MAX_WORDS for text in row)]
        pairs[name] = random.Random(seed).sample(rows, len(rows))
    # English of the same kinds, from pairs that nothing else uses.
    english = []
    for name in ("naija", "shakespeare"):
        half = len(pairs[name]) // 2
        english += [(text, text) for text, _ in pairs[name][half:]]
        pairs[name] = pairs[name][:half]
    pairs["standard"] = random.Random(seed).sample(english, len(english))
    return pairs


def task_row(pair: Pair, variety: str | None = None, *, task: str | None = "say") -> Example:
    return Example(
        prompt=f"Say this: {pair[0]}",
        completion=pair[1],
        task=task,
        attributes={"variety": variety} if variety else {},
    )


def text_row(pair: Pair, variety: str | None = None, *, task: str | None = None) -> Example:
    return Example(
        prompt="",
        raw=True,
        completion=pair[1],
        task=task,
        attributes={"variety": variety} if variety else {},
    )


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    parts = [
        "# Varieties of language",
        f"{results['model']}; {options['steps']} steps of {BATCH_SIZE} rows per prefix, "
        f"{options['num_slots']} slots each, seed {options['seed']}, {options['rows']} held-out "
        f"pairs per variety. Written by `{results['command']}` at commit {results['commit']}, "
        f"{results['date']}.",
        "## A task in English, a variety from plain text\n\nNats per token of held-out pairs; how "
        "much of the distance between the task alone and both trained on pairs is closed; and of "
        "texts written under each: the share that a classifier takes for the variety, and chrF "
        "against the pair's own text.",
    ]
    for name, ways in results.get("pairs", {}).items():
        far, near = (ways.get(way, {}).get("nats") for way in ("task alone", "trained on pairs"))
        rows = []
        for way, values in ways.items():
            closed = f"{(far - values['nats']) / (far - near):.0%}" if far and near else ""
            figures = (f"{values['nats']:.3f}", closed)
            rows.append(line(way, *figures, f"{values['judged']:.0%}", f"{values['chrF']:.1f}"))
        table = [header(NAMES[name], "nats", "closed", "judged", "chrF"), *rows]
        parts.append("\n".join(table))
    if texts := results.get("texts"):
        names = list(next(iter(texts.values())))
        parts.append(
            "## What a variety costs the others\n\nNats per token of plain texts of each variety, "
            "without a prefix and under each prefix learned from text."
        )
        rows = [
            line(way, *(f"{values[name]:.3f}" for name in names)) for way, values in texts.items()
        ]
        parts.append("\n".join([header("prefix", *names), *rows]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--rows", type=int, default=100, help="held-out pairs per variety")
    parser.add_argument("--texts", type=int, default=40, help="texts written per way")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("steps", "num_slots", "rows", "texts", "new_tokens", "seed")
    file = ResultFile("varieties", options, settings=settings, model=frozen, page=page)
    train = pairs_of(options.data, "train", options.seed)
    test = {name: rows[: options.rows] for name, rows in
            pairs_of(options.data, "test", options.seed).items()}  # fmt: skip
    count = options.steps * BATCH_SIZE

    def trained(*groups: Sequence[Example], cp: ControlPrefix | None = None) -> ControlPrefix:
        rows = [row for group in groups for row in group[:count]]
        random.Random(options.seed).shuffle(rows)
        cp = cp or engine(frozen)
        steps = options.steps * len(groups)
        cp.train(rows, num_slots=options.num_slots, steps=steps, validation=0)
        return cp

    def measure(way: str, cp: ControlPrefix, name: str, **fields: Any) -> None:
        """Loss on pairs, and what a generation is like."""
        rows = [task_row(pair, **fields) for pair in test[name]]
        requests = [
            Request(**{k: getattr(row, k) for k in ("prompt", "task", "attributes")},
                    max_new_tokens=options.new_tokens)
            for row in rows[: options.texts]
        ]  # fmt: skip
        write(way, name, nats(cp, rows), requests, cp)

    def write(
        way: str, name: str, loss: float, requests: Sequence[Request], cp: ControlPrefix
    ) -> None:
        from sacrebleu import corpus_chrf

        texts = [c.text.strip().split("\n")[0].strip() or "." for c in cp.generate(requests)]
        references = [pair[1] for pair in test[name][: options.texts]]
        judged = statistics.fmean(x == name for x in classifier.predict(texts))
        chrf = corpus_chrf(texts, [references]).score
        file.set("pairs", name, way, value={"nats": loss, "judged": judged, "chrF": chrf})

    classified = {name: train[name][count:] or train[name] for name in (*TRAINED, "standard")}
    labelled = [(text, name) for name, rows in classified.items() for _, text in rows]
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)
    classifier = make_pipeline(letters, LogisticRegression(C=10, max_iter=1000))
    classifier.fit([text for text, _ in labelled], [label for _, label in labelled])
    english = [task_row(pair) for pair in train["standard"]]
    if any("trained on pairs" not in (file.get("pairs", name) or {}) for name in TRAINED):
        plain = engine(frozen)
        task = trained(english)
        for name in TRAINED:
            words = [Example(prompt=f"Say this in {NAMES[name]}: {e}", completion=text)
                     for e, text in test[name]]  # fmt: skip
            instructed = [Request(prompt=str(row.prompt), max_new_tokens=options.new_tokens)
                    for row in words[: options.texts]]  # fmt: skip
            write("an instruction", name, nats(plain, words), instructed, plain)
            measure("task alone", task, name)
        alone = trained(*([text_row(p, name) for p in train[name]] for name in TRAINED), cp=task)
        for name in TRAINED:
            measure("united, label from its texts", alone, name, variety=name)
        written = (
            [text_row(p, name, task="write") for p in train[name]]
            for name in (*TRAINED, "standard")
        )
        contrasted = trained(*written, cp=task)
        for name in TRAINED:
            way = "united, label learned beside standard English"
            measure(way, contrasted, name, variety=name)
        both = trained(*([task_row(p, name) for p in train[name]] for name in TRAINED))
        for name in TRAINED:
            measure("trained on pairs", both, name, variety=name)
    if len(file.get("texts") or {}) <= len(TRAINED):
        plain = engine(frozen)
        rows = {name: [text_row(p, task=None) for p in test[name]] for name in test}
        file.set("texts", "none", value={name: nats(plain, own) for name, own in rows.items()})
        for name in (*TRAINED, "welsh"):
            cp = trained([text_row(p, name) for p in train[name]])
            under = {n: nats(cp, [text_row(p, name) for p in test[n]]) for n in test}
            file.set("texts", name, value=under)


if __name__ == "__main__":
    main()
