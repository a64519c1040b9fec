"""Enrolment with and without a guard: how many authors a personal code harms.

Codes are predicted from some posts of each author, and from posts of another author each time (a
user whose texts say nothing of them). Harm and gain are against the mean code, on the newest posts.
DATA: see lib/authors.py.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from controlprefix.users.text_losses import losses_of_texts

from lib.authors import DECODER, Authors, Posts, add_author_options
from lib.results import ResultFile, arguments
from lib.tables import header, line


def mixed(authors: Authors, count: int) -> dict[str, list[str]]:
    """Posts of a different other author in each place."""
    names = authors.authors
    return {
        name: [authors.posts[names[(i + 1 + k) % len(names)]][k] for k in range(count)]
        for i, name in enumerate(names)
    }


def measured(authors: Authors, posts: Posts, *, guard: bool) -> dict[str, Any]:
    """Gains over the mean code, nats per token, and what the guard left of each code."""
    users = authors.mean_code({"mean code": []})
    mean = authors.cp.get("user", users["mean code"])
    gains, shares = [], []
    for author, texts in posts.items():
        authors.cp.enroll(author, texts, decoder=DECODER, guard=guard)
        shares.append(authors.cp.version_info("user", author).details["enrolled"].get("share", 1.0))
        own = authors.cp.get("user", author)
        newest = authors.newest[author]
        before, after = (losses_of_texts(authors.cp.frozen_model, newest, p) for p in (mean, own))
        num_tokens = sum(count for _, count in before)
        gains.append((sum(x for x, _ in before) - sum(x for x, _ in after)) / num_tokens)
        authors.cp.forget_user(author)
    return {
        "gain": statistics.fmean(gains),
        "worst": min(gains),
        "harmed": statistics.fmean(gain < 0 for gain in gains),
        "share": statistics.fmean(shares),
        "gains": [round(gain, 5) for gain in gains],
        "shares": shares,
    }


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    rows = [
        line(
            name,
            f"{values['gain']:.4f}",
            f"{values['worst']:.4f}",
            f"{values['harmed']:.0%}",
            f"{values['share']:.2f}",
        )
        for name, values in results["measured"].items()
    ]
    return "\n\n".join(
        [
            "# A guard for enrolment",
            f"{results['model']}; a decoder trained on {options['users']} authors, "
            f"{options['posts']} posts each; {options['authors']} other authors enrolled from "
            f"{options['count']} posts, the {options['rows']} newest posts of each, cut to "
            f"{options['words']} words. Written by `{results['command']}` at commit "
            f"{results['commit']}, {results['date']}.",
            "Gain over the mean code (what users have in common) in nats per token, the worst of "
            "all authors, how many authors the code harms, and the mean share of its distance from "
            "the mean code:",
            "\n".join([header("enrolled from", "gain", "worst", "harmed", "share"), *rows]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=24, help="evaluated authors")
    parser.add_argument("--count", type=int, default=8, help="posts that they are enrolled from")
    options = parser.parse_args(argv)
    authors = Authors(options)
    settings = ("users", "posts", "epochs", "authors", "rows", "words", "count")
    file = ResultFile("guard", options, settings=settings, model=authors.cp.frozen_model, page=page)
    if DECODER not in authors.cp.names("decoder") or file.get("decoder") is None:
        file.set("measured", value={})
        file.set("decoder", value=authors.train_decoder())
    own = {author: texts[: options.count] for author, texts in authors.posts.items()}
    for kind, posts in (("own posts", own), ("others' posts", mixed(authors, options.count))):
        for guard in (False, True):
            name = f"{kind}, with the guard" if guard else kind
            if file.get("measured", name) is None:
                file.set("measured", name, value=measured(authors, posts, guard=guard))


if __name__ == "__main__":
    main()
