"""Simulated people who prefer one kind of text, learned from few of their preferences.

Each person prefers texts of one kind (positive reviews, short ones, formal sentences, …). From some
pairs of a chosen and a rejected text they get a prefix; it is right about a held-out pair if it
makes the preferred text likelier, against the other one, than the plain model does. Another
person's prefix is the control. DATA has `sentiment_yelp` and `formality_pavlick`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from controlprefix import ControlPrefix, Example, Preference

from lib.datasets import Row, labelled, shuffled
from lib.models import add_model_options, engine, load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, table

COLUMNS: tuple[Column, ...] = (
    ("own", "own", 2),
    ("another's", "another's", 2),
    ("seconds", "s", 0),
)
MIN_WORDS, MAX_WORDS = 4, 14
Pairs = Sequence[tuple[str, str]]  # the preferred text, and the other one
People = Mapping[str, Pairs]


def people(folder: Path) -> dict[str, Pairs]:
    """The people and their pairs, of texts that differ in what each of them looks at."""

    def rows(name: str, attribute: str) -> list[Row]:
        every = shuffled(labelled(folder, name, attribute, "train"), 0)
        return [r for r in every if MIN_WORDS <= len(r.completion.split()) <= MAX_WORDS]

    def pairs(texts: Sequence[Row], likes: Callable[[Row], bool]) -> Pairs:
        liked = [row.completion for row in texts if likes(row)]
        others = [row.completion for row in texts if not likes(row)]
        return list(zip(liked, others, strict=False))

    reviews = rows("sentiment_yelp", "sentiment")
    sentences = rows("formality_pavlick", "formality")
    every = {
        "positive": pairs(reviews, lambda row: row.label == "positive"),
        "negative": pairs(reviews, lambda row: row.label == "negative"),
        "formal": pairs(sentences, lambda row: row.label == "formal"),
        "informal": pairs(sentences, lambda row: row.label == "informal"),
        "short": pairs(reviews, lambda row: len(row.completion.split()) <= 7),
        "about me": pairs(reviews, lambda row: bool({"i", "my"} & set(row.completion.split()))),
    }
    return {name: own for name, own in every.items() if own}


def margins(cp: ControlPrefix, pairs: Pairs, user: str | None) -> list[float]:
    """By how much each preferred text is likelier than the other one, in nats."""
    scores = cp.score(
        [
            Example(prompt="", raw=True, completion=text, user=user)
            for pair in pairs
            for text in pair
        ]
    )
    nats = [score.log_likelihood for score in scores]
    return [a - b for a, b in zip(nats[::2], nats[1::2], strict=True)]


def from_preferences(cp: ControlPrefix, pairs: People, options: argparse.Namespace) -> None:
    """`train_preferences`, all people in one run."""
    cp.train_preferences(
        [
            Preference(prompt="", raw=True, chosen=liked, rejected=other, user=user)
            for user, own in pairs.items()
            for liked, other in own
        ],
        num_slots=options.num_slots,
        steps=options.steps,
        validation=0,
        progress=False,
    )


def from_chosen_texts(cp: ControlPrefix, pairs: People, options: argparse.Namespace) -> None:
    """`train_users` on the preferred texts."""
    cp.train_users(
        {user: [liked for liked, _ in own] for user, own in pairs.items()},
        num_slots=options.num_slots,
        validation=0,
        progress=False,
    )


def in_the_prompt(cp: ControlPrefix, pairs: People, options: argparse.Namespace) -> None:
    """The preferred texts before the text."""
    for user, own in pairs.items():
        cp.put("user", user, cp.prefix_from_text("\n".join(liked for liked, _ in own) + "\n"))


def measure(
    way: Callable[..., None], cp: ControlPrefix, every: People, count: int, held_out: int
) -> dict[str, float]:
    """The share of held-out pairs that own and others' prefixes are right about."""
    start = time.perf_counter()
    way(cp, {user: pairs[:count] for user, pairs in every.items()})
    seconds = time.perf_counter() - start
    names = list(every)
    own: list[float] = []
    others: list[float] = []
    for i, user in enumerate(names):
        pairs = every[user][-held_out:]
        plain = margins(cp, pairs, None)
        # Two further on: the one beside has the opposite preference.
        for hits, whose in ((own, user), (others, names[(i + 2) % len(names)])):
            steered = margins(cp, pairs, whose)
            hits.append(statistics.fmean(a > b for a, b in zip(steered, plain, strict=True)))
    Console().print(dict(zip(names, own, strict=True)))
    figures = {"own": statistics.fmean(own), "another's": statistics.fmean(others)}
    return {**{k: round(v, 4) for k, v in figures.items()}, "seconds": round(seconds, 1)}


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    return "\n\n".join(
        [
            "# Preferences",
            f"{results['model']}; six simulated people, who prefer positive or negative reviews, "
            f"formal or informal sentences, short reviews, or reviews with *I* or *my*; "
            f"{options['num_slots']} slots each. Written by `{results['command']}` at commit "
            f"{results['commit']}, {results['date']}.",
            f"**own**: share of {options['held_out']} held-out pairs per person of which the "
            "preferred text became likelier against the other one than under the plain model; "
            "chance is .5. **another's**: with another person's prefix. Seconds for all people.",
            *(
                table(f"{count} preferences", ways, COLUMNS)
                for count, ways in results["counts"].items()
            ),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[16], help="preferences")
    parser.add_argument("--held-out", type=int, default=48, help="pairs per person")
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    settings = ("held_out", "num_slots", "steps")
    file = ResultFile("preferences", options, settings=settings, model=frozen, page=page)
    ways = {
        "preferences": from_preferences,
        "trained on the preferred texts": from_chosen_texts,
        "preferred texts in the prompt": in_the_prompt,
    }
    every = people(options.data)
    for count in options.counts:
        for name, way in ways.items():
            if file.get("counts", str(count), name) is None:
                figures = measure(
                    partial(way, options=options),
                    engine(frozen),
                    every,
                    count,
                    options.held_out,
                )
                Console(width=200).print(f"{name}, {count} preferences: {figures}")
                file.set("counts", str(count), name, value=figures)


if __name__ == "__main__":
    main()
