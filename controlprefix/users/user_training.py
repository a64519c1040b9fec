"""Train many users in shared forward passes; each user's result equals training alone.

Each user has rows, an optimizer, a schedule, validation and an end of their own. A user that
is finished is published at once and makes room for the next, so memory depends on the number
of concurrent users, not on their total.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from controlprefix._io import progress_bar
from controlprefix.cancellation import delayed_interrupt
from controlprefix.errors import (
    ControlPrefixError,
    ForgottenError,
    PrefixFormatError,
    StoreError,
    TrainingDataError,
    TrainingInterrupted,
)
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixKey, UserCode
from controlprefix.request import is_valid_unicode
from controlprefix.store.records import check_key
from controlprefix.training.control import RunControl
from controlprefix.training.held_out import normalized, split_at_first
from controlprefix.training.loop import TrainingLoop
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.report import TrainingReport
from controlprefix.training.run import TrainingRun
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.enrolment import duplicate_user_message

_MAX_ROW_TOKENS = 256  # length of the rows that longer texts are cut into
MAX_TEXTS = 1000  # per user; of more, a random sample is used

# A user's texts, or what reads them when it is their turn.
UserTexts = Sequence[str] | Callable[[], Sequence[str]]
_MAX_TEXT_CHARACTERS = 100_000
_FINISHED_FILE = "finished.jsonl"

Publish = Callable[[str, Prefix | UserCode, TrainingReport], int]
Initialize = Callable[[PrefixKey, list[str]], TrainablePrefixes]


@dataclass(frozen=True, slots=True)
class UsersReport:
    """The result of training many users.

    Attributes:
        users: Per user trained in this run, their report with losses and version.
        failed: Why, per user that could not be trained. Nothing was stored for them.
        skipped: Users finished earlier in the same folder, with the same texts and settings.
        seconds: Wall-clock time in total.
    """

    users: dict[str, TrainingReport] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(slots=True)
class _ActiveUser:
    name: str
    run: TrainingRun
    started: float


def train_users(
    frozen: FrozenModel,
    texts: Iterable[tuple[str, UserTexts]],
    publish: Publish,
    settings: TrainingSettings,
    *,
    initialize: Initialize,
    concurrent_users: int,
    control: RunControl,
    destination: str = "",
    is_stored: Callable[[PrefixKey, int], bool] = lambda *_: False,
) -> UsersReport:
    """Train a prefix or a code for each user on texts they wrote.

    Args:
        frozen: The model.
        texts: Users with their texts; consumed as there is room.
        publish: Called for each user that is finished; returns the version.
        settings: Hyperparameters of each user's run; `batch_size` is a user's rows per step.
        initialize: Given a user's key and texts, what to train.
        concurrent_users: Users at a time; memory grows with it.
        control: In its folder, finished users are recorded; to resume skips users recorded there
            with the same texts, settings and destination.
        destination: Where finished users are stored.
        is_stored: Whether a version of a key, or a later one, is still there.

    Raises:
        TrainingDataError: If `concurrent_users` is below 1.
        StoreError: If a prefix cannot be stored, or the folder cannot be written.
        TrainingInterrupted: After Ctrl-C.
    """
    if concurrent_users < 1:
        raise TrainingDataError(f"concurrent_users is {concurrent_users}; it must be 1 or more")
    folder = control.folder
    loop = TrainingLoop(frozen, settings)
    started = time.monotonic()
    finished = _read_finished(folder, destination) if folder and control.resume else {}
    report, skipped = UsersReport(), []
    waiting = iter(texts)
    active: list[_ActiveUser] = []
    admitted: set[PrefixKey] = set()

    def admit_next() -> bool:
        """Start the next user; False if nobody waits."""
        for user, user_texts in waiting:
            try:
                key = PrefixKey("user", user)
                if key in admitted:
                    raise TrainingDataError(duplicate_user_message(user))
                own_texts = user_texts() if callable(user_texts) else user_texts
                _, rows = user_rows(frozen, user, own_texts, settings.seed)
                training, held_out = split_user_rows(rows, settings)
                start = initialize(key, trained_texts(frozen, training, held_out))
                run = TrainingRun(
                    [row.row for row in training],
                    [row.row for row in held_out],
                    start,
                    settings,
                    frozen.device,
                )
            except ControlPrefixError as error:
                report.failed[user] = str(error)
                return True
            admitted.add(key)
            version = finished.get(_identity(run, settings))
            if version is not None and is_stored(key, version):
                skipped.append(user)
            else:
                active.append(_ActiveUser(user, run, time.monotonic()))
            return True
        return False

    total = len(texts) if isinstance(texts, Sized) else None
    with (
        progress_bar("users", total, visible=control.progress) as update,
        delayed_interrupt() as is_interrupted,
    ):
        while True:
            while len(active) < concurrent_users and admit_next():
                pass
            if not active:
                break
            failures = loop.step([user.run for user in active])
            for user in list(active):
                reason = failures.get(user.run)
                if reason is None and not user.run.is_finished:
                    continue
                active.remove(user)
                try:
                    if reason is None:
                        report.users[user.name] = own = _publish(user, publish)
                        if folder is not None:
                            identity = _identity(user.run, settings)
                            _record_finished(folder, user.name, identity, destination, own)
                except (PrefixFormatError, ForgottenError) as error:
                    # Values too large for the model's dtype, or nobody to store them for.
                    reason = str(error)
                if reason is not None:
                    report.failed[user.name] = reason
                note = f"{len(report.failed)} failed" if report.failed else ""
                update(len(report.users) + len(report.failed) + len(skipped), note)
            if is_interrupted() and (active or next(waiting, None) is not None):
                raise TrainingInterrupted(_stopped(len(report.users), total, folder))
    return replace(report, skipped=tuple(skipped), seconds=time.monotonic() - started)


class UserRow(NamedTuple):
    """A training row of a user's text, which may be cut into several.

    Attributes:
        row: The row.
        text: The text it is from.
        source: Whose text, and which of theirs: the same text may come twice.
    """

    row: TrainingRow
    text: str
    source: tuple[str, int]


def user_rows(
    frozen: FrozenModel, user: str, texts: Sequence[str], seed: int
) -> tuple[list[str], list[UserRow]]:
    """A user's texts as far as they are used, and the training rows made of them.

    Args:
        frozen: The model.
        user: Name of the user.
        texts: What they wrote.
        seed: Seed of the sample, if there are too many.

    Raises:
        UnknownNameError: If the name is not valid.
        TrainingDataError: If there is no text to train on.
    """
    key = PrefixKey("user", user)
    check_key(key)
    usable = usable_texts(user, texts)
    usable = sampled_texts(usable, seed)
    usable = [text[:_MAX_TEXT_CHARACTERS] for text in usable]
    tokenizer = frozen.request_tokenizer
    rows = [
        UserRow(
            TrainingRow.from_example(chunk, tokenizer.end_id, (), ((key, 1.0),)),
            text,
            (key.name, number),
        )
        for number, text in enumerate(usable)
        for chunk in tokenizer.chunks(text, _MAX_ROW_TOKENS)
    ]
    return usable, rows


def sampled_texts(texts: list[str], seed: int) -> list[str]:
    """The texts of a user that training takes: all, or a sample of a thousand."""
    return random.Random(seed).sample(texts, MAX_TEXTS) if len(texts) > MAX_TEXTS else texts


def split_user_rows(
    rows: Sequence[UserRow], settings: TrainingSettings
) -> tuple[list[UserRow], list[UserRow]]:
    """Rows to train on and held-out rows: whole texts, or parts of one if there is only one.

    Each user keeps rows to train on. A text of several users is held out for all or none, where
    that leaves rows to hold out.
    """
    learned = [[key for key, _ in row.row.learned] for row in rows]
    texts = [normalized(row.text) for row in rows]
    by_text = [[text] for text in texts]
    by_own_text = [[(*keys, text)] for text, keys in zip(texts, learned, strict=True)]
    by_row = [[i] for i in range(len(rows))]
    training, held_out = split_at_first(
        [(by_text, ""), (by_own_text, ""), (by_row, "")],
        settings.validation,
        settings.seed,
        learned,
    )
    return [rows[i] for i in training], [rows[i] for i in held_out]


def trained_texts(
    frozen: FrozenModel, training: Sequence[UserRow], held_out: Sequence[UserRow]
) -> list[str]:
    """The texts that are trained on; of a text that is held out in part, the other parts."""
    if {row.source for row in held_out}.isdisjoint(row.source for row in training):
        return list({row.source: row.text for row in training}.values())
    return [frozen.request_tokenizer.decode(row.row.targets) for row in training]


def usable_texts(user: str, texts: Sequence[str]) -> list[str]:
    """The texts that are not empty.

    Raises:
        TrainingDataError: If there is none, or one is not a text.
    """
    if texts is not None and not isinstance(texts, Iterable):
        raise TrainingDataError(
            f"the texts of user {user!r} must be a list, got {type(texts).__name__}"
        )
    texts = [texts] if isinstance(texts, str) else [] if texts is None else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TrainingDataError(
                f"a text of user {user!r} must be a str, got {type(text).__name__}"
            )
        if not is_valid_unicode(text):
            raise TrainingDataError(f"a text of user {user!r} contains half a surrogate pair")
    usable = [text for text in texts if text.strip()]
    if not usable:
        owner = f" of user {user!r}" if user else ""
        raise TrainingDataError(f"there is no text{owner}; give at least one that is not empty")
    return usable


def _stopped(num_stored: int, total: int | None, folder: Path | None) -> str:
    users = f"{num_stored} users" if total is None else f"{num_stored} of {total} users"
    message = f"stopped: {users} are stored"
    if folder is None:
        return message
    return f"{message} and recorded in {folder}; resume=True (--resume) continues with the others"


def _publish(user: _ActiveUser, publish: Publish) -> TrainingReport:
    run = user.run
    run.progress.seconds = time.monotonic() - user.started
    report = run.report()
    run.restore_best()
    ((key, value),) = run.prefixes.stored_values().items()
    version = publish(user.name, value, report)
    return replace(report, saved={str(key): version})


def _identity(run: TrainingRun, settings: TrainingSettings) -> str:
    """Texts and settings of a user's run, and how long it may be."""
    return f"{run.identity} {settings.steps} {settings.epochs} {settings.patience}"


def _read_finished(folder: Path, destination: str) -> dict[str, int]:
    """The versions that finished runs were stored as there, by the runs' identities."""
    path = folder / _FINISHED_FILE
    if not path.exists():
        return {}
    versions = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by a kill
            record = json.loads(line)
            if record["destination"] == destination:
                versions[record["identity"]] = record["version"]
    return versions


def _record_finished(
    folder: Path, user: str, identity: str, destination: str, report: TrainingReport
) -> None:
    (version,) = report.saved.values()
    record = {"identity": identity, "destination": destination, "version": version}
    line = json.dumps({"user": user, **record})
    try:
        with (folder / _FINISHED_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise StoreError(f"cannot write to the run's folder {folder}: {error}") from error
