"""TrainingRun: the state of one run, without how losses are computed."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from controlprefix.errors import TrainingDataError
from controlprefix.training import checkpoint, curves
from controlprefix.training.objectives import ContrastPair, TrainingRow, add_contrast
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.settings import TrainingSettings

_log = logging.getLogger("controlprefix")

_BATCHES_PER_BUCKET = 8  # batches are cut from so many batches of rows sorted by length
_WARM_UP_FRACTION = 0.1
_MIN_LEARNING_RATE = 0.1  # at the end, relative to the peak


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The result of a training run.

    Attributes:
        losses: Loss of each step's batch, nats per token (the end token counted).
        validation: `(step, validation loss)`; step 0 is the initialization.
        best_step: The step whose prefixes were kept.
        num_rows, num_tokens: Rows and tokens trained on, repeats counted.
        seconds: Wall-clock time.
        num_parameters: Trained parameters.
        saved: Version numbers in the store, such as `{"user 'ana'": 2}`.
        left_out: What examples name that was neither trained nor stored.
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
        """The lowest validation loss, or the last batch's loss if nothing was held out."""
        return min((loss for _, loss in self.validation), default=self.losses[-1])

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, and `curves.png` if matplotlib is installed.

        Raises:
            StoreError: If the folder cannot be written.
        """
        curves.write(
            Path(folder),
            self,
            losses=self.losses,
            validation=self.validation,
            best_step=self.best_step,
        )


class TrainingRun:
    """One run: what it trains, the order of its rows, its optimizer and its progress.

    A step is: `begin_step`, leave gradients of the losses in `prefixes`, update the
    parameters with `optimizer`, `record_step`.

    Args:
        rows: Training rows, from which some are held out.
        prefixes: What is trained.
        settings: Hyperparameters.
        device: Device to train on.

    Attributes:
        held_out: Rows for validation.
        num_steps: Steps in total.
        targets_per_step: Mean number of target tokens of a batch.
        prefixes: What is trained, at its current step.
        optimizer: AdamW over its parameters.
        progress: Steps, losses and validation so far.

    Raises:
        TrainingDataError: If no row is left to train on.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        prefixes: TrainablePrefixes,
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self.settings = settings
        order = random.Random(settings.seed)
        training_ids, held_out_ids = split(len(rows), settings, order)
        training = [rows[i] for i in training_ids]
        self.held_out = [rows[i] for i in held_out_ids]
        self._identity = checkpoint.run_identity(settings, rows, prefixes)
        steps_per_epoch = math.ceil(len(training) / settings.batch_size)
        self.num_steps = settings.steps or math.ceil(settings.epochs * steps_per_epoch)
        num_evaluations = settings.num_evaluations
        self._validation_steps = {
            round(self.num_steps * (i + 1) / num_evaluations) for i in range(num_evaluations)
        }
        # Batches have rows of similar length, so a mean per batch would weight tokens unequally.
        self.targets_per_step = settings.batch_size * mean(len(row.targets) for row in training)
        self._learning_rate_at = learning_rate_schedule(self.num_steps)
        self._batches = _endless_batches(training, settings.batch_size, order)
        self.prefixes = prefixes.to_device(device)
        self.optimizer = torch.optim.AdamW(
            self.prefixes.parameters(),
            lr=settings.peak_learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.progress = checkpoint.Progress()
        self._best = self._copy_parameters()

    def resume_from(self, folder: Path) -> None:
        """Continue from the checkpoint in a folder, if there is one."""
        state = checkpoint.load(folder, self._identity, self.prefixes, self.optimizer)
        if state is None:
            _log.warning("there is no checkpoint in %s yet: the run starts from step 0", folder)
            return
        self.progress, self._best = state
        for _ in range(self.progress.step):
            next(self._batches)

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        checkpoint.save(
            folder, self._identity, self.progress, self.prefixes, self.optimizer, self._best
        )

    @property
    def identity(self) -> str:
        """A hash of the settings, the rows and the initialization."""
        return checkpoint.identity_hash(self._identity)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, or early stopping applies."""
        patience = self.settings.patience
        losses = [loss for _, loss in self.progress.validation]
        if self.progress.step >= self.num_steps:
            return True
        if patience is None or len(losses) <= patience:
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    @property
    def validation_due(self) -> bool:
        """Whether a validation pass is due at this step."""
        validated = {step for step, _ in self.progress.validation}
        step = self.progress.step
        due = step == 0 or step >= self.num_steps or step in self._validation_steps
        return bool(self.held_out) and due and step not in validated

    def begin_step(self) -> tuple[list[ContrastPair], int]:
        """Start the next step; returns its rows, and a seed for what is random in it."""
        settings = self.settings
        self.progress.step += 1
        # Randomness is a pure function of (seed, step), so a resumed run is bit-identical.
        draw = random.Random(f"{settings.seed}:{self.progress.step}")
        rows = next(self._batches)
        pairs = [ContrastPair(row) for row in rows]
        if settings.contrast:
            pairs = add_contrast(rows, self.prefixes.keys, draw)
        rate = settings.peak_learning_rate * self._learning_rate_at(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        return pairs, draw.randrange(1 << 62)

    def require_finite(self, loss: float) -> None:
        """Check that a loss is finite.

        Raises:
            TrainingDataError: If it is not.
        """
        if not math.isfinite(loss):
            raise TrainingDataError(
                f"the loss is {loss} at step {self.progress.step}; nothing was stored; lower "
                f"learning_rate (now {self.settings.peak_learning_rate})"
            )

    def record_step(self, pairs: Sequence[ContrastPair], loss: float) -> None:
        """Record a step whose gradients have been applied."""
        self.progress.losses.append(loss)
        self.progress.num_rows += len(pairs)
        self.progress.num_tokens += sum(pair.row.num_tokens for pair in pairs)
        if not self.held_out:  # there is nothing to tell a better step by
            self.progress.best_step = self.progress.step

    def record_validation(self, loss: float) -> None:
        """Record a validation loss; keep the parameters if it is the best so far."""
        self.progress.validation.append((self.progress.step, loss))
        if self.progress.step and loss <= min(loss for _, loss in self.progress.validation):
            self._best, self.progress.best_step = self._copy_parameters(), self.progress.step

    def restore_best(self) -> None:
        """Go back to the parameters of the best step; without held-out rows, keep the last."""
        if self.held_out:
            self.prefixes.load_state_dict(self._best)

    def report(self) -> TrainingReport:
        """The result so far."""
        progress = self.progress
        return TrainingReport(
            losses=tuple(progress.losses),
            validation=tuple(progress.validation),
            best_step=progress.best_step,
            num_rows=progress.num_rows,
            num_tokens=progress.num_tokens,
            seconds=progress.seconds,
            num_parameters=sum(p.numel() for p in self.prefixes.parameters()),
        )

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.prefixes.state_dict().items()}


def split(
    num_rows: int, settings: TrainingSettings, order: random.Random
) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on, and of the held-out rows.

    Args:
        num_rows: Rows in total.
        settings: `validation` is the fraction to hold out.
        order: A new generator with the settings' seed.

    Raises:
        TrainingDataError: If no row is left to train on.
    """
    shuffled = order.sample(range(num_rows), num_rows)
    num_held_out = round(settings.validation * num_rows)
    if num_held_out == num_rows:
        raise TrainingDataError(
            f"validation {settings.validation} of {num_rows} examples leaves none to train on; "
            "lower it, or give more examples"
        )
    return shuffled[num_held_out:], shuffled[:num_held_out]


def batches_by_length(rows: Sequence[TrainingRow], size: int) -> Iterator[list[TrainingRow]]:
    """Rows in batches of similar length, shortest first."""
    by_length = sorted(rows, key=lambda row: row.num_tokens)
    yield from (by_length[at : at + size] for at in range(0, len(by_length), size))


def learning_rate_schedule(num_steps: int) -> Callable[[int], float]:
    """The learning rate at a step, counted from 1, relative to its peak.

    It rises linearly over the first tenth of the steps, then falls as a cosine to a tenth.
    """
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        torch.optim.SGD([torch.zeros(1)]),  # transformers keeps the function in a scheduler
        num_warmup_steps=max(1, round(_WARM_UP_FRACTION * num_steps)),
        num_training_steps=num_steps,
        min_lr_rate=_MIN_LEARNING_RATE,
    )
    multiplier: Callable[[int], float] = scheduler.lr_lambdas[0]
    return multiplier


def _endless_batches(
    rows: Sequence[TrainingRow], size: int, order: random.Random
) -> Iterator[list[TrainingRow]]:
    """Passes over the rows in shuffled batches of similar length."""
    while True:
        shuffled = order.sample(list(rows), len(rows))
        bucket_size = size * _BATCHES_PER_BUCKET
        batches = []
        for at in range(0, len(shuffled), bucket_size):
            bucket = sorted(shuffled[at : at + bucket_size], key=lambda row: row.num_tokens)
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        order.shuffle(batches)
        yield from batches
