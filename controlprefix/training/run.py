"""TrainingRun: the state of one run, without how losses are computed."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from controlprefix.errors import TrainingDataError
from controlprefix.model import FrozenModel
from controlprefix.prefixes import PrefixKey
from controlprefix.training import checkpoint
from controlprefix.training.control import StepInfo
from controlprefix.training.objectives import ContrastPair, TrainingRow, add_contrast
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.report import TrainingReport, identity_hash
from controlprefix.training.settings import TrainingSettings

_log = logging.getLogger("controlprefix")

_BATCHES_PER_BUCKET = 8  # rows are sorted by length within this many batches
_WARM_UP_FRACTION = 0.1
_MIN_LEARNING_RATE = 0.1  # at the end, relative to the peak


class TrainingRun:
    """One run: what it trains, the order of its rows, its optimizer and its progress.

    A step is: `begin_step`, leave gradients of the losses in `prefixes`, update the
    parameters with `optimizer`, `record_step`.

    Args:
        rows: Rows to train on.
        held_out: Rows for validation; there may be none.
        prefixes: What is trained.
        settings: Hyperparameters.
        device: Device to train on.
        objective_identity: See `Objective.identity`.

    Attributes:
        held_out: As given.
        num_steps: Steps in total.
        targets_per_step: Mean number of target tokens of a batch.
        prefixes: What is trained, at its current step.
        optimizer: AdamW over its parameters.
        progress: Steps, losses and validation so far.

    Raises:
        TrainingDataError: If there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        held_out: Sequence[TrainingRow],
        prefixes: TrainablePrefixes,
        settings: TrainingSettings,
        device: torch.device,
        objective_identity: Any = None,
    ) -> None:
        if not rows:
            raise TrainingDataError("there are no examples to train on")
        self.settings = settings
        self.held_out = held_out
        self._rows = rows
        self._identity = checkpoint.run_identity(
            settings, rows, held_out, prefixes, objective_identity
        )
        steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
        self.num_steps = settings.steps or math.ceil(settings.epochs * steps_per_epoch)
        num_evaluations = settings.num_evaluations
        self._validation_steps = {
            round(self.num_steps * (i + 1) / num_evaluations) for i in range(num_evaluations)
        }
        # Batches have rows of similar length, so a mean per batch would weight tokens unequally.
        # Rows whose targets are sampled have none yet.
        num_targets = mean(len(row.targets) for row in rows) or 1.0
        self.targets_per_step = settings.batch_size * num_targets
        self._learning_rate_at = learning_rate_schedule(self.num_steps)
        self._batches = self._all_batches()
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
        return identity_hash(self._identity)

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
        rng = random.Random(f"{settings.seed}:{self.progress.step}")
        rows = next(self._batches)
        pairs = [ContrastPair(row) for row in rows]
        if settings.contrast:
            pairs = add_contrast(rows, self.prefixes.keys, rng)
        rate = self._learning_rate(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        return pairs, rng.randrange(1 << 62)

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

    def record_step(
        self,
        pairs: Sequence[ContrastPair],
        loss: float,
        grad_norm: float,
        metrics: Mapping[str, float],
    ) -> None:
        """Record a step whose gradients have been applied."""
        self.progress.losses.append(loss)
        self.progress.metrics.append(dict(metrics))
        self.progress.grad_norms.append(grad_norm)
        self.progress.num_rows += len(pairs)
        self.progress.num_tokens += sum(pair.row.num_tokens for pair in pairs)
        if not self.held_out:  # there is nothing to tell a better step by
            self.progress.best_step = self.progress.step

    def record_validation(self, loss: float) -> None:
        """Record a validation loss; keep the parameters if it is the best so far."""
        self.progress.validation.append((self.progress.step, loss))
        if self.progress.step and loss <= min(loss for _, loss in self.progress.validation):
            self._best, self.progress.best_step = self._copy_parameters(), self.progress.step

    def step_info(self) -> StepInfo:
        """The latest step, for callbacks."""
        progress = self.progress
        return StepInfo(
            step=progress.step,
            num_steps=self.num_steps,
            loss=progress.losses[-1],
            learning_rate=self._learning_rate(progress.step),
            grad_norm=progress.grad_norms[-1],
            validation_loss=progress.validation[-1][1] if progress.validation else None,
            metrics=progress.metrics[-1],
        )

    def restore_best(self) -> None:
        """Go back to the parameters of the best step; without held-out rows, keep the last."""
        if self.held_out:
            self.prefixes.load_state_dict(self._best)

    def untrained(self) -> set[PrefixKey]:
        """Keys of the prefixes that no training row has used so far."""
        batches = self._all_batches()
        rows = (row for _ in range(self.progress.step) for row in next(batches))
        trained = {key for row in rows for key, strength in row.learned if strength}
        return set(self.prefixes.keys) - trained

    def report(self) -> TrainingReport:
        """The result so far."""
        progress = self.progress
        return TrainingReport(
            losses=tuple(progress.losses),
            validation=tuple(progress.validation),
            best_step=progress.best_step,
            learning_rates=tuple(map(self._learning_rate, range(1, len(progress.losses) + 1))),
            grad_norms=tuple(progress.grad_norms),
            metrics=tuple(progress.metrics),
            num_examples=len(self._rows),
            num_held_out=len(self.held_out),
            num_rows=progress.num_rows,
            num_tokens=progress.num_tokens,
            seconds=progress.seconds,
            num_parameters=sum(p.numel() for p in self.prefixes.parameters()),
            settings=self.settings.to_dict(),
            data_hash=self.identity,
            rows_hash=self._identity["rows"],
        )

    def _learning_rate(self, step: int) -> float:
        return self.settings.peak_learning_rate * self._learning_rate_at(step)

    def _all_batches(self) -> Iterator[list[TrainingRow]]:
        order = random.Random(self.settings.seed)
        return _endless_batches(self._rows, self.settings.batch_size, order)

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.prefixes.state_dict().items()}


def batches_by_length(
    frozen: FrozenModel, rows: Sequence[TrainingRow], size: int
) -> Iterator[list[TrainingRow]]:
    """Rows in batches of similar length, shortest first, so that no row changes another."""
    by_length = sorted(rows, key=lambda row: row.num_tokens)
    for batch in frozen.batches([row.num_tokens for row in by_length], size):
        yield [by_length[i] for i in batch]


def learning_rate_schedule(num_steps: int) -> Callable[[int], float]:
    """The learning rate at a step, counted from 1, relative to its peak.

    It rises linearly over the first tenth of the steps, then falls as a cosine to a tenth.
    """
    # Only here, since it imports peft, which takes as long as the rest of this package.
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

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
