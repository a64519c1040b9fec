"""What users' prefixes reveal of the texts they were trained on, and the cost of revealing less.

The decoder and the authors are those of `authors.py` (DATA as there).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import mean
from typing import Any

from rich.console import Console

from controlprefix import Preference

from lib.authors import DECODER, NUM_SLOTS, Authors, add_author_options
from lib.results import arguments, describe, save
from lib.tables import Column, table

Way = Callable[[Authors, str, Sequence[str]], object]


def enrolled(authors: Authors, author: str, posts: Sequence[str], **options: Any) -> None:
    authors.cp.enroll(author, posts, **options)


def trained(authors: Authors, author: str, posts: Sequence[str], **options: Any) -> None:
    authors.trained({author: posts}, **options)


def from_preferences(authors: Authors, author: str, posts: Sequence[str]) -> None:
    """The author's posts preferred to those of another author."""
    others = authors.posts[authors.swapped[author]]
    pairs = [
        Preference(prompt="", raw=True, chosen=own, rejected=other, user=author)
        for own, other in zip(posts, others, strict=False)
        if own != other
    ]
    authors.cp.train_preferences(
        pairs, num_slots=NUM_SLOTS, steps=PREFERENCE_STEPS, validation=0, progress=False
    )


PREFERENCE_STEPS = 20
PREFERENCES = (
    f" *preferences*: the author's posts preferred to another author's, {PREFERENCE_STEPS} steps; "
    "not audited with planted numbers."
)
WITHOUT_CANARIES = {"preferences"}  # such a prefix cannot be made again by an audit
WAYS: dict[str, Way] = {
    "enrolled": partial(enrolled, decoder=DECODER),
    "matched, 16 slots": partial(enrolled, num_slots=NUM_SLOTS),
    "matched, 64 slots": enrolled,
    "code, 3 epochs": partial(trained, decoder=DECODER),
    "all slots, 1 epoch": partial(trained, decoder=DECODER, as_codes=False, epochs=1),
    "all slots, 3 epochs": partial(trained, decoder=DECODER, as_codes=False),
    "all slots, early stopping": partial(
        trained, decoder=DECODER, as_codes=False, epochs=10, validation=0.2
    ),
    "all slots, 10 epochs": partial(trained, decoder=DECODER, as_codes=False, epochs=10),
    "all slots, no decoder, 3 epochs": trained,
    "preferences": from_preferences,
}
COLUMNS: tuple[Column, ...] = (
    ("gain", "gain", 3),
    ("membership_auc", "membership", 2),
    ("extraction_rate", "extraction", 2),
    ("exposure_bits", "exposure", 1),
)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    return "\n\n".join(
        [
            "# Privacy",
            f"Means over {results['authors']} blog authors, {results['texts']} posts each; "
            f"{results['model']}, {NUM_SLOTS} slots. Written by `{results['command']}` at commit "
            f"{results['commit']}, {results['date']}.",
            "**gain**: reduction of the NLL of the author's newest posts, nats per token. "
            "**membership**: AUC of membership inference by likelihood, training posts against "
            "newer ones (0.5: none; the older posts of an author are also slightly more alike). "
            "**extraction**: share of training posts continued exactly for 16 tokens. "
            "**exposure**: of planted numbers, in bits, of 8; chance gives 1.4 on average."
            + (PREFERENCES if "preferences" in results["ways"] else ""),
            table("way", results["ways"], COLUMNS),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=4)
    parser.add_argument("--texts", type=int, default=16, help="posts of each author")
    parser.add_argument("--num-canaries", type=int, default=2, help="planted per author")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args(argv)
    authors = Authors(options)
    cp = authors.cp
    if DECODER not in cp.names("decoder"):
        authors.train_decoder()
    figures: dict[str, dict[str, float]] = {}
    for way in options.ways:
        audits = []
        num_canaries = 0 if way in WITHOUT_CANARIES else options.num_canaries
        for author in authors.authors:
            posts = authors.posts[author][: options.texts]
            WAYS[way](authors, author, posts)
            audit = cp.audit_user(author, posts, authors.newest[author], num_canaries=num_canaries)
            audits.append(asdict(audit))
            cp.forget_user(author)
        figures[way] = {
            key: round(mean(values), 4)
            for key, _, _ in COLUMNS
            if (values := [a[key] for a in audits if a[key] is not None])
        }
        Console(width=160).print(way, figures[way])
        about = {"model": describe(cp.frozen_model), "authors": options.authors}
        about["texts"] = options.texts
        save(options.results, "privacy", {**about, "ways": figures}, page=page)


if __name__ == "__main__":
    main()
