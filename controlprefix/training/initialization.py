"""Initialization: what a prefix starts from, and the scale of the model's keys and values."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from controlprefix.errors import TrainingDataError
from controlprefix.model import FrozenModel, prefix_from_tokens
from controlprefix.model.slot_attention import QueryText, most_attended, observe
from controlprefix.prefixes import Form, Kind, Prefix, PrefixKey, Site
from controlprefix.training.objectives import TrainingRow

Initialization = Literal["text", "tokens", "random", "stored", "stored or tokens"]
INITIALIZATIONS: tuple[str, ...] = get_args(Initialization)
# Per prefix, a text or another prefix to start from.
Initializations = Mapping[tuple[Kind, str], str | Prefix]

_MAX_SCALE_TOKENS = 64
_MAX_TEXT_TOKENS = 256  # of a text to start from; 512 were no better
_MAX_ATTENDING_ROWS = 8  # per prefix: they choose the slots to start from
_MIN_RELATIVE_SCALE = 1e-2  # so that a head that is silent on these tokens can be trained


@dataclass(frozen=True, slots=True)
class InitSpec:
    """What training prefixes start from.

    Attributes:
        default: For prefixes that are not in `values`.
        values: Per key, a text or a prefix.
    """

    default: Initialization
    values: Mapping[PrefixKey, str | Prefix]

    @classmethod
    def parse(cls, init: Initialization | Initializations, keys: Sequence[PrefixKey]) -> "InitSpec":
        """Check the `init` argument of `train`.

        Args:
            init: A way for all prefixes, or texts and prefixes for some.
            keys: The prefixes that are trained.

        Raises:
            TrainingDataError: If it names something else, or is neither.
        """
        if not isinstance(init, Mapping):
            if init not in INITIALIZATIONS:
                raise TrainingDataError(
                    f"init is {init!r}; it must be one of: {', '.join(INITIALIZATIONS)}"
                )
            return cls(init, {})
        values = {}
        for name, value in init.items():
            key = PrefixKey(*name) if isinstance(name, tuple) and len(name) == 2 else None
            if key not in keys:
                trained = ", ".join(str(tuple(key)) for key in keys)
                raise TrainingDataError(
                    f"init names {name!r}, which is not trained; trained: {trained}"
                )
            if not isinstance(value, Prefix) and not (isinstance(value, str) and value.strip()):
                raise TrainingDataError(f"init of {key} is {value!r}; give a text or a Prefix")
            values[key] = value
        return cls("text", values)


def initial_prefix(
    frozen: FrozenModel,
    key: PrefixKey,
    num_slots: int,
    spec: InitSpec,
    *,
    stored: Prefix | None,
    text: str,
    rows: Sequence[TrainingRow],
    completions: Sequence[Sequence[int]],
    form: Form,
    seed: int,
    index: int,
) -> Prefix:
    """The prefix that training starts from.

    Args:
        frozen: The model.
        key: Which prefix.
        num_slots, form: Its slots and their form; a given or stored prefix keeps its own.
        spec: How to start.
        stored: Its stored version, if there is one.
        text: Its training text, from training rows only.
        rows: Its training rows, shuffled.
        completions: Token ids of the completions of all training rows.
        seed, index: Seed of the run, and a number of this prefix in it.

    Raises:
        GeometryMismatchError: If a given prefix was made for another model.
    """
    start = spec.values.get(key)
    if isinstance(start, Prefix):
        frozen.geometry.require(start.geometry, f"the initialization of {key}")
        return start
    if start is None and spec.default.startswith("stored") and stored is not None:
        return stored
    if start is None and spec.default == "random":
        prefix = Prefix.random(frozen.geometry, num_slots=num_slots, seed=seed + index)
    elif start is None and spec.default.endswith("tokens"):
        vocabulary = sorted({token for ids in completions for token in ids})
        ids = random.Random(f"{seed}:{index}").choices(vocabulary, k=num_slots)
        prefix = prefix_from_tokens(frozen, ids)
    else:
        # The last rows choose the slots: a row attends above all to its own copy, which is at the
        # start of the text. A single row has no other to choose by.
        attending = rows[-_MAX_ATTENDING_ROWS:] if start or len(rows) > 1 else ()
        prefix = prefix_from_training_text(frozen, start or text, attending, num_slots)
    return prefix if form == "joint" else as_decoupled(prefix)


def as_decoupled(prefix: Prefix) -> Prefix:
    """A decoupled prefix of the same keys, which changes nothing yet: its values are 0."""
    slots = {}
    for site, rows in prefix.slots.items():
        columns = rows.split(prefix.geometry.split_sizes(site), dim=1)
        zeros = [torch.zeros_like(values) for values in columns[1::2]]
        pairs = zip(columns[0::2], zeros, strict=True)
        slots[site] = torch.cat([tensor for pair in pairs for tensor in pair], dim=1)
    return Prefix(prefix.geometry, slots, form="decoupled")


def prefix_from_training_text(
    frozen: FrozenModel, text: str, rows: Sequence[TrainingRow], num_slots: int
) -> Prefix:
    """The keys and values of a text.

    If it has more tokens than slots, each kv head keeps those that the rows attend to most.

    Args:
        frozen: The model.
        text: Not empty. Its first 256 tokens are read.
        rows: Rows that are like those the prefix is for, best not from the beginning of the
            text. Without any, the first tokens are kept.
        num_slots: Slots of the prefix; a text of fewer tokens is repeated.
    """
    tokenizer = frozen.request_tokenizer
    max_tokens = min(_MAX_TEXT_TOKENS, tokenizer.context_length or _MAX_TEXT_TOKENS)
    ids = tokenizer.text_ids(text)[: max(max_tokens, num_slots)]
    if len(ids) <= num_slots or not rows:
        return prefix_from_tokens(frozen, ids, num_slots=num_slots)
    whole = prefix_from_tokens(frozen, ids)
    query_texts = [QueryText(row.prompt, row.targets, row.frozen_parts) for row in rows]
    return most_attended(whole, observe(frozen, whole, query_texts), num_slots)


def typical_scale(frozen: FrozenModel, ids: Sequence[int]) -> dict[Site, Tensor]:
    """The scale of the model's own keys and values of some tokens: see `scale_of`.

    Returns:
        Per site, `(slot_size,)`.
    """
    return scale_of(prefix_from_tokens(frozen, ids[:_MAX_SCALE_TOKENS]))


def scale_of(*prefixes: Prefix) -> dict[Site, Tensor]:
    """The scale of the slots of prefixes of one geometry, `(slot_size,)` per site.

    It is the root mean square of each head's keys and values.
    """
    geometry = prefixes[0].geometry
    scales = {}
    for site in geometry.sites:
        rows = torch.cat([prefix.slots[site].float() for prefix in prefixes])
        head_sizes = geometry.head_sizes(site)
        squares = rows.float().square().mean(dim=0)
        minimum = _MIN_RELATIVE_SCALE * squares.mean().sqrt()
        scales[site] = torch.cat(
            [
                head.mean().sqrt().clamp(min=minimum).expand(len(head))
                for head in squares.split(head_sizes)
            ]
        )
    return scales
