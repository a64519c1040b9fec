"""Images from end to end: a caption's style and a user's voice on a model that reads digits.

A proof of the wiring, not of quality: no package carries a model of images and texts, so a small
vision encoder and a bridge are trained in front of the frozen language model (lib/digit_model.py),
then prefixes for two caption styles and two users, on captions with a style, a user, or both.
Measured on images that nothing was trained on: whether captions name the digit, and whether they
have the style and the user's ending.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from controlprefix import Example, Request

from lib.digit_model import NAMES, PROMPT, digits, reader_of_digits
from lib.models import add_model_options, load_from
from lib.results import ResultFile, arguments
from lib.tables import header, line

BATCH_SIZE = 8
NEW_TOKENS = 16
STYLES = {"formal": "{} is the digit that is shown.", "casual": "{}, I guess!"}
USERS = {"ana": " Best, Ana", "bo": " (Bo)"}


def caption(name: str, style: str | None, user: str | None) -> str:
    return f" {STYLES[style].format(name) if style else name}{USERS[user] if user else ''}"


def combinations() -> list[tuple[str | None, str | None]]:
    """Styles and users, each alone and together."""
    return [(style, user) for style in (None, *STYLES) for user in (None, *USERS) if style or user]


def fields(style: str | None, user: str | None) -> dict[str, Any]:
    return {"raw": True, "attributes": {"style": style} if style else {}, "user": user}


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    options = results["options"]
    rows = [
        line(name, *("" if values[key] is None else f"{values[key]:.2f}" for key in values))
        for name, values in results["measured"].items()
    ]
    return "\n\n".join(
        [
            "# Images: a proof of the wiring",
            f"{results['model']} with a vision encoder and a bridge of {options['reader_steps']} "
            f"steps; prefixes of {options['num_slots']} slots, {options['steps']} steps of "
            f"{BATCH_SIZE} captions; {options['images']} images of digits that nothing was trained "
            f"on. Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            "Share of captions that name the digit, have the style, and have the user's ending:",
            "\n".join([header("requested", "digit", "style", "user", "all"), *rows]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, resumable=True)
    add_model_options(parser)
    parser.add_argument("--reader-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--images", type=int, default=60, help="test images")
    options: argparse.Namespace = parser.parse_args(argv)

    frozen = load_from(options)
    settings = ("reader_steps", "steps", "num_slots", "images")
    file = ResultFile("digits", options, settings=settings, model=frozen, page=page)
    if file.get("measured"):
        return
    cp = reader_of_digits(frozen, steps=options.reader_steps)
    train, test = digits()
    kinds = combinations()
    rows = [
        Example(
            prompt=PROMPT,
            images=[image],
            completion=caption(NAMES[number], *kinds[i % len(kinds)]),
            **fields(*kinds[i % len(kinds)]),
        )
        for i, (image, number) in enumerate(train[: options.steps * BATCH_SIZE])
    ]
    cp.train(
        rows,
        learn=["attributes", "user"],
        num_slots=options.num_slots,
        steps=options.steps,
        batch_size=BATCH_SIZE,
        validation=0,
    )
    measured = {}
    for style, user in [(None, None), *kinds]:
        requests = [
            Request(prompt=PROMPT, images=[image], max_new_tokens=NEW_TOKENS, **fields(style, user))
            for image, _ in test[: options.images]
        ]
        texts = [completion.text for completion in cp.generate(requests)]
        named = [NAMES[n] in text.lower() for text, (_, n) in zip(texts, test, strict=False)]
        styled = [STYLES[style].format("") in text if style else True for text in texts]
        signed = [USERS[user] in text if user else True for text in texts]
        measured[" and ".join(filter(None, (style, user))) or "no prefix"] = {
            "digit": statistics.fmean(named),
            "style": statistics.fmean(styled) if style else None,
            "user": statistics.fmean(signed) if user else None,
            "all": statistics.fmean(map(all, zip(named, styled, signed, strict=True))),
        }
        print(style, user, texts[:3])
    file.set("measured", value=measured)


if __name__ == "__main__":
    main()
