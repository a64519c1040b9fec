"""One run: what it learns, in which order, and how far it is. Losses are computed elsewhere."""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from controlprefix.errors import TrainingDataError
from controlprefix.training import checkpoint as state
from controlprefix.training import curves
from controlprefix.training.objectives import Pair, TrainingRow, pair_up
from controlprefix.training.parameterization import LearnedSlots
from controlprefix.training.settings import TrainingSettings

_log = logging.getLogger("controlprefix")
_BUCKET = 8  # batches are cut from runs of this many batches sorted by length


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What happened.

    Attributes:
        losses: Of each step's batch, nats a token (the end token counted).
        validation: `(step, loss on held-out rows)`; step 0 is the start.
        best_step: Whose prefixes were kept.
        num_rows, num_tokens: Seen while training, repeats counted.
        seconds: Wall-clock time.
        num_parameters: That were learned.
        saved: Version numbers in the store, such as `{"user 'ana'": 2}`.
        left_out: What examples name that was neither learned nor stored.
    """

    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int
    num_rows: int
    num_tokens: int
    seconds: float
    num_parameters: int
    saved: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def best_loss(self) -> float:
        """On held-out rows where there are any, else the last batch's."""
        return min((loss for _, loss in self.validation), default=self.losses[-1])

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, and `curves.png` where matplotlib is installed.

        Raises:
            StoreError: If the folder cannot be written.
        """
        curves.write(Path(folder), self)


class Run:
    """One run: what it learns, in which order, and how far it is.

    A step is `begin`, losses of those pairs whose gradients are left in `slots`, `finish`.

    Attributes:
        held_out: Rows to choose the best step by.
        steps: In all.
        targets_a_step: Target tokens of a batch, in the mean.
        slots: What is learned, as it stands.
        optimizer: AdamW over it.
        done: How far it is.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        slots: LearnedSlots,
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self.settings = settings
        order = random.Random(settings.seed)
        learned_from, held_out = split(len(rows), settings, order)
        training, self.held_out = [rows[i] for i in learned_from], [rows[i] for i in held_out]
        self._identity = state.identity_of(settings, rows, slots)
        per_epoch = math.ceil(len(training) / settings.batch_size)
        self.steps = settings.steps or math.ceil(settings.epochs * per_epoch)
        self._looks = {
            round(self.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)
        }
        # Batches are of similar length: a mean over each would count tokens of short texts more.
        self.targets_a_step = settings.batch_size * mean(len(row.targets) for row in training)
        self._batches = _endless(training, settings.batch_size, order)
        self.slots = slots.to_device(device)
        self.optimizer = torch.optim.AdamW(
            self.slots.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
        )
        self.done = state.Progress()
        self._best = self._copy()

    def take_up(self, folder: Path) -> None:
        """Go on from the state in a folder, where there is one."""
        found = state.load(folder, self._identity, self.slots, self.optimizer)
        if found is None:
            _log.warning("there is no state of a run in %s yet: it begins anew", folder)
            return
        self.done, self._best = found
        for _ in range(self.done.step):
            next(self._batches)

    def save(self, folder: Path) -> None:
        """Write the state."""
        state.save(folder, self._identity, self.done, self.slots, self.optimizer, self._best)

    @property
    def identity(self) -> str:
        """Of the settings, the rows and the start."""
        return state.in_one_line(self._identity)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or the last looks found nothing better."""
        patience, looks = self.settings.patience, [loss for _, loss in self.done.validation]
        if self.done.step >= self.steps:
            return True
        if patience is None or len(looks) <= patience:
            return False
        return min(looks[-patience:]) >= min(looks[:-patience])

    @property
    def wants_a_look(self) -> bool:
        """Whether the held-out rows are to be looked at now."""
        looked = {step for step, _ in self.done.validation}
        at_an_end = self.done.step == 0 or self.done.step >= self.steps
        due = at_an_end or self.done.step in self._looks
        return bool(self.held_out) and due and self.done.step not in looked

    def begin(self) -> tuple[list[Pair], int]:
        """The rows of the next step, and a seed of what is drawn in it."""
        settings = self.settings
        self.done.step += 1
        # What is drawn depends on the seed and the step alone, so a run can be taken up anywhere.
        draw = random.Random(f"{settings.seed}:{self.done.step}")
        rows = next(self._batches)
        pairs = [Pair(row) for row in rows]
        if settings.contrast:
            pairs = pair_up(rows, self.slots.keys, draw)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * share_of_rate(self.done.step, self.steps)
        self.optimizer.zero_grad()
        return pairs, draw.randrange(1 << 62)

    def require_finite(self, loss: float) -> None:
        """Refuse a loss that is no number.

        Raises:
            TrainingDataError: If it is none.
        """
        if not math.isfinite(loss):
            raise TrainingDataError(
                f"the loss is {loss} at step {self.done.step}; nothing was stored; lower "
                f"learning_rate (now {self.settings.rate})"
            )

    def finish(self, pairs: Sequence[Pair], loss: float) -> None:
        """Note a step whose gradients have been used."""
        self.done.losses.append(loss)
        self.done.num_rows += len(pairs)
        self.done.num_tokens += sum(pair.row.num_tokens for pair in pairs)
        if not self.held_out:  # the last is as good as known
            self.done.best_step = self.done.step

    def looked(self, loss: float) -> None:
        """Note the loss of the held-out rows; keep the parameters if they are the best so far."""
        self.done.validation.append((self.done.step, loss))
        if self.done.step and loss <= min(loss for _, loss in self.done.validation):
            self._best, self.done.best_step = self._copy(), self.done.step

    def end(self) -> None:
        """Go back to the best step; without held-out rows, stay at the last."""
        if self.held_out:
            self.slots.load_state_dict(self._best)

    def report(self) -> TrainingReport:
        """What happened so far."""
        done = self.done
        return TrainingReport(
            losses=tuple(done.losses),
            validation=tuple(done.validation),
            best_step=done.best_step,
            num_rows=done.num_rows,
            num_tokens=done.num_tokens,
            seconds=done.seconds,
            num_parameters=sum(p.numel() for p in self.slots.parameters()),
        )

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.slots.state_dict().items()}


def in_batches(rows: Sequence[TrainingRow], size: int) -> Iterator[list[TrainingRow]]:
    """Rows in batches of similar length, shortest first."""
    by_length = sorted(rows, key=lambda row: row.num_tokens)
    yield from (by_length[at : at + size] for at in range(0, len(by_length), size))


def split(
    count: int, settings: TrainingSettings, order: random.Random
) -> tuple[list[int], list[int]]:
    """Which of so many rows are learned from, and which are held out.

    Args:
        count: Of rows.
        settings: `validation` is the share held out.
        order: New, from the settings' seed.

    Raises:
        TrainingDataError: If none is left to learn from.
    """
    shuffled = order.sample(range(count), count)
    num_held_out = round(settings.validation * count)
    if num_held_out == count:
        raise TrainingDataError(
            f"validation {settings.validation} of {count} examples leaves none to learn from; "
            "lower it, or give more examples"
        )
    return shuffled[num_held_out:], shuffled[:num_held_out]


def _batches(
    rows: Sequence[TrainingRow], size: int, order: random.Random
) -> Iterator[list[TrainingRow]]:
    """One pass in batches of similar length, shuffled."""
    shuffled = order.sample(list(rows), len(rows))
    run = size * _BUCKET
    batches = []
    for at in range(0, len(shuffled), run):
        bucket = sorted(shuffled[at : at + run], key=lambda row: row.num_tokens)
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    order.shuffle(batches)
    yield from batches


def _endless(
    rows: Sequence[TrainingRow], size: int, order: random.Random
) -> Iterator[list[TrainingRow]]:
    while True:
        yield from _batches(rows, size, order)


def share_of_rate(step: int, steps: int) -> float:
    """Of the highest learning rate: a linear warm-up, then a cosine down to a tenth."""
    warm_up = max(1, round(0.1 * steps))
    if step <= warm_up:
        return step / warm_up
    done = (step - 1 - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
