"""For whom user prefixes work: the distribution of their gain over users and groups of users."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from controlprefix._io import requires_extra
from controlprefix.data import Columns, Rows, as_examples
from controlprefix.data.tables import is_missing
from controlprefix.engine import ControlPrefix
from controlprefix.engine.arguments import checks_arguments
from controlprefix.errors import TrainingDataError
from controlprefix.evaluation.harness import about_prefixes, describe_rows, resolvable
from controlprefix.evaluation.metrics import Estimate, bootstrap_mean, wilson_proportion
from controlprefix.evaluation.revealed_groups import revealed_groups
from controlprefix.evaluation.users_report import UserResult, UsersEvaluation
from controlprefix.example import Example
from controlprefix.labels import label_text
from controlprefix.model.log_probs import kl_divergences, target_logits
from controlprefix.prefixes.key import composed
from controlprefix.request import Request
from controlprefix.training.held_out import prompt_identity

IMPERSONAL_PROMPTS = (
    "What is the capital of France?",
    "How does a bicycle stay upright?",
    "List three uses of salt.",
    "What is 12 times 12?",
)
MIN_GROUP_SIZE = 8
PlainAnswers = Sequence[tuple[Sequence[int], Sequence[int]]]

_USERS_AT_ONCE = 64  # whose prefixes are on the device together
_NUM_OTHERS = 2  # users whose prefixes a row is scored with for comparison
_MAX_NEW_TOKENS = 24
_WORST_SHARE = 0.1
_NOBODY = Estimate(math.nan, 0.0, 1.0)  # a share of nobody


@dataclass(frozen=True, slots=True)
class UserRows:
    """What is measured of one user.

    Attributes:
        rows: Held-out rows of the user.
        others: Users whose prefixes the rows are scored with for comparison.
    """

    rows: Sequence[Example]
    others: Sequence[str]


@checks_arguments
def evaluate_users(
    cp: ControlPrefix,
    rows: Rows,
    *,
    columns: Columns | None = None,
    groups: Mapping[str, Mapping[str, str]] | None = None,
    min_group_size: int = MIN_GROUP_SIZE,
    prompts: Sequence[str] = IMPERSONAL_PROMPTS,
    num_texts: int = 0,
    seed: int = 0,
) -> UsersEvaluation:
    """Measure what each user's prefix does for rows of that user, and how it is distributed.

    Most of what a user prefix gains over none is what all users have in common, so the gain is
    over the prefixes of other users. Intervals are 95 %, by bootstrap over a user's rows, and
    over users.

    Args:
        cp: With the prefixes of the rows' users.
        rows: Held-out rows with users, in any form (see `controlprefix.data.as_examples`).
        columns: Which columns of the rows hold what, if they have other names.
        groups: Users' groups by grouping, such as `{"gender": {"ana": "female", "bo": "male"}}`.
        min_group_size: Groups with fewer users are not reported, only named.
        prompts: Impersonal prompts, on which a user's prefix should change little.
        num_texts: Texts to write under each user's prefix, by which a classifier guesses the
            users' groups: what a prefix reveals to somebody who reads its texts. 0: none; needs
            `groups`.
        seed: Seed of the choice of other users, and of those texts.

    Raises:
        TrainingDataError: If there are rows of fewer than two users, `groups` is not a mapping
            of groupings to groups of users, or `num_texts` is below 0, or given without groups.
        UnknownNameError: If a user has no prefix.
    """
    if num_texts < 0:
        raise TrainingDataError(f"num_texts is {num_texts}; it must be 0 or more")
    if num_texts and not groups:
        raise TrainingDataError("num_texts shows what texts reveal of groups; give groups")
    if num_texts:  # before everything is scored
        with requires_extra("eval", "what texts reveal"):
            import sklearn  # noqa: F401
    groups = checked_groups(groups or {}, min_group_size)
    users = rows_by_user(rows, columns=columns, seed=seed)
    results: dict[str, UserResult] = {}
    names: set[str] = set()
    about: dict[str, Any] = {}
    answers = plain_answers(cp, prompts)
    for first in range(0, len(users), _USERS_AT_ONCE):
        chunk = dict(islice(users.items(), first, first + _USERS_AT_ONCE))
        results |= results_of_users(cp, chunk, answers)
        about = about_prefixes(cp, [row for own in chunk.values() for row in own.rows])
        names.update(about["prefixes"])
    about["data"] = describe_rows([row for own in users.values() for row in own.rows])
    about["prefixes"] = sorted(names)
    result = summarize(results, groups, min_group_size, about)
    if not num_texts:
        return result
    revealed = revealed_groups(
        cp,
        {user: own.rows for user, own in users.items()},
        groups,
        num_texts=num_texts,
        min_group_size=min_group_size,
        seed=seed,
    )
    return replace(result, revealed=revealed)


def rows_by_user(rows: Rows, *, columns: Columns | None, seed: int) -> dict[str, UserRows]:
    """What is measured of each user, in the order of their names.

    Args:
        rows, columns, seed: As in `evaluate_users`.

    Raises:
        TrainingDataError: If there are rows of fewer than two users.
    """
    own: dict[str, list[Example]] = {}
    for row in as_examples(rows, columns=columns):
        if row.user is not None:
            own.setdefault(composed(row.user), []).append(row)
    if len(own) < 2:
        raise TrainingDataError(
            f"there are rows of {len(own)} users; a user is compared with others: give rows "
            "of two or more"
        )
    rng, names = random.Random(seed), sorted(own)
    num_others = min(_NUM_OTHERS, len(names) - 1)
    return {
        user: UserRows(own[user], rng.sample([name for name in names if name != user], num_others))
        for user in names
    }


def results_of_users(
    cp: ControlPrefix, users: Mapping[str, UserRows], answers: PlainAnswers
) -> dict[str, UserResult]:
    """The result of each user, from passes over the rows of all.

    Args:
        cp: With the prefixes of these users and of those whom they are compared with.
        users: Their rows.
        answers: What the model answers without prefixes, from `plain_answers`.

    Raises:
        UnknownNameError: If a user has no prefix.
    """
    examples = [row for own in users.values() for row in own.rows]
    others = [own.others for own in users.values() for _ in own.rows]
    num_others = len(others[0])
    own = _nats(cp, examples)
    none = _nats(cp, resolvable(cp, (_of_user(row, None) for row in examples)))
    pairs = list(zip(examples, others, strict=True))
    other = [
        _nats(cp, resolvable(cp, (_of_user(row, names[k]) for row, names in pairs)))
        for k in range(num_others)
    ]
    results, first = {}, 0
    for user, of_user in users.items():
        ids = range(first, first := first + len(of_user.rows))
        gains = [sum(nats[i] for nats in other) / num_others - own[i] for i in ids]
        # The same row twice says no more than once.
        texts = [(prompt_identity(examples[i]), examples[i].completion) for i in ids]
        results[user] = UserResult(
            len(ids),
            bootstrap_mean(gains, texts),
            bootstrap_mean([none[i] - own[i] for i in ids], texts),
            _off_context(cp, user, answers),
        )
    return results


def summarize(
    users: Mapping[str, UserResult],
    groups: Mapping[str, Mapping[str, str]],
    min_group_size: int,
    about: dict[str, Any],
) -> UsersEvaluation:
    """The distribution over users.

    Args:
        users: The result of each.
        groups, min_group_size: From `checked_groups`.
        about: What the results were made with.
    """
    users = dict(sorted(users.items()))
    means = sorted(result.gain.mean for result in users.values())
    worst = means[: max(1, round(_WORST_SHARE * len(means)))]
    measured = [result for result in users.values() if result.gain.has_interval]
    by_group, too_small = _by_group(users, groups, min_group_size)
    return UsersEvaluation(
        users,
        bootstrap_mean(means),
        sum(worst) / len(worst),
        wilson_proportion([r.is_harmed for r in measured]) if measured else _NOBODY,
        len(users) - len(measured),
        by_group,
        too_small,
        about,
    )


def checked_groups(
    groups: Mapping[str, Mapping[str, Any]], min_group_size: int
) -> dict[str, dict[str, str]]:
    """Each user's group of each grouping, as text; users without one are left out.

    Raises:
        TrainingDataError: If it is no mapping of groupings to users' groups, or the least size of
            a group is below 1.
    """
    if min_group_size < 1:
        raise TrainingDataError(f"min_group_size is {min_group_size}; it must be 1 or more")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise TrainingDataError(
            'groups maps each grouping to its users, such as {"gender": {"ana": "female"}}'
        )
    return {
        str(grouping): {
            composed(str(label_text(user))): label_text(g)
            for user, g in of_users.items()
            if not is_missing(g)
        }
        for grouping, of_users in groups.items()
    }


def _nats(cp: ControlPrefix, examples: Sequence[Example]) -> list[float]:
    """Nats per token of each example's completion."""
    scores = cp.score(examples)
    return [-score.log_likelihood / max(1, score.num_tokens) for score in scores]


def _of_user(row: Example, user: str | None) -> Example:
    strengths = {name: v for name, v in row.strengths.items() if user is not None or name != "user"}
    return row.model_copy(update={"user": user, "strengths": strengths})


def _by_group(
    users: Mapping[str, UserResult], groups: Mapping[str, Mapping[str, str]], min_size: int
) -> tuple[dict[str, dict[str, Estimate]], tuple[str, ...]]:
    """The mean gain of each group that is large enough, and the names of those that are not."""
    by_group: dict[str, dict[str, Estimate]] = {}
    too_small = []
    for grouping, group_of in groups.items():
        by_group[grouping] = {}
        for group in sorted(set(group_of.values())):
            gains = [users[u].gain.mean for u in users if group_of.get(u) == group]
            if len(gains) < min_size:
                too_small.append(f"{grouping}={group}")
                continue
            by_group[grouping][group] = bootstrap_mean(gains)
    return by_group, tuple(too_small)


def plain_answers(cp: ControlPrefix, prompts: Sequence[str]) -> PlainAnswers:
    """Prompt and answer of the model without prefixes, as token ids."""
    tokenizer = cp.frozen_model.request_tokenizer
    requests = [
        Request(prompt=prompt, raw=not tokenizer.has_chat_template, max_new_tokens=_MAX_NEW_TOKENS)
        for prompt in prompts
    ]
    answers = []
    plain = cp.without_defaults()
    for request, completion in zip(requests, plain.generate(requests), strict=True):
        ids = tokenizer.inner_ids(completion.text) if completion.text.strip() else ()
        if ids:
            answers.append((tokenizer.prompt_ids(request), ids))
    return answers


def _off_context(cp: ControlPrefix, user: str, answers: PlainAnswers) -> float:
    """KL(plain || with a user's prefix), nats per token."""
    if not answers:
        return 0.0
    frozen = cp.frozen_model
    resolved = cp.without_defaults().resolve(Request(prompt="-", raw=True, user=user))
    prompts, targets = [prompt for prompt, _ in answers], [ids for _, ids in answers]
    logits = []
    for parts in ([], [part.part for part in resolved.parts]):
        with torch.no_grad(), frozen.attached(frozen.assemble([parts] * len(answers))):
            logits.append(target_logits(frozen, prompts, targets)[0])
    plain, steered = logits
    return float(kl_divergences(steered, plain).mean())
