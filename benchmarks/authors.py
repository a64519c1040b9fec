"""Per-user prefixes of blog authors against other methods, with another author's prefix beside.

From 1, 4 and 16 posts of each author, evaluated on the author's newest posts with the own prefix
and with another author's: the difference is what is personal. The decoder is kept in `--store`;
measurements that the result file has are not repeated. DATA: see lib/authors.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from lib.authors import DECODER, EPOCHS, NUM_SLOTS, PEFT_RATES, Authors, add_author_options
from lib.results import ResultFile, arguments
from lib.tables import Column, table

COLUMNS: tuple[Column, ...] = (
    ("nll", "NLL", 3),
    ("nll, another's", "NLL, another's", 3),
    ("authorship", "authorship", 2),
    ("seconds per user", "s per user", 2),
    ("bytes per user", "bytes per user", 0),
)
NOT_PERSONAL = ("no prefix", "mean code")


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options, decoder = results["options"], results["decoder"]
    parts = [
        "# Users",
        f"{results['model']}; {options['authors']} blog authors that nothing was trained on, the "
        f"{options['rows']} newest posts of each, cut to {options['words']} words. The decoder was "
        f"trained on {decoder['users']:.0f} other authors, {options['posts']} posts each, in "
        f"{decoder['seconds'] / 60:.0f} minutes. {NUM_SLOTS} slots, {EPOCHS} epochs per user. "
        f"Written by `{results['command']}` at commit {results['commit']}, {results['date']}.",
        "**NLL**: nats per token of the newest posts with the author's prefix; **NLL, "
        "another's**: with another author's, made in the same way (the difference is what is "
        f"personal). **authorship**: how often a classifier of the {options['authors']} authors "
        f"finds the right one in {options['texts']} posts generated with the prefix. Seconds are "
        "of a shared machine.",
    ]
    counts = sorted({int(n) for by_count in results.get("methods", {}).values() for n in by_count})
    for num_posts in counts:
        rows = {
            name: by_count[str(num_posts)]
            for name, by_count in results["methods"].items()
            if str(num_posts) in by_count
        }
        parts.append(table(f"{num_posts or 'no'} posts", rows, COLUMNS))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=16, help="evaluated authors")
    parser.add_argument("--texts", type=int, default=8, help="generated per author, from 16 posts")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16], help="posts")
    options = parser.parse_args(argv)
    authors = Authors(options)
    settings = ("users", "posts", "epochs", "authors", "rows", "texts", "words")
    file = ResultFile(
        "authors", options, settings=settings, model=authors.cp.frozen_model, page=page
    )
    if DECODER not in authors.cp.names("decoder") or file.get("decoder") is None:
        file.set("decoder", value=authors.train_decoder())
    trained = authors.trained
    ways: dict[str, Callable[..., dict[str, str]]] = {
        "no prefix": authors.no_prefix,
        "mean code": authors.mean_code,
        "posts in the prompt": authors.in_the_prompt,
        "nearest users": authors.nearest,
        "controlprefix, enrolled": authors.enrolled,
        "controlprefix, code": partial(trained, decoder=DECODER),
        "controlprefix, all slots": partial(trained, decoder=DECODER, as_codes=False),
        "controlprefix, no decoder": trained,
    }
    methods: dict[str, Callable[[int, int], dict[str, float]]] = {
        **{name: partial(authors.measure, way) for name, way in ways.items()},
        **{name: partial(authors.measure_peft, name) for name in PEFT_RATES},
    }
    for num_posts in (0, *options.counts):
        for name, measure in methods.items():
            if (name in NOT_PERSONAL) != (num_posts == 0):
                continue
            if file.get("methods", name, str(num_posts)) is None:
                num_texts = options.texts if num_posts in (0, max(options.counts)) else 0
                figures = measure(num_posts, num_texts)
                Console(width=200).print(f"{name}, {num_posts} posts: {figures}")
                file.set("methods", name, str(num_posts), value=figures)


if __name__ == "__main__":
    main()
