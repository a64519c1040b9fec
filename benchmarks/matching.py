"""Prefixes of blog authors from all their posts without training, by number of slots.

Each author's newest posts are scored under slots matched to 16 posts, under their first tokens,
and under all of their tokens, which equals posts in the prompt; and under another author's, made
in the same way: the difference is what is personal. DATA: see lib/authors.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from controlprefix.model import prefix_from_tokens

from lib.authors import Authors, Posts, add_author_options
from lib.results import ResultFile, arguments
from lib.tables import Column, table

COLUMNS: tuple[Column, ...] = (
    ("nll", "NLL", 3),
    ("nll, another's", "NLL, another's", 3),
    ("bytes per user", "bytes per user", 0),
)
FIRST_TOKENS = 64


def matched(authors: Authors, num_slots: int, posts: Posts) -> dict[str, str]:
    """`enroll` without a decoder."""
    for author, texts in posts.items():
        authors.cp.enroll(author, texts, num_slots=num_slots)
    return {author: author for author in posts}


def first_tokens(authors: Authors, posts: Posts) -> dict[str, str]:
    """The keys and values of the first tokens alone."""
    frozen = authors.cp.frozen_model
    for author, texts in posts.items():
        ids = frozen.request_tokenizer.text_ids("\n\n".join(texts))[:FIRST_TOKENS]
        authors.cp.put("user", author, prefix_from_tokens(frozen, ids))
    return {author: author for author in posts}


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    return "\n\n".join(
        [
            "# Matched texts",
            f"{results['model']}; {options['authors']} blog authors, {options['posts']} posts of "
            f"each, cut to {options['words']} words, become a prefix without training. Written by "
            f"`{results['command']}` at commit {results['commit']}, {results['date']}.",
            f"**NLL**: nats per token of the {options['rows']} newest posts with the author's "
            "prefix; **NLL, another's**: with another author's, made in the same way (the "
            "difference is what is personal).",
            table("prefix", results["ways"], COLUMNS),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=16, help="evaluated authors")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[16, 32, 64])
    options = parser.parse_args(argv)
    authors = Authors(options)
    settings = ("posts", "authors", "rows", "words")
    file = ResultFile(
        "matching", options, settings=settings, model=authors.cp.frozen_model, page=page
    )
    ways: dict[str, Callable[[Posts], dict[str, str]]] = {
        "none": authors.no_prefix,
        f"first {FIRST_TOKENS} tokens": partial(first_tokens, authors),
        **{f"{n} matched slots": partial(matched, authors, n) for n in options.num_slots},
        "all tokens": authors.in_the_prompt,
    }
    for name, way in ways.items():
        if file.get("ways", name) is None:
            figures = authors.measure(way, options.posts)
            figures.pop("seconds per user", None)  # user-training-speed.json has times
            Console(width=200).print(f"{name}: {figures}")
            file.set("ways", name, value=figures)


if __name__ == "__main__":
    main()
