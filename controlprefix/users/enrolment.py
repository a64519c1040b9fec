"""Enrolment: a usable prefix or code from a user's texts, without a training run."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from controlprefix._io import progress_bar
from controlprefix.embeddings import DEFAULT_EMBEDDER, embed
from controlprefix.errors import (
    ControlPrefixError,
    ForgottenError,
    MissingDependencyError,
    RequestError,
    StoreError,
    TrainingDataError,
)
from controlprefix.model import FrozenModel
from controlprefix.model.condensed_text import prefix_from_pieces
from controlprefix.prefixes import Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import Profile, VersionInfo
from controlprefix.users.text_features import TextFeatures
from controlprefix.users.user_vectors import has_vectors


@dataclass(frozen=True, slots=True)
class EnrolmentReport:
    """The result of enrolling many users.

    Attributes:
        users: The new version of each user.
        failed: Why, per user that could not be enrolled. Nothing was stored for them.
        skipped: Users that were stored before by a process that died.
        seconds: Wall-clock time in total.
    """

    users: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


DEFAULT_NUM_SLOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentOptions:
    """How a user is enrolled: see `ControlPrefix.enroll`.

    Raises:
        RequestError: If a value is invalid, or options do not go together.
    """

    decoder: str | None = None
    refine: bool = False
    num_slots: int | None = None
    keep_texts: bool = False
    keep_profile: bool = False
    add: bool = False
    guard: bool = False

    def __post_init__(self) -> None:
        if self.num_slots is not None and self.num_slots < 1:
            raise RequestError(f"num_slots is {self.num_slots}; it must be 1 or more")
        if self.num_slots is not None and self.decoder is not None:
            raise RequestError("num_slots is for a prefix without a decoder; leave one of them out")
        if self.add and (self.decoder is None or self.refine or self.keep_profile):
            raise RequestError(
                "add requires decoder, and cannot be combined with refine or keep_profile"
            )
        if self.guard and (self.decoder is None or self.refine or self.add):
            raise RequestError("guard requires decoder, and cannot be combined with refine or add")


def enroll_each(
    texts: Iterable[tuple[str, Sequence[str]]],
    enroll: Callable[[str, Sequence[str]], int],
    *,
    progress: bool,
) -> EnrolmentReport:
    """Enroll users one after another; failures are reported, and do not affect other users.

    Args:
        texts: Users with their texts; consumed one by one.
        enroll: Stores a user's prefix, and returns its version.
        progress: Show a bar.

    Raises:
        MissingDependencyError: If an extra is not installed.
        StoreError: If a prefix cannot be stored.
    """
    report, started = EnrolmentReport(), time.monotonic()
    earlier: set[PrefixKey] = set()
    with progress_bar("users", None, visible=progress) as update:
        for user, own in texts:
            try:
                key = PrefixKey("user", user)
                if key in earlier:
                    raise TrainingDataError(duplicate_user_message(user))
                report.users[user] = enroll(user, own)
                earlier.add(key)
            except ForgottenError as error:
                report.failed[user] = str(error)
            except (StoreError, MissingDependencyError):
                raise
            except ControlPrefixError as error:
                report.failed[user] = str(error)
            note = f"{len(report.failed)} failed" if report.failed else ""
            update(len(report.users) + len(report.failed), note)
    seconds = time.monotonic() - started
    return EnrolmentReport(report.users, report.failed, seconds=seconds)


def duplicate_user_message(user: str) -> str:
    """Why a user's second texts are not used."""
    return (
        f"user {user!r} comes twice, and only the first texts are used; give all texts of a user "
        "together"
    )


def prefix_from_texts(frozen: FrozenModel, texts: Sequence[str], num_slots: int) -> Prefix:
    """A prefix of all of a user's texts, matched if they have more tokens than slots.

    Args:
        frozen: The model.
        texts: At least one that is not empty.
        num_slots: Slots at most.
    """
    tokenizer = frozen.request_tokenizer
    pieces = [tokenizer.text_ids(texts[0])]
    pieces += [tokenizer.inner_ids(f"\n\n{text}") for text in texts[1:]]
    return prefix_from_pieces(frozen, pieces, num_slots)


def predict_code(decoder: PrefixDecoder, texts: Sequence[str]) -> UserCode:
    """The code that a decoder predicts for a user from their texts.

    Args:
        decoder: A stored decoder.
        texts: At least one that is not empty.

    Raises:
        RequestError: If it was trained with vectors.
        MissingDependencyError: If sentence-transformers is not installed.
    """
    if has_vectors(decoder):
        raise RequestError(
            "the decoder was trained with vectors of users, not with their texts; enroll them with "
            "`ControlPrefix.enroll(vector=)`"
        )
    if not decoder.predictor.uses_features:
        return decoder.mean_code
    return decoder.predict_code(TextFeatures.by_name(decoder.feature_set).compute(texts))


def added_code(
    decoder: PrefixDecoder, user: str, code: object, info: VersionInfo, texts: Sequence[str]
) -> tuple[UserCode, int]:
    """The code of a user's earlier texts, which are not needed, and of new ones.

    Args:
        decoder: The decoder of the code.
        user: Name of the user.
        code: The user's current prefix or code.
        info: Its version.
        texts: The new texts.

    Returns:
        The code, and the number of all texts.

    Raises:
        RequestError: If the user has no code that was predicted by this decoder.
    """
    num_texts = info.details.get("enrolled", {}).get("texts")
    if not isinstance(code, UserCode) or code.decoder_hash != decoder.content_hash or not num_texts:
        raise RequestError(
            "texts can only be added to a code that the same decoder predicted, and version "
            f"{info.version} of user {user!r} is not one; enroll the user from all texts"
        )
    new = predict_code(decoder, texts)
    return decoder.merged_code(code, num_texts, new, len(texts)), num_texts + len(texts)


def profile_of(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> Profile:
    """The mean sentence embedding of texts.

    Raises:
        MissingDependencyError: If sentence-transformers is not installed.
    """
    return Profile(embedder, embed(texts, embedder).mean(0).tolist(), len(texts))
