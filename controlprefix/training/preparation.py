"""Preparation: from examples to training rows and initial prefixes."""

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from controlprefix.errors import TrainingDataError
from controlprefix.inference.resolver import Resolver, part_at_strength
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Kind, Part, Prefix, PrefixKey, Site
from controlprefix.request import Example
from controlprefix.training.initialization import (
    Initialization,
    Initializations,
    InitSpec,
    make_slots,
    typical_scale,
)
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.run import split
from controlprefix.training.settings import TrainingSettings

Learnable = Literal["task", "attributes", "user"]
_KINDS: dict[str, Kind] = {"task": "task", "attributes": "attribute", "user": "user"}

_log = logging.getLogger("controlprefix")


@dataclass(frozen=True, slots=True)
class Preparation:
    """What the training loop needs.

    Attributes:
        rows: One per example.
        initial: The prefixes to train, at their initialization.
        scale: Per site, the size of the model's keys and values, `(slot_size,)`.
        left_out: What examples name that is neither trained nor stored.
    """

    rows: list[TrainingRow]
    initial: dict[PrefixKey, Prefix]
    scale: dict[Site, Tensor]
    left_out: tuple[str, ...]


def prepare(
    examples: Sequence[Example],
    frozen: FrozenModel,
    resolver: Resolver,
    settings: TrainingSettings,
    *,
    learn: Learnable | Sequence[Learnable] | None,
    num_slots: int | Mapping[Learnable, int],
    init: Initialization | Initializations,
    num_slots_of: Callable[[PrefixKey], int | None] | None = None,
) -> Preparation:
    """Divide the parts that examples name into trained and frozen, and initialize the trained.

    Initializations from examples use training rows only, never held-out ones.

    Args:
        examples: At least one, with default labels.
        frozen: The model.
        resolver: Finds the parts that are not trained.
        settings: For the seed and the split.
        learn: Which kinds of parts to train; None for the task and attributes that there are.
        num_slots: Slots of each trained prefix, or per kind.
        init: See `ControlPrefix.train`.
        num_slots_of: Slots of one prefix, where that differs from `num_slots`.

    Raises:
        TrainingDataError: If the examples cannot be trained on.
    """
    if not examples:
        raise TrainingDataError("there are no examples to train on")
    if learn is None:
        by_default: tuple[Learnable, ...] = ("task", "attributes")
        learn = [name for name in by_default if any(getattr(row, name) for row in examples)]
        if not learn:
            raise TrainingDataError("no example has a task or attributes to learn; give it one")
    kinds = _check_learnable(examples, [learn] if isinstance(learn, str) else list(learn))
    named = [example.named_parts for example in examples]
    keys = list(dict.fromkeys(part.key for row in named for part in row if part.key.kind in kinds))
    spec = InitSpec.parse(init, keys)
    tokenizer = frozen.request_tokenizer
    tokenized = tokenizer.ids_of_examples(examples)

    other_keys = {part.key for row in named for part in row if part.key.kind not in kinds}
    stored = resolver.current(other_keys)
    left_out = tuple(sorted(str(key) for key in other_keys - stored.keys()))
    if left_out:
        _log.warning("nothing is stored yet for %s: trained without", ", ".join(left_out))
    rows = []
    for example, parts in zip(tokenized, named, strict=True):
        frozen_parts: list[Part] = [
            part_at_strength(part.key, stored[part.key], part.strength).part
            for part in parts
            if part.key in stored
        ]
        learned = [(part.key, part.strength) for part in parts if part.key.kind in kinds]
        rows.append(TrainingRow.from_example(example, tokenizer.end_id, frozen_parts, learned))

    seed = settings.seed
    training_ids = set(split(len(rows), settings, random.Random(seed))[0])
    completions = [tokenized[i].completion for i in range(len(rows)) if i in training_ids]
    stored_keys = set(keys) if spec.default == "stored" else set()
    stored_prefixes = {k: v.value for k, v in resolver.current(stored_keys).items()}
    initial: dict[PrefixKey, Prefix] = {}
    for index, key in enumerate(keys):
        own_num_slots = num_slots_of(key) if num_slots_of else None
        count = _num_slots_for(
            key.kind,
            num_slots if own_num_slots is None else own_num_slots,
            tokenizer.context_length,
        )
        row_ids = [i for i, parts in enumerate(named) if any(part.key == key for part in parts)]
        row_ids = [i for i in row_ids if i in training_ids] or row_ids
        random.Random(seed).shuffle(row_ids)
        stored_prefix = stored_prefixes.get(key)
        initial[key] = make_slots(
            frozen,
            key,
            count,
            spec,
            stored=stored_prefix if isinstance(stored_prefix, Prefix) else None,
            text="\n".join(examples[i].completion for i in row_ids),
            rows=[rows[i] for i in row_ids],
            completions=completions,
            seed=seed,
            index=index,
        )
    scale = typical_scale(frozen, [token for ids in completions for token in ids])
    return Preparation(rows, initial, scale, left_out)


def require_examples(examples: object) -> list[Example]:
    """The examples as a list.

    Raises:
        TrainingDataError: With the row that is not an Example.
    """
    if isinstance(examples, (str, Example)) or not isinstance(examples, Iterable):
        raise TrainingDataError(f"expected a list of Example rows, got {type(examples).__name__}")
    rows = list(examples)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Example):
            raise TrainingDataError(f"row {i} is a {type(row).__name__}; give Example rows")
    return rows


def check_trainable(examples: Sequence[Example]) -> None:
    """Check that examples use no field that means something else in training.

    Raises:
        TrainingDataError: With the row.
    """
    for i, row in enumerate(examples, 1):
        problem = ""
        if row.mixing != "attention":
            problem = f"mixing={row.mixing!r}, which applies to the logits of trained prefixes"
        elif row.calibrated:
            problem = "calibrated=True, which applies to the dials of trained prefixes"
        elif row.unseen != "refuse":
            problem = f"unseen={row.unseen!r}, which replaces labels that have no prefix"
        elif any(part.strength < 0 for part in row.named_parts):
            problem = "a strength below 0, which steers away from a prefix and trains none"
        if problem:
            raise TrainingDataError(f"row {i} has {problem}; leave it out")


def _check_learnable(examples: Sequence[Example], learn: Sequence[Learnable]) -> set[Kind]:
    for name in learn:
        if name not in _KINDS:
            raise TrainingDataError(f"cannot learn {name!r}; learn any of: {', '.join(_KINDS)}")
    if not learn:
        raise TrainingDataError(f"learn is empty; learn any of: {', '.join(_KINDS)}")
    for name in learn:
        if not any(getattr(row, name) for row in examples):
            raise TrainingDataError(
                f"learn names {name!r} but no example has one; leave it out of learn"
            )
    kinds = {_KINDS[name] for name in learn}
    check_trainable(examples)
    for i, row in enumerate(examples, 1):
        if not any(part.key.kind in kinds and part.strength > 0 for part in row.named_parts):
            raise TrainingDataError(
                f"row {i} has none of what is to be learned ({', '.join(learn)}); leave it out or "
                "give it one"
            )
    return kinds


def _num_slots_for(
    kind: Kind, num_slots: int | Mapping[Learnable, int], context_length: int | None
) -> int:
    by_kind = (
        {_KINDS.get(name): count for name, count in num_slots.items()}
        if isinstance(num_slots, Mapping)
        else dict.fromkeys(_KINDS.values(), num_slots)
    )
    if kind not in by_kind:
        raise TrainingDataError(f"num_slots has no entry for {kind!r}; add one")
    count = by_kind[kind]
    if not isinstance(count, int):
        raise TrainingDataError(f"num_slots is {count!r}; it must be a whole number")
    if count < 1 or (context_length is not None and count > context_length):
        limit = (
            "more"
            if context_length is None
            else f"up to {context_length}, the context of this model"
        )
        raise TrainingDataError(f"num_slots is {count}; it must be 1 or {limit}")
    return count
