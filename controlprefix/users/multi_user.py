"""Many users in one run: each learns as it would alone, and one frozen pass serves them all.

A row attends to its own user's slots only, so the gradient of a sum of losses is each user's
own gradient. Every user has its own rows in its own order, its own optimizer, schedule, looks
and end; whoever is done is published and makes room for the next.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from transformers import PreTrainedModel

from controlprefix.errors import (
    ControlPrefixError,
    PrefixFormatError,
    StoreError,
    TrainingDataError,
)
from controlprefix.model.steering import Steering
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.prefix import Prefix
from controlprefix.request import is_whole_text
from controlprefix.store import PrefixKey
from controlprefix.store.records import check_key
from controlprefix.training import checkpoint as state
from controlprefix.training.objectives import Objective, Pair, TrainingRow
from controlprefix.training.parameterization import LearnedSlots
from controlprefix.training.run import Run, TrainingReport
from controlprefix.training.settings import TrainingSettings

_ROW_TOKENS = 256  # a longer text is cut into rows of so many
_MAX_TEXTS = 1000  # of one user; more are drawn from
_MAX_LETTERS = 100_000  # of one text
_ROWS_AT_A_TIME = 64
_FINISHED = "finished.jsonl"

Publish = Callable[[str, Prefix, TrainingReport], int]
Begin = Callable[[PrefixKey, list[str]], LearnedSlots]


@dataclass(frozen=True, slots=True)
class UsersReport:
    """What happened to each user.

    Attributes:
        users: Learned in this run; each with its own losses, looks and version.
        failed: Why, for those that could not be learned. Nothing was stored for them.
        skipped: Learned before in the same folder, from the same texts and settings.
        seconds: Wall-clock time of all.
    """

    users: dict[str, TrainingReport] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(slots=True)
class _Learner:
    user: str
    run: Run
    began: float


def train_users(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    texts: Iterable[tuple[str, Sequence[str]]],
    publish: Publish,
    settings: TrainingSettings,
    *,
    begin: Begin,
    together: int,
    folder: Path | None,
    resume: bool,
    progress: bool,
) -> UsersReport:
    """Learn a prefix for each user from texts they wrote.

    Args:
        model: Frozen.
        encoder: Of that model.
        texts: Users with their texts; read as far as there is room.
        publish: Called at once for each user that is done; gives the version.
        settings: Of each user's run. `batch_size` is a user's rows a step.
        begin: Given a user and their texts, what is to be learned as it starts.
        together: Users at a time; memory grows with it, not with the number of users.
        folder: Where it is noted who is done.
        resume: Leave out who is noted there, with the same texts and settings.
        progress: Show a progress bar.

    Raises:
        StoreError: If a prefix cannot be stored, or the folder not be written.
    """
    if together < 1:
        raise TrainingDataError(f"together is {together}; it must be 1 or more")
    state.require_folder(folder, resume)
    wave = _Wave(model, encoder.pad_id, settings)
    began = time.monotonic()
    finished = _read_finished(folder) if folder is not None and resume else set()
    report, skipped = UsersReport(), []
    waiting = iter(texts)
    active: list[_Learner] = []

    def admit() -> bool:
        """Begin with the next user; False when nobody waits."""
        for user, written in waiting:
            try:
                run = _begun(model, encoder, user, written, settings, begin)
            except ControlPrefixError as error:
                report.failed[user] = str(error)
                return True
            if run.identity in finished:
                skipped.append(user)
                return True
            active.append(_Learner(user, run, time.monotonic()))
            return True
        return False

    with _bar(progress, texts) as advance:
        while True:
            while len(active) < together and admit():
                pass
            if not active:
                break
            failed = wave.round([one.run for one in active])
            for learner in list(active):
                reason = failed.get(id(learner.run))
                if reason is None and not learner.run.is_over:
                    continue
                active.remove(learner)
                try:
                    if reason is None:
                        report.users[learner.user] = _published(learner, publish)
                        if folder is not None:
                            _note_finished(folder, learner)
                except PrefixFormatError as error:  # numbers too large for the model's dtype
                    reason = str(error)
                if reason is not None:
                    report.failed[learner.user] = reason
                advance(len(report.users), len(report.failed))
    return replace(report, skipped=tuple(skipped), seconds=time.monotonic() - began)


class _Wave:
    """Takes a step of each of several runs, in passes over the rows of all."""

    def __init__(self, model: PreTrainedModel, pad_id: int, settings: TrainingSettings) -> None:
        self._model = model
        self._steering = Steering.of(model)
        self._objective = Objective(model, pad_id=pad_id, contrast=settings.contrast)
        self._most = settings.micro_batch or _ROWS_AT_A_TIME

    def round(self, runs: Sequence[Run]) -> dict[int, str]:
        """A step of each run, and the looks that are due; says which failed, and why."""
        failed: dict[int, str] = {}
        self._look(runs, failed)
        going = [run for run in runs if id(run) not in failed]
        begun = [(run, *run.begin()) for run in going]
        losses = self._nats(
            [(run, pair) for run, pairs, _ in begun for pair in pairs],
            {id(run): seed for run, _, seed in begun},
        )
        for run, pairs, _ in begun:
            try:
                run.require_finite(losses[id(run)])
            except TrainingDataError as error:
                failed[id(run)] = str(error)
                continue
            torch.nn.utils.clip_grad_norm_(run.slots.parameters(), run.settings.max_grad_norm)
            run.optimizer.step()
            run.finish(pairs, losses[id(run)])
        self._look([run for run in going if id(run) not in failed], failed)
        return failed

    def _look(self, runs: Sequence[Run], failed: dict[int, str]) -> None:
        """At the held-out rows of those whose look is due."""
        due = [run for run in runs if run.wants_a_look]
        if not due:
            return
        with torch.no_grad():
            found = self._nats([(run, Pair(row)) for run in due for row in run.held_out], {})
        for run in due:
            try:
                run.require_finite(found[id(run)])
                run.looked(found[id(run)])
            except TrainingDataError as error:
                failed[id(run)] = str(error)

    def _nats(self, rows: Sequence[tuple[Run, Pair]], seeds: dict[int, int]) -> dict[int, float]:
        """Each run's nats a target token; gradients are left in its parameters."""
        targets: dict[int, int] = {}
        for run, pair in rows:
            targets[id(run)] = targets.get(id(run), 0) + len(pair.row.targets)
        totals = dict.fromkeys(targets, 0.0)
        by_length = sorted(rows, key=lambda one: one[1].row.num_tokens)
        for at in range(0, len(by_length), self._most):
            some = by_length[at : at + self._most]
            pairs = [pair for _, pair in some]
            prefixes: dict[PrefixKey, Prefix] = {}
            for run in {id(run): run for run, _ in some}.values():
                prefixes.update(run.slots.prefixes(run.slots.keys, seeds.get(id(run))))
            batch = self._objective.assembled(pairs, prefixes)
            with self._steering.attached(batch, everywhere=True):
                nats = self._objective(pairs)
                weights = torch.tensor([1 / run.targets_a_step for run, _ in some])
                each = nats * weights.to(nats.device)
                # A loss that is no number ends its own user's run, not the others'.
                sound = each[each.detach().isfinite()]
                if sound.requires_grad and len(sound):
                    sound.sum().backward()
            for (run, _), value in zip(some, nats.tolist(), strict=True):
                totals[id(run)] += value / targets[id(run)]
        return totals


def _begun(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    user: str,
    texts: Sequence[str],
    settings: TrainingSettings,
    begin: Begin,
) -> Run:
    """A user's run, at its beginning.

    Raises:
        UnknownNameError: If that cannot be a user's name.
        TrainingDataError: If there is no text to learn from.
    """
    key = PrefixKey("user", user)
    written, rows = rows_of(encoder, user, texts, settings.seed)
    return Run(rows, begin(key, written), settings, model.device)


def rows_of(
    encoder: RequestEncoder, user: str, texts: Sequence[str], seed: int
) -> tuple[list[str], list[TrainingRow]]:
    """A user's texts, as far as they are used, and the rows they are learned as.

    Raises:
        UnknownNameError: If that cannot be a user's name.
        TrainingDataError: If there is no text to learn from.
    """
    key = PrefixKey("user", user)
    check_key(key)
    written = usable_texts(user, texts)
    if len(written) > _MAX_TEXTS:
        written = random.Random(seed).sample(written, _MAX_TEXTS)
    written = [text[:_MAX_LETTERS] for text in written]
    end_id = next(iter(encoder.end_ids), None)
    rows = [
        TrainingRow.of(piece, end_id if is_last else None, (), ((key, 1.0),))
        for text in written
        for piece, is_last in encoder.pieces(text, _ROW_TOKENS)
    ]
    return written, rows


def usable_texts(user: str, texts: Sequence[str]) -> list[str]:
    """The texts that are not empty.

    Raises:
        TrainingDataError: If there is none, or one is no text.
    """
    given = [texts] if isinstance(texts, str) else list(texts or ())
    for text in given:
        if not isinstance(text, str):
            raise TrainingDataError(f"a text of user {user!r} is a {type(text).__name__}, no text")
        if not is_whole_text(text):
            raise TrainingDataError(f"a text of user {user!r} holds half a surrogate pair")
    written = [text for text in given if text.strip()]
    if not written:
        raise TrainingDataError(f"user {user!r} has no text to learn from")
    return written


def _published(learner: _Learner, publish: Publish) -> TrainingReport:
    run = learner.run
    run.done.seconds = time.monotonic() - learner.began
    report = run.report()
    run.end()
    ((key, prefix),) = run.slots.materialized().items()
    number = publish(learner.user, prefix, report)
    return replace(report, saved={str(key): number})


def _read_finished(folder: Path) -> set[str]:
    path = folder / _FINISHED
    if not path.exists():
        return set()
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by a kill
            found.add(json.loads(line)["identity"])
    return found


def _note_finished(folder: Path, learner: _Learner) -> None:
    line = json.dumps({"user": learner.user, "identity": learner.run.identity})
    try:
        with (folder / _FINISHED).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise StoreError(f"cannot write to the run's folder {folder}: {error}") from error


@contextlib.contextmanager
def _bar(shown: bool, texts: object) -> Iterator[Callable[[int, int], None]]:
    total = len(texts) if hasattr(texts, "__len__") else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with ProgressBar(*columns, disable=not shown) as bar:
        task = bar.add_task("users", total=total, failed="")

        def advance(done: int, failed: int) -> None:
            note = f"{failed} failed" if failed else ""
            bar.update(task, completed=done + failed, failed=note)

        yield advance
