"""From examples to training rows: what is learned, where it starts, what stays as it is."""

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from controlprefix.errors import TrainingDataError
from controlprefix.inference.resolver import Resolver, named_parts
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.geometry import Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.request import Example
from controlprefix.store import Kind, PrefixKey, PrefixStore
from controlprefix.training.initialization import start_of_text, typical_scale
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.run import split
from controlprefix.training.settings import TrainingSettings

Learned = Literal["task", "attributes", "user"]
Start = Literal["text", "tokens", "random", "stored"]
# What a prefix starts from: a text's keys and values, or another prefix.
Given = Mapping[tuple[Kind, str], str | Prefix]

_STARTS = get_args(Start)
_LOOKING_ROWS = 8  # of a prefix, at most: they choose what it starts from

_KINDS: dict[str, Kind] = {"task": "task", "attributes": "attribute", "user": "user"}
_log = logging.getLogger("controlprefix")


@dataclass(frozen=True, slots=True)
class Preparation:
    """What the loop needs.

    Attributes:
        rows: One for each example.
        start: The prefixes to learn, as they begin.
        scale: For each site, the size of the model's keys and values, head by head.
        left_out: What examples name that is neither learned nor stored.
    """

    rows: list[TrainingRow]
    start: dict[PrefixKey, Prefix]
    scale: dict[Site, Tensor]
    left_out: tuple[str, ...]


def prepare(
    examples: Sequence[Example],
    model: PreTrainedModel,
    encoder: RequestEncoder,
    store: PrefixStore,
    resolver: Resolver,
    *,
    learn: Learned | Sequence[Learned],
    num_slots: int | Mapping[Learned, int],
    init: Start | Given,
    settings: TrainingSettings,
    slots_of: Callable[[PrefixKey], int | None] | None = None,
) -> Preparation:
    """Divide what examples name into learned and frozen, and begin the learned.

    What is begun from examples is begun from those that are learned from, not from held-out
    ones. `slots_of` says how many slots one prefix has, where that is not `num_slots`.

    Raises:
        TrainingDataError: If the examples cannot be learned from.
    """
    if not examples:
        raise TrainingDataError("there are no examples to learn from")
    kinds = _require_learnable(examples, [learn] if isinstance(learn, str) else list(learn))
    default: Start = "text" if isinstance(init, Mapping) else init
    if default not in _STARTS:
        raise TrainingDataError(f"init is {init!r}; it must be one of: {', '.join(_STARTS)}")
    named = [named_parts(example) for example in examples]
    encoded = [encoder.encode(example) for example in examples]

    end_id = next(iter(encoder.end_ids), None)
    geometry = Steering.of(model).geometry
    fingerprint = geometry.fingerprint
    others = {part.key for row in named for part in row if part.key.kind not in kinds}
    stored = resolver.fetch(others)
    left_out = tuple(sorted(str(key) for key in others - stored.keys()))
    if left_out:
        _log.warning("nothing is stored yet for %s: trained without", ", ".join(left_out))
    frozen = [
        [stored[one.key].part(one.strength).part for one in row if one.key in stored]
        for row in named
    ]
    rows = [
        TrainingRow.of(
            one, end_id, parts, [(p.key, p.strength) for p in row if p.key.kind in kinds]
        )
        for one, parts, row in zip(encoded, frozen, named, strict=True)
    ]

    seed = settings.seed
    learned_from = set(split(len(rows), settings, random.Random(seed))[0])
    seen = [encoded[i].completion for i in range(len(rows)) if i in learned_from]
    keys = list(dict.fromkeys(p.key for row in named for p in row if p.key.kind in kinds))
    given = _require_learned(init, keys) if isinstance(init, Mapping) else {}
    known = store.fetch(keys, fingerprint) if default == "stored" else {}
    start: dict[PrefixKey, Prefix] = {}
    for index, key in enumerate(keys):
        own_slots = slots_of(key) if slots_of else None
        wanted = num_slots if own_slots is None else own_slots
        count = _slots_for(key.kind, wanted, encoder.context)
        own = given.get(key)
        if isinstance(own, Prefix):
            geometry.require(own.geometry, f"the start of {key}")
            start[key] = own
        elif own is None and key in known and (found := known[key].prefix) is not None:
            start[key] = found
        elif own is None and default == "random":
            start[key] = Prefix.random(geometry, num_slots=count, seed=seed + index)
        elif own is None and default == "tokens":
            choice = sorted({token for one in seen for token in one})
            ids = random.Random(f"{seed}:{index}").choices(choice, k=count)
            start[key] = prefix_from_tokens(model, ids)
        else:
            mine = [i for i, row in enumerate(named) if any(part.key == key for part in row)]
            mine = [i for i in mine if i in learned_from] or mine
            random.Random(seed).shuffle(mine)
            text = own or "\n".join(examples[i].completion for i in mine)
            # The last ones: a row attends to a copy of itself above all. One alone has no other.
            looking = mine[-_LOOKING_ROWS:] if own or len(mine) > 1 else []
            start[key] = start_of_text(model, encoder, text, [rows[i] for i in looking], count)
    tokens = [token for one in seen for token in one]
    return Preparation(rows, start, typical_scale(model, tokens), left_out)


def require_examples(examples: object) -> list[Example]:
    """The examples as a list.

    Raises:
        TrainingDataError: Naming the row that is none.
    """
    if isinstance(examples, (str, Example)) or not isinstance(examples, Iterable):
        raise TrainingDataError(f"{type(examples).__name__} is no list of Example rows")
    rows = list(examples)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Example):
            raise TrainingDataError(f"row {i} is a {type(row).__name__}; give Example rows")
    return rows


def require_as_trained(examples: Sequence[Example]) -> None:
    """Refuse what means something else in a request than in training.

    Raises:
        TrainingDataError: Naming the row.
    """
    for i, row in enumerate(examples, 1):
        why = ""
        if row.mixing != "attention":
            why = f"mixing={row.mixing!r}, which counts in the logits of what was learned"
        elif row.calibrated:
            why = "calibrated=True, which counts on dials of what was learned"
        elif row.unseen != "refuse":
            why = f"unseen={row.unseen!r}, which finds a stand-in for what was not learned"
        elif any(part.strength < 0 for part in named_parts(row)):
            why = "a strength below 0, which leads away from a prefix and teaches none"
        if why:
            raise TrainingDataError(f"row {i} has {why}; leave it out")


def _require_learnable(examples: Sequence[Example], learn: Sequence[Learned]) -> set[Kind]:
    for what in learn:
        if what not in _KINDS:
            raise TrainingDataError(f"cannot learn {what!r}; learn any of: {', '.join(_KINDS)}")
    if not learn:
        raise TrainingDataError(f"learn is empty; learn any of: {', '.join(_KINDS)}")
    for what in learn:
        if not any(getattr(row, what) for row in examples):
            raise TrainingDataError(
                f"learn names {what!r} but no example has one; leave it out of learn"
            )
    kinds = {_KINDS[what] for what in learn}
    require_as_trained(examples)
    for i, row in enumerate(examples, 1):
        if not any(part.key.kind in kinds and part.strength > 0 for part in named_parts(row)):
            raise TrainingDataError(
                f"row {i} has none of what is to be learned ({', '.join(learn)}); leave it out or "
                "give it one"
            )
    return kinds


def _require_learned(init: Given, keys: Sequence[PrefixKey]) -> dict[PrefixKey, str | Prefix]:
    """The starts that are given, by key."""
    given = {}
    for name, start in init.items():
        key = PrefixKey(*name) if isinstance(name, tuple) and len(name) == 2 else None
        if key not in keys:
            learned = ", ".join(str(tuple(known)) for known in keys)
            raise TrainingDataError(
                f"init names {name!r}, which is not learned; learned: {learned}"
            )
        if not isinstance(start, Prefix) and not (isinstance(start, str) and start.strip()):
            raise TrainingDataError(f"init of {key} is {start!r}; give a text or a Prefix")
        given[key] = start
    return given


def _slots_for(kind: Kind, num_slots: int | Mapping[Learned, int], context: int | None) -> int:
    by_kind = (
        {_KINDS.get(learned): count for learned, count in num_slots.items()}
        if isinstance(num_slots, Mapping)
        else dict.fromkeys(_KINDS.values(), num_slots)
    )
    if kind not in by_kind:
        raise TrainingDataError(
            f"num_slots says nothing of {kind!r}; give it a number of slots too"
        )
    count = by_kind[kind]
    if not isinstance(count, int):
        raise TrainingDataError(f"num_slots is {count!r}; it must be a whole number")
    if count < 1 or (context is not None and count > context):
        most = "more" if context is None else f"up to {context}, the context of this model"
        raise TrainingDataError(f"num_slots is {count}; it must be 1 or {most}")
    return count
