"""Held-out rows: chosen by prompt and by user, so that nothing they ask is trained on."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

from controlprefix.errors import TrainingDataError, shortened
from controlprefix.example import Example
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.key import composed
from controlprefix.training.objectives import TrainingRow

_MAX_SHARE = 0.3  # of the rows, that one prompt or user may take out of training

_log = logging.getLogger("controlprefix")


class Split(NamedTuple):
    """Indices of the rows to train on, and of the held-out rows."""

    training: list[int]
    held_out: list[int]


def split_examples(
    examples: Sequence[Example],
    learned: Sequence[Collection[PrefixKey]],
    fraction: float,
    seed: int,
) -> Split:
    """Hold examples out, whole prompts and whole users at a time.

    A user with a prefix that is trained is not held out as a whole. Where the rows have too few
    users or prompts for that, rows are held out by prompt alone, or else one by one.

    Args:
        examples: The rows.
        learned: Per row, the prefixes that it trains; each keeps a row to be trained on.
        fraction: Share of the rows to hold out, 0 to below 1.
        seed: Seed of the choice.

    Raises:
        TrainingDataError: If no row is left to train on.
    """
    by_text = [[("text", normalized(example.completion))] for example in examples]
    identities = [prompt_identity(example) for example in examples]
    # A text without a prompt that is another row's completion.
    texts = {text for (text,), prompt in zip(by_text, identities, strict=True) if not prompt}
    by_prompt: list[list[tuple[str, str]]] = []
    by_both: list[list[tuple[str, str]]] = []
    for example, prompt, keys, text in zip(examples, identities, learned, by_text, strict=True):
        links = [("prompt", prompt)] if prompt else []
        links += text if text[0] in texts else []
        links += [("image", digest) for digest in image_digests(example)]
        by_prompt.append(links)
        user = None if example.user is None else PrefixKey("user", example.user)
        is_linked = user is not None and user not in keys
        by_both.append([*links, ("user", user.name)] if user and is_linked else links)
    return split_at_first(
        [
            (by_both, ""),
            (by_prompt, "the rows have too few users: held out by prompt, not by user"),
            (by_text, "the rows have too few prompts: held out one by one, not by prompt"),
        ],
        fraction,
        seed,
        learned,
    )


def check_validation(
    validation: Sequence[Example], training: Sequence[Example], rows: Sequence[TrainingRow]
) -> None:
    """Check held-out examples, and warn of prompts that are trained on too.

    Args:
        validation: Held-out examples.
        training: Examples to train on.
        rows: The training rows of `validation`.

    Raises:
        TrainingDataError: If one names no prefix that is trained.
    """
    without = [
        example.place(i)
        for i, (example, row) in enumerate(zip(validation, rows, strict=True), 1)
        if not any(strength for _, strength in row.learned)
    ]
    if without:
        raise TrainingDataError(
            f"held-out rows name no prefix that is trained: {shortened(without)}; leave them out"
        )
    warn_of_shared_prompts(validation, training)


def warn_of_shared_prompts(held_out: Sequence[Example], training: Sequence[Example]) -> None:
    """Warn of held-out rows whose prompts, or texts without a prompt, are trained on too."""

    def identity(example: Example) -> tuple[str, str]:
        prompt = prompt_identity(example)
        return prompt, "" if prompt else normalized(example.completion)

    trained = set(map(identity, training))
    num_shared = sum(identity(example) in trained for example in held_out)
    if num_shared:
        _log.warning(
            "%d of %d held-out rows have a prompt, or a text without one, that is trained on too",
            num_shared,
            len(held_out),
        )


def split_at_first(
    levels: Sequence[tuple[Sequence[Sequence[Hashable]], str]],
    fraction: float,
    seed: int,
    learned: Sequence[Collection[PrefixKey]] = (),
) -> Split:
    """Split by the first links by which rows can be held out.

    Args:
        levels: Links as in `split`, the strictest first, with a warning to log if they are used.
        fraction, seed, learned: As in `split`.
    """
    result = Split([], [])
    for links, warning in levels:
        result = split(links, fraction, seed, learned)
        if result.held_out or not fraction:
            if result.held_out and warning:
                _log.warning("%s", warning)
            break
    return result


def split(
    links: Sequence[Sequence[Hashable]],
    fraction: float,
    seed: int,
    learned: Sequence[Collection[PrefixKey]] = (),
) -> Split:
    """Hold rows out so that no held-out row shares a link with a row that is trained on.

    Args:
        links: Per row, what ties it to other rows, such as its prompt.
        fraction: Share of the rows to hold out. Fewer are held out where groups of linked rows
            do not add up to it; more only if the smallest group is larger than that.
        seed: Seed of the choice.
        learned: Per row, what it trains; each keeps a row to be trained on.

    Raises:
        TrainingDataError: If no row is left to train on.
    """
    num_rows = len(links)
    order = random.Random(seed)
    target = round(fraction * num_rows)
    if num_rows and target == num_rows:
        raise TrainingDataError(
            f"validation {fraction} of {num_rows} examples leaves none to train on; "
            "lower it, or give more examples"
        )
    groups = list(_groups(links))
    order.shuffle(groups)
    rows_of = Counter(key for keys in learned for key in set(keys))
    held_out: list[int] = []

    def try_group(group: Sequence[int], limit: float) -> bool:
        own = Counter(key for i in group for key in set(learned[i])) if learned else Counter()
        if len(held_out) + len(group) > limit or any(rows_of[k] <= n for k, n in own.items()):
            return False
        rows_of.subtract(own)
        held_out.extend(group)
        return True

    if target:
        for group in groups:
            try_group(group, target)
        by_size = sorted(groups, key=len)
        if not held_out:
            any(try_group(group, _MAX_SHARE * num_rows) for group in by_size)
    return Split(sorted(set(range(num_rows)) - set(held_out)), held_out)


def prompt_identity(example: Example) -> str:
    """What examples with the same prompt have in common; empty for a text without a prompt."""
    if example.prompt_ids is not None:
        return f"ids {' '.join(map(str, example.prompt_ids))}"
    texts = [example.prompt or ""]
    if example.messages is not None and [m.role for m in example.messages] == ["user"]:
        texts = [example.messages[0].content]  # the same as a prompt
    elif example.messages is not None:
        texts = [f"{message.role}: {message.content}" for message in example.messages]
    return " ".join([*filter(None, [normalized(" ".join(texts))]), *image_digests(example)])


def image_digests(example: Example) -> list[str]:
    """A hash of each image of an example."""
    images = [image for message in example.conversation for image in message.images]
    return [f"image {hashlib.sha256(image).hexdigest()}" for image in images]


def normalized(text: str) -> str:
    """What texts have in common that differ in case, blanks or how accents are written."""
    return " ".join(composed(text).split()).casefold()


def _groups(links: Sequence[Sequence[Hashable]]) -> Iterator[list[int]]:
    """Rows that are linked, directly or through others; in the order of their first row."""
    parent = list(range(len(links)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, own in enumerate(links):
        for link in own:
            a, b = sorted((root(i), root(first.setdefault(link, i))))
            parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(links)):
        groups.setdefault(root(i), []).append(i)
    yield from groups.values()
