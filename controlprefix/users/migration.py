"""Migration: users' codes of one decoder -> codes of another, such as that of a newer model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from controlprefix.errors import (
    PrefixFormatError,
    TrainingDataError,
    UnknownNameError,
    VersionConflictError,
)
from controlprefix.prefixes import PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import ModelStore, NewVersion

MIN_SHARED_USERS = 8
_PENALTIES = tuple(10.0**exponent for exponent in range(-4, 5))  # relative to the mean variance


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """The result of a migration.

    Attributes:
        num_shared: Users with a code on both models, from whom the map was learned.
        r2: R² of new codes predicted from old ones, each shared user left out; 0 at least.
        saved: Version numbers of the migrated users.
        skipped: Why other users were not migrated, by name.
    """

    num_shared: int
    r2: float
    saved: Mapping[str, int]
    skipped: Mapping[str, str]


def migrate(
    source: ModelStore,
    own: ModelStore,
    put: Callable[[Sequence[NewVersion]], Mapping[PrefixKey, int]],
    decoder: PrefixDecoder,
) -> MigrationReport:
    """Give users of another model codes of this one: see `ControlPrefix.migrate_users`.

    Args:
        source: The other model's stored prefixes.
        own: This model's.
        put: Stores new versions, and returns the numbers of those it stored.
        decoder: This model's decoder.

    Raises:
        TrainingDataError: If fewer than eight users have a code on both.
        StoreError: If the store cannot be written; nothing is stored then.
    """
    existing = set(own.names("user"))
    codes: dict[str, UserCode] = {}
    skipped: dict[str, str] = {}
    for user in source.names("user"):
        try:
            code = source.get(PrefixKey("user", user)).value
        except UnknownNameError:  # forgotten meanwhile
            continue
        except PrefixFormatError as error:  # one damaged code must not stop the migration of others
            if user not in existing:
                skipped[user] = str(error)
            continue
        if isinstance(code, UserCode):
            codes[user] = code
        elif user not in existing:
            skipped[user] = "it has all slots there, not a code"
    hashes = Counter(code.decoder_hash for code in codes.values())
    main_hash = hashes.most_common(1)[0][0] if hashes else ""
    old_codes, new_codes = [], []
    for user, code in list(codes.items()):
        if code.decoder_hash != main_hash:
            del codes[user]
            if user not in existing:
                skipped[user] = "its code is of another decoder than most"
        elif user in existing:
            key = PrefixKey("user", user)
            try:
                info = own.version_info(key)
                value = own.get(key, version=info.version).value
            except (PrefixFormatError, UnknownNameError):  # it teaches nothing
                continue
            is_own = isinstance(value, UserCode) and value.decoder_hash == decoder.content_hash
            if isinstance(value, UserCode) and is_own and "migrated" not in info.details:
                old_codes.append(code.values.flatten())
                new_codes.append(value.values.flatten())
    code_map = fit_code_map(
        torch.stack(old_codes) if old_codes else torch.zeros(0, 1),
        torch.stack(new_codes) if new_codes else torch.zeros(0, 1),
    )
    details = {"migrated": {"shared_users": len(old_codes), "r2": round(code_map.r2, 4)}}
    size = decoder.mean_code.values.shape
    versions = [
        NewVersion(
            PrefixKey("user", user),
            UserCode(decoder.content_hash, code_map(code.values).float().reshape(size)),
            details,
            replaces=0,  # do not replace users enrolled meanwhile
        )
        for user, code in codes.items()
        if user not in existing
    ]
    numbers = _put_new(versions, own, put) if versions else {}
    saved = {key.name: number for key, number in numbers.items()}
    return MigrationReport(len(old_codes), max(0.0, code_map.r2), saved, skipped)


def _put_new(
    versions: Sequence[NewVersion],
    own: ModelStore,
    put: Callable[[Sequence[NewVersion]], Mapping[PrefixKey, int]],
) -> Mapping[PrefixKey, int]:
    """Store users who have nothing yet, without those who are enrolled meanwhile."""
    while True:
        try:
            return put(versions)
        except VersionConflictError:
            existing = set(own.names("user"))
            remaining = [new for new in versions if new.key.name not in existing]
            if not remaining or len(remaining) == len(versions):
                raise
            versions = remaining


@dataclass(frozen=True)
class CodeMap:
    """An affine map from old codes to new ones.

    Attributes:
        old_mean, new_mean: Mean codes of the shared users, flattened.
        weights: `(old_size, new_size)`.
        r2: See `MigrationReport`.
    """

    old_mean: Tensor
    new_mean: Tensor
    weights: Tensor
    r2: float

    def __call__(self, code: Tensor) -> Tensor:
        """The new code of an old one, flattened."""
        change: Tensor = (code.flatten().double() - self.old_mean) @ self.weights
        return self.new_mean + change


def fit_code_map(old: Tensor, new: Tensor) -> CodeMap:
    """Ridge regression of new codes on old ones.

    The penalty is the one with the smallest error where each user is left out. Where old codes
    tell nothing of the new ones, every user gets the mean code.

    Args:
        old: `(num_users, old_size)`.
        new: `(num_users, new_size)`, of the same users.

    Raises:
        TrainingDataError: If there are fewer than eight users.

    Reference:
        Migration of soft prompts between models, learned from selected users: "Don't Start
        Over", 2026, https://arxiv.org/abs/2601.12034, there with a network and task losses.
    """
    count = len(old)
    if count < MIN_SHARED_USERS:
        raise TrainingDataError(
            f"{count} users have a code on both models, and a migration is learned from "
            f"{MIN_SHARED_USERS} or more; enroll or train some users on the new model first"
        )
    old, new = old.double(), new.double()
    old_mean, new_mean = old.mean(0), new.mean(0)
    inputs, targets = old - old_mean, new - new_mean
    # There are fewer users than values of a code, so the problem is solved between users.
    gram = inputs @ inputs.T
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    rotated = vectors.T @ targets
    scale = values.mean().clamp(min=1e-30)
    # The mean is fitted too: leaving a user out changes it.
    best_error, best_penalty = float(_left_out(torch.zeros_like(gram), targets)), float("inf")
    for penalty in _PENALTIES:
        hat = vectors * (values / (values + penalty * scale)) @ vectors.T
        error = float(_left_out(hat, targets))
        if error < best_error:
            best_error, best_penalty = error, penalty
    baseline = float(_left_out(torch.zeros_like(gram), targets))
    weights = inputs.new_zeros(inputs.shape[1], targets.shape[1])
    if best_penalty < float("inf"):
        weights = inputs.T @ (vectors @ (rotated / (values + best_penalty * scale)[:, None]))
    r2 = 1 - best_error / baseline if baseline else 0.0
    return CodeMap(old_mean, new_mean, weights, r2)


def _left_out(hat: Tensor, targets: Tensor) -> Tensor:
    """The squared error of linear predictions of each user from the others, in closed form.

    Args:
        hat: The matrix that turns targets into fitted values, without the mean.
        targets: Centred.
    """
    hat = hat + 1 / len(hat)
    residuals = targets - hat @ targets
    return (residuals / (1 - hat.diagonal()).clamp(min=1e-6)[:, None]).square().sum()
