"""Preparation of reinforcement learning: requests and demonstrations -> rows and prefixes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlprefix.example import Example
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.request import Request
from controlprefix.store import StoredVersion
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.preparation import (
    Learnable,
    check_trainable,
    divide_parts,
    kinds_to_learn,
)


@dataclass(frozen=True, slots=True)
class RequestPreparation:
    """What reinforcement learning needs.

    Attributes:
        rows: One per request, without targets.
        demonstrations: Rows with targets.
        initial: The prefixes to train, as they are stored.
        users: Users whose rows they are.
        removal_number: Number of the last entry of the store's audit log when the rows were read.
        initial_versions: The versions that they are stored as.
    """

    rows: list[TrainingRow]
    demonstrations: list[TrainingRow]
    initial: dict[PrefixKey, Prefix]
    users: frozenset[str]
    removal_number: int
    initial_versions: Mapping[PrefixKey, StoredVersion]


def prepare_requests(
    requests: Sequence[Request],
    demonstrations: Sequence[Example],
    frozen: FrozenModel,
    resolver: Resolver,
    *,
    learn: Learnable | Sequence[Learnable] | None,
) -> RequestPreparation:
    """Divide the parts that requests name into trained and frozen; all must be stored.

    Args:
        requests: At least one, with default labels.
        demonstrations: Examples, with default labels.
        frozen: The model.
        resolver: Finds all parts.
        learn: Which kinds of parts to train; None for the task and attributes that there are.

    Raises:
        TrainingDataError: If the requests cannot be trained on.
        UnknownNameError: If a part is not stored.
        ContextLengthError: If a prompt or a demonstration does not fit the context.
    """
    removal_number = resolver.last_removal_number()
    kinds = kinds_to_learn(requests, learn)
    check_trainable(demonstrations)
    for i, request in enumerate(requests, 1):
        request.require_sampling(i)
    tokenizer = frozen.request_tokenizer
    all_rows = [*requests, *demonstrations]
    named = [part.key for row in all_rows for part in row.named_parts]
    keys = [key for key in dict.fromkeys(named) if key.kind in kinds]
    resolver.resolve(requests)  # names whatever is not stored
    resolver.resolve(demonstrations)
    stored = resolver.current(set(named))
    rows = [
        TrainingRow(prompt, (), *divide_parts(request, keys, stored), request=request)
        for request, prompt in map(tokenizer.fitted, requests)
    ]
    tokenized = tokenizer.ids_of_examples(demonstrations)
    demonstrations = [tokenizer.fitted(example)[0] for example in demonstrations]
    demonstrated = [
        TrainingRow.from_example(
            ids, tokenizer.end_id, *divide_parts(example, keys, stored)
        )._replace(request=example)
        for example, ids in zip(demonstrations, tokenized, strict=True)
    ]
    initial: dict[PrefixKey, Prefix] = {}
    for key in keys:
        value = stored[key].value
        assert isinstance(value, Prefix)
        initial[key] = value
    users = frozenset(row.user for row in all_rows if row.user is not None)
    initial_versions = {key: stored[key] for key in keys}
    return RequestPreparation(rows, demonstrated, initial, users, removal_number, initial_versions)
