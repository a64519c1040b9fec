"""What texts written under users' prefixes reveal of the groups that the users belong to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlprefix._io import requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.evaluation.metrics import Estimate, bootstrap_mean
from controlprefix.example import Example
from controlprefix.request import Request

_TEMPERATURE = 0.8
_MAX_NEW_TOKENS = 48
_MAX_FOLDS = 5


@dataclass(frozen=True, slots=True)
class RevealedGroups:
    """Balanced accuracy of a classifier that guesses users' groups from texts.

    Attributes:
        written: From texts that were written under the users' prefixes.
        own: From as many of the users' own held-out rows.
        chance: Accuracy of a guess: one divided by the number of groups.
        num_users: Users whose groups were told.
    """

    written: Estimate
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
        num_texts: Texts to write per user.
        min_group_size: Groups with fewer users are left out.
        seed: Seed of the texts, and of the folds.

    Returns:
        The result of each grouping with two groups that are large enough.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    chosen = {
        user: [rows[i % len(rows)] for i in range(num_texts)]
        for user, rows in rows_of_users.items()
        if any(user in of_users for of_users in groups.values())
    }
    requests = [
        _request(cp, row, seed + i) for rows in chosen.values() for i, row in enumerate(rows)
    ]
    texts = iter([completion.text for completion in cp.generate(requests)])
    written = {user: [next(texts) for _ in rows] for user, rows in chosen.items()}
    own = {user: [row.completion for row in rows_of_users[user][:num_texts]] for user in chosen}
    results = {}
    for grouping, group_of in groups.items():
        sizes = Counter(group for user, group in group_of.items() if user in chosen)
        large = {group for group, size in sizes.items() if size >= max(2, min_group_size)}
        users = sorted(user for user in chosen if group_of.get(user) in large)
        if len(large) < 2:
            continue
        labels = [group_of[user] for user in users]
        results[grouping] = RevealedGroups(
            _balanced_accuracy(["\n".join(written[user]) for user in users], labels, seed),
            _balanced_accuracy(["\n".join(own[user]) for user in users], labels, seed),
            1 / len(large),
            len(users),
        )
    return results


def _request(cp: ControlPrefix, row: Example, seed: int) -> Request:
    """The request whose completion a row is, with sampling."""
    fields = {name: getattr(row, name) for name in Request.model_fields}
    fields |= {"max_new_tokens": _MAX_NEW_TOKENS, "temperature": _TEMPERATURE, "seed": seed}
    if row.messages is None and row.prompt_ids is None and not row.prompt:
        start = cp.tokenizer.bos_token or cp.tokenizer.eos_token or " "
        fields |= {"prompt": str(start), "raw": True}
    return Request(**fields)


def _balanced_accuracy(texts: Sequence[str], labels: Sequence[str], seed: int) -> Estimate:
    """How often the label of a text is told, each label counting alike."""
    with requires_extra("eval", "what texts reveal"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline

    sizes = Counter(labels)
    classifier = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000, class_weight="balanced"),
    )
    num_folds = min(_MAX_FOLDS, *sizes.values())
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    filled = [text if text.strip() else "-" for text in texts]
    guesses = cross_val_predict(classifier, filled, list(labels), cv=folds)
    weights = {label: len(labels) / (len(sizes) * size) for label, size in sizes.items()}
    return bootstrap_mean(
        [weights[label] * (label == guess) for label, guess in zip(labels, guesses, strict=True)]
    )
