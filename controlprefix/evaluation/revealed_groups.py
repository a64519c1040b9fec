"""What texts written under users' prefixes reveal of the groups that the users belong to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from controlprefix._io import requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.evaluation.harness import resolvable
from controlprefix.evaluation.metrics import Estimate
from controlprefix.example import Example
from controlprefix.request import Request

_TEMPERATURE = 0.8
_MAX_NEW_TOKENS = 48
_MAX_FOLDS = 5
_REQUESTS_AT_ONCE = 64
_NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class RevealedGroups:
    """Balanced accuracy of a classifier that guesses users' groups from texts.

    Attributes:
        written: From texts that were written under the users' prefixes.
        without: From texts to the same requests without users: what prompts and labels tell.
        own: From the rows that these requests are of, which the users wrote.
        chance: Accuracy of a guess: one divided by the number of groups.
        num_users: Users whose groups were guessed.
    """

    written: Estimate
    without: Estimate
    own: Estimate
    chance: float
    num_users: int


def revealed_groups(
    cp: ControlPrefix,
    rows_of_users: Mapping[str, Sequence[Example]],
    groups: Mapping[str, Mapping[str, str]],
    *,
    num_texts: int,
    min_group_size: int,
    seed: int,
) -> dict[str, RevealedGroups]:
    """Let users' prefixes write, and a classifier guess the users' groups.

    The classifier (logistic regression over characters) guesses each user's group from all of
    the user's texts, and is trained on other users' (cross-validation over users).

    Args:
        cp: With the users' prefixes.
        rows_of_users: Held-out rows of each user; their prompts, tasks and labels are requested.
        groups: Users' groups by grouping.
        num_texts: Texts to write per user, at most one per row.
        min_group_size: Groups with fewer users are left out.
        seed: Seed of the texts, and of the folds.

    Returns:
        The result of each grouping with two groups that are large enough.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        ContextLengthError: If a prompt leaves no room for a text.
    """
    with requires_extra("eval", "what texts reveal"):
        import sklearn  # noqa: F401
    large = {
        grouping: of_users
        for grouping, group_of in groups.items()
        if (of_users := _in_large_groups(rows_of_users, group_of, min_group_size))
    }
    users = sorted({user for of_users in large.values() for user in of_users})
    rows = {user: rows_of_users[user][:num_texts] for user in users}
    requests = [_request(cp, row, seed + i) for own in rows.values() for i, row in enumerate(own)]
    without_user = (
        request.model_copy(update={"user": None, "strengths": _without_user(request)})
        for request in requests
    )
    plain = resolvable(cp, without_user)
    texts = []
    for batch in (requests, plain):
        completions = (
            completion
            for first in range(0, len(batch), _REQUESTS_AT_ONCE)  # with their users' prefixes
            for completion in cp.generate(batch[first : first + _REQUESTS_AT_ONCE])
        )
        texts.append({user: [next(completions).text for _ in own] for user, own in rows.items()})
    texts.append({user: [row.completion for row in own] for user, own in rows.items()})
    results = {}
    for grouping, group_of in large.items():
        labels = [group_of[user] for user in group_of]
        written, without, own = (
            _balanced_accuracy(["\n".join(by_user[user]) for user in group_of], labels, seed)
            for by_user in texts
        )
        chance = 1 / len(set(labels))
        results[grouping] = RevealedGroups(written, without, own, chance, len(labels))
    return results


def _in_large_groups(
    rows_of_users: Mapping[str, Sequence[Example]], group_of: Mapping[str, str], min_size: int
) -> dict[str, str]:
    """The groups of users in groups that are large enough; none if that leaves one group."""
    grouped = {user: group_of[user] for user in sorted(rows_of_users) if user in group_of}
    sizes = Counter(grouped.values())
    large = {user: g for user, g in grouped.items() if sizes[g] >= max(2, min_size)}
    return large if len(set(large.values())) > 1 else {}


def _without_user(request: Request) -> dict[str, float]:
    return {name: value for name, value in request.strengths.items() if name != "user"}


def _request(cp: ControlPrefix, row: Example, seed: int) -> Request:
    """The request whose completion a row is, with sampling."""
    fields = {name: getattr(row, name) for name in Request.model_fields}
    fields |= {"num_beams": 1, "temperature": _TEMPERATURE, "seed": seed}
    if row.messages is None and row.prompt_ids is None and not row.prompt:
        start = cp.tokenizer.bos_token or cp.tokenizer.eos_token or " "
        fields |= {"prompt": str(start), "raw": True}
    return Request(**fields).with_default_limit(_MAX_NEW_TOKENS)


def _balanced_accuracy(texts: Sequence[str], labels: Sequence[str], seed: int) -> Estimate:
    """How often the label of a text is guessed, each label counting alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000, class_weight="balanced"),
    )
    num_folds = min(_MAX_FOLDS, *Counter(labels).values())
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    filled = [text if text.strip() else "-" for text in texts]
    guesses = cross_val_predict(classifier, filled, list(labels), cv=folds)
    hits = guesses == np.array(labels)
    by_label = [hits[np.array(labels) == label] for label in sorted(set(labels))]
    rng = np.random.default_rng(seed)
    # Users are resampled within their groups, whose sizes are not random.
    means = np.mean(
        [rng.choice(own, (_NUM_RESAMPLES, len(own))).mean(axis=1) for own in by_label], axis=0
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(np.mean([own.mean() for own in by_label])), float(low), float(high))
