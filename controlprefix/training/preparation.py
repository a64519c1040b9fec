"""Preparation: from examples to training rows and initial prefixes."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from controlprefix.errors import TrainingDataError, shortened
from controlprefix.example import Example
from controlprefix.inference.resolver import Resolver, part_at_strength
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Kind, Part, Prefix, PrefixKey, Site
from controlprefix.request import Request
from controlprefix.store import StoredVersion
from controlprefix.training.context_fit import fit_to_context
from controlprefix.training.held_out import check_validation, split_examples
from controlprefix.training.initialization import (
    Initialization,
    Initializations,
    InitSpec,
    initial_prefix,
    typical_scale,
)
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.off_context import off_context_rows
from controlprefix.training.settings import TrainingSettings

Learnable = Literal["task", "attributes", "user"]
_KINDS: dict[str, Kind] = {"task": "task", "attributes": "attribute", "user": "user"}

_log = logging.getLogger("controlprefix")


@dataclass(frozen=True, slots=True)
class Preparation:
    """What the training loop needs.

    Attributes:
        rows: Rows to train on: one per example, and those of `off_context`.
        held_out: Rows for validation.
        initial: The prefixes to train, at their initialization.
        scale: Per site, the size of the model's keys and values, `(slot_size,)`.
        left_out: What examples name that is neither trained nor stored.
        num_cut, num_skipped: Rows that did not fit the model's context.
        users: Users whose rows they are.
        removal_number: Number of the last entry of the store's audit log when the rows were read.
        initial_versions: The stored versions that prefixes start from.
    """

    rows: list[TrainingRow]
    held_out: list[TrainingRow]
    initial: dict[PrefixKey, Prefix]
    scale: dict[Site, Tensor]
    left_out: tuple[str, ...]
    num_cut: int
    num_skipped: int
    users: frozenset[str]
    removal_number: int
    initial_versions: Mapping[PrefixKey, StoredVersion] = field(default_factory=dict)

    def require_held_out(self, settings: TrainingSettings, what: str) -> None:
        """Check that there are rows for validation.

        Args:
            settings: The run's.
            what: What needs them.

        Raises:
            TrainingDataError: If there are none.
        """
        if not self.held_out:
            raise TrainingDataError(
                f"{what} needs held-out examples, but validation {settings.validation} of "
                f"{len(self.rows)} examples is none; raise it, give rows as validation, or give "
                "more examples"
            )

    def warn_without_contrast(self) -> None:
        """Warn if no attribute has two labels to compare."""
        counts = Counter(key.attribute for key in self.initial if key.attribute)
        if not counts or max(counts.values()) < 2:
            _log.warning(
                "contrast has no effect: it compares a row under two labels of one attribute, but "
                "no attribute of these rows has two that are trained"
            )


def prepare(
    examples: Sequence[Example],
    frozen: FrozenModel,
    resolver: Resolver,
    settings: TrainingSettings,
    *,
    learn: Learnable | Sequence[Learnable] | None,
    num_slots: int | Mapping[Learnable, int],
    init: Initialization | Initializations,
    validation: Sequence[Example] = (),
    num_slots_of: Callable[[PrefixKey], int | None] | None = None,
    complete: Callable[[Example, TrainingRow], TrainingRow] = lambda _, row: row,
    removal_number: int | None = None,
) -> Preparation:
    """Divide the parts that examples name into trained and frozen, and initialize the trained.

    Initializations from examples use training rows only, never held-out ones.

    Args:
        examples: At least one, with default labels.
        frozen: The model.
        resolver: Finds the parts that are not trained.
        settings: For the seed and the fraction to hold out.
        learn: Which kinds of parts to train; None for the task and attributes that there are.
        num_slots: Slots of each trained prefix, or per kind.
        init: See `ControlPrefix.train`.
        validation: Held-out rows, instead of a fraction of `examples`.
        num_slots_of: Slots of one prefix, where that differs from `num_slots`.
        complete: Adds to an example's row what another objective needs.
        removal_number: Number of the last entry of the store's audit log from before the rows
            were read, if they were read from the store.

    Raises:
        TrainingDataError: If the examples cannot be trained on.
        ContextLengthError: If some are too long, and are neither to be cut nor skipped.
    """
    if removal_number is None:
        removal_number = resolver.last_removal_number()
    kinds = kinds_to_learn(examples, learn)
    check_trainable(validation, "validation, ")
    tokenizer = frozen.request_tokenizer
    fitted = fit_to_context(examples, tokenizer, settings.too_long)
    fitted_validation = fit_to_context(validation, tokenizer, settings.too_long)
    learned = [
        [part for part in example.named_parts if part.key.kind in kinds]
        for example in fitted.examples
    ]
    keys = list(dict.fromkeys(part.key for parts in learned for part in parts if part.strength))
    spec = InitSpec.parse(init, keys)

    all_examples = [*fitted.examples, *fitted_validation.examples]
    named = {part.key for row in all_examples for part in row.named_parts if part.strength}
    other_keys = named - set(keys)
    stored = resolver.current(other_keys)
    left_out = tuple(sorted(str(key) for key in other_keys - stored.keys()))
    if left_out:
        _log.warning("nothing is stored yet for %s: trained without", ", ".join(left_out))
    rows = []
    for example, ids in zip(
        all_examples, (*fitted.tokenized, *fitted_validation.tokenized), strict=True
    ):
        parts = divide_parts(example, keys, stored)
        rows.append(complete(example, TrainingRow.from_example(ids, tokenizer.end_id, *parts)))

    if validation:
        check_validation(fitted_validation.examples, fitted.examples, rows[len(learned) :])
        training_ids = list(range(len(learned)))
        held_out = rows[len(learned) :]
    else:
        trained = [[part.key for part in parts if part.strength] for parts in learned]
        training_ids, held_out_ids = split_examples(
            fitted.examples, trained, settings.validation, settings.seed
        )
        held_out = [rows[i] for i in held_out_ids]
    training = [rows[i] for i in training_ids]
    texts = [fitted.examples[i].completion for i in training_ids]
    completions = [fitted.tokenized[i].completion for i in training_ids]
    initial_versions = _initial_versions(resolver, spec, keys)
    initial = _initial_prefixes(
        frozen,
        initial_versions,
        settings,
        spec,
        keys,
        training,
        texts,
        completions,
        lambda key: num_slots if (own := num_slots_of and num_slots_of(key)) is None else own,
    )
    if settings.off_context:
        training += off_context_rows(frozen, training, settings.off_context, settings.seed)
    scale = typical_scale(frozen, [token for ids in completions for token in ids])
    return Preparation(
        training,
        held_out,
        initial,
        scale,
        left_out,
        fitted.num_cut + fitted_validation.num_cut,
        fitted.num_skipped + fitted_validation.num_skipped,
        frozenset(e.user for e in (*examples, *validation) if e.user is not None),
        removal_number,
        initial_versions,
    )


def divide_parts(
    request: Request, keys: Collection[PrefixKey], stored: Mapping[PrefixKey, StoredVersion]
) -> tuple[list[Part], list[tuple[PrefixKey, float]]]:
    """A request's parts that are not trained, as far as they are stored, and the trained ones."""
    others = [part for part in request.named_parts if part.key not in keys and part.strength]
    frozen_parts = [
        part_at_strength(part.key, stored[part.key], part.strength).part
        for part in others
        if part.key in stored
    ]
    return frozen_parts, [(p.key, p.strength) for p in request.named_parts if p.key in keys]


def _initial_versions(
    resolver: Resolver, spec: InitSpec, keys: Sequence[PrefixKey]
) -> dict[PrefixKey, StoredVersion]:
    """The stored versions that prefixes start from, also where they are given as prefixes."""
    prefixes = {key: value for key, value in spec.values.items() if isinstance(value, Prefix)}
    stored = resolver.current(set(keys) if spec.default.startswith("stored") else set(prefixes))
    return {
        key: version
        for key, version in stored.items()
        if key not in prefixes
        or (isinstance(version.value, Prefix) and version.value.digest == prefixes[key].digest)
    }


def _initial_prefixes(
    frozen: FrozenModel,
    initial_versions: Mapping[PrefixKey, StoredVersion],
    settings: TrainingSettings,
    spec: InitSpec,
    keys: Sequence[PrefixKey],
    rows: Sequence[TrainingRow],
    texts: Sequence[str],
    completions: Sequence[Sequence[int]],
    num_slots_of: Callable[[PrefixKey], int | Mapping[Learnable, int]],
) -> dict[PrefixKey, Prefix]:
    """What each prefix starts from, given the training rows and their completions."""
    context_length = frozen.request_tokenizer.context_length
    initial: dict[PrefixKey, Prefix] = {}
    for index, key in enumerate(keys):
        row_ids = [i for i, row in enumerate(rows) if any(own == key for own, _ in row.learned)]
        random.Random(settings.seed).shuffle(row_ids)
        stored_prefix = initial_versions[key].value if key in initial_versions else None
        initial[key] = initial_prefix(
            frozen,
            key,
            _num_slots_for(key.kind, num_slots_of(key), context_length),
            spec,
            stored=stored_prefix if isinstance(stored_prefix, Prefix) else None,
            text="\n".join(texts[i] for i in row_ids),
            rows=[rows[i] for i in row_ids],
            completions=completions,
            form=settings.form,
            seed=settings.seed,
            index=index,
        )
    return initial


def check_trainable(examples: Sequence[Request], source: str = "") -> None:
    """Check that rows use no field that means something else in training.

    Args:
        examples: The rows.
        source: Where they are from, for the error.

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
        elif row.when != "always":
            problem = f"when={row.when!r}, which applies to prefixes that are trained"
        elif row.schedules:
            problem = "schedules, which change strengths while text is generated"
        elif any(part.strength < 0 for part in row.named_parts):
            problem = "a strength below 0, which steers away from a prefix and trains none"
        if problem:
            raise TrainingDataError(f"{source}{row.place(i)} has {problem}; leave it out")


def kinds_to_learn(
    examples: Sequence[Request], learn: Learnable | Sequence[Learnable] | None
) -> set[Kind]:
    """The kinds of parts to train, after a check that each example has one of them.

    Raises:
        TrainingDataError: If `learn` names something else, or an example has none of them.
    """
    if not examples:
        raise TrainingDataError("there are no examples to train on")
    if learn is None:
        by_default: tuple[Learnable, ...] = ("task", "attributes")
        learn = [name for name in by_default if any(getattr(row, name) for row in examples)]
        if not learn:
            raise TrainingDataError("no example has a task or attributes to learn; give it one")
    learn = [learn] if isinstance(learn, str) else list(learn)
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
    without = [
        row.place(i)
        for i, row in enumerate(examples, 1)
        if not any(part.key.kind in kinds and part.strength > 0 for part in row.named_parts)
    ]
    if without:
        raise TrainingDataError(
            f"{shortened(without)}: nothing of what is to be learned ({', '.join(learn)}); leave "
            "such rows out or give them one"
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
        (name,) = (name for name, own in _KINDS.items() if own == kind)
        raise TrainingDataError(f"num_slots has no entry for {name!r}; add one")
    return check_num_slots(by_kind[kind], context_length)


def check_num_slots(count: object, context_length: int | None) -> int:
    """A number of slots for prefixes that start from as many tokens.

    Raises:
        TrainingDataError: If it is no whole number, below 1, or above the model's context.
    """
    if not isinstance(count, int):
        raise TrainingDataError(f"num_slots is {count!r}; it must be a whole number")
    if count < 1 or (context_length is not None and count > context_length):
        limit = (
            "1 or more"
            if context_length is None
            else f"between 1 and {context_length}, the context of this model"
        )
        raise TrainingDataError(f"num_slots is {count}; it must be {limit}")
    return count
