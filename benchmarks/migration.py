"""Users' codes of one model turned into codes of a newer one, against enrolling everyone again.

The newer model is a fine-tuned copy of the older, with a decoder of its own from another seed. The
map between the codes is learned from the users that both decoders were trained on. The evaluated
authors (DATA: see lib/authors.py) are enrolled and trained on both models; on the newer one their
migrated codes are compared with those of enrolling and training them again.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from controlprefix import Example
from controlprefix.evaluation.comparison import adapter_training
from controlprefix.model import FrozenModel
from controlprefix.prefixes import PrefixKey, UserCode
from controlprefix.store import NewVersion

from lib.authors import DECODER, Authors, Posts, add_author_options
from lib.datasets import read_rows
from lib.models import load_from
from lib.results import ResultFile, arguments
from lib.tables import Column, table

COLUMNS: tuple[Column, ...] = (
    ("nll", "NLL", 3),
    ("nll, another's", "NLL, another's", 3),
    ("gain", "gain", 3),
    ("gap", "gap", 3),
    ("of gain", "share of the gain", 2),
    ("of gap", "share of the gap", 2),
)
FINE_TUNING_RATE = 3e-5
MIGRATED = {"enrolled code, migrated": "enrolled", "trained code, migrated": "trained"}


def fine_tuned(frozen: FrozenModel, folder: Path, steps: int) -> FrozenModel:
    """A copy whose weights were all trained for some steps of 8 e-mails."""
    copied: Any = copy.deepcopy(frozen.model)
    emails = [row["body"] for row in read_rows(folder, "email_aeslc", "train") if row["body"]]
    rows = [
        frozen.request_tokenizer.example_ids(
            Example(prompt="", raw=True, completion=" ".join(text.split()[:80]))
        )
        for text in emails[: 8 * steps]
    ]
    adapter_training.train(
        copied.requires_grad_(True),
        rows,
        frozen.request_tokenizer,
        batch_size=8,
        learning_rate=FINE_TUNING_RATE,
        steps=steps,
        seed=0,
    )
    return FrozenModel(copied.requires_grad_(False).eval(), frozen.tokenizer)


def with_decoder(authors: Authors, seed: int) -> Authors:
    """The authors, whose model has a decoder, and the codes of the users it was trained on."""
    if DECODER not in authors.cp.names("decoder"):
        authors.train_decoder(seed=seed)
    decoder, store = authors.decoder(), authors.cp.store
    codes = zip(authors.decoder_posts, authors.trained_codes(), strict=True)
    if not authors.cp.names("user"):
        store.put(
            [
                NewVersion(PrefixKey("user", user), UserCode(decoder.content_hash, values))
                for user, values in codes
            ]
        )
    return authors


def put_codes(authors: Authors, num_posts: int) -> None:
    """Enroll and train the evaluated authors, under two names each."""
    cp = authors.cp
    posts = {author: texts[:num_posts] for author, texts in authors.posts.items()}
    for author, texts in posts.items():
        cp.enroll(f"{author} enrolled", texts, decoder=DECODER)
    authors.trained({f"{author} trained": t for author, t in posts.items()}, decoder=DECODER)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    options, migration, ways = results["options"], results["migration"], results.get("ways", {})
    for figures in ways.values():
        if "nll, another's" in figures:
            figures["gain"] = ways["no prefix"]["nll"] - figures["nll"]
            figures["gap"] = figures["nll, another's"] - figures["nll"]
    for migrated, again in zip(MIGRATED, ("enrolled again", "trained again"), strict=True):
        for name in ("gain", "gap"):
            if migrated in ways and ways[again][name]:
                ways[migrated][f"of {name}"] = ways[migrated][name] / ways[again][name]
    return "\n\n".join(
        [
            "# Migration",
            f"{results['model']}, and a copy that was fine-tuned for {options['steps']} steps on "
            f"e-mails; each has a decoder trained on {options['users']} blog authors with a seed "
            f"of its own. {migration['shared users']} of them are the users with a code on both, "
            f"from whom the map is learned (cross-validated R² {migration['r2']:.3f}). "
            f"{options['authors']} other authors, {options['posts']} posts of each, are migrated, "
            f"or enrolled and trained again. Written by `{results['command']}` at commit "
            f"{results['commit']}, {results['date']}.",
            f"**NLL**: nats per token of the {options['rows']} newest posts; **NLL, another's**: "
            "with another author's prefix, made in the same way; **gain**: against no prefix; "
            "**gap**: what is personal, the difference of the two. The mean code is the same for "
            "everyone.",
            table("code", ways, COLUMNS),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=16, help="authors that are migrated")
    parser.add_argument("--steps", type=int, default=30, help="of fine-tuning")
    parser.add_argument("--new-store", default="sqlite:///authors-new.db", help="as --store")
    parser.add_argument("--new-work", type=Path, default=Path("authors-new.run"), help="as --work")
    options = parser.parse_args(argv)
    old = Authors(options)
    newer = copy.copy(options)
    newer.store, newer.work = options.new_store, options.new_work
    new = Authors(newer, fine_tuned(load_from(options), options.data, options.steps))
    settings = ("users", "posts", "epochs", "authors", "rows", "words", "steps")
    file = ResultFile("migration", options, settings=settings, model=old.cp.frozen_model, page=page)
    for seed, authors in enumerate((old, new)):
        with_decoder(authors, seed)
    if file.get("migration") is None:
        put_codes(old, options.posts)
        report = new.cp.migrate_users(old.cp, decoder=DECODER)
        figures = {"shared users": report.num_shared, "r2": round(report.r2, 5)}
        Console().print(figures)
        file.set("migration", value=figures)

    def migrated(kind: str, posts: Posts) -> dict[str, str]:
        return {author: f"{author} {kind}" for author in posts}

    ways: Mapping[str, Callable[[Posts], dict[str, str]]] = {
        "no prefix": new.no_prefix,
        "mean code": new.mean_code,
        "enrolled again": new.enrolled,
        "trained again": partial(new.trained, decoder=DECODER),
        **{name: partial(migrated, kind) for name, kind in MIGRATED.items()},
    }
    for name, way in ways.items():
        if file.get("ways", name) is None:
            figures = new.measure(way, options.posts)
            figures = {k: v for k, v in figures.items() if k.startswith("nll")}
            Console().print(f"{name}: {figures}")
            file.set("ways", name, value=figures)


if __name__ == "__main__":
    main()
