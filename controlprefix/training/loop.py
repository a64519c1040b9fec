"""The training loop: rows in, the best prefixes out, the model untouched."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import nn
from transformers import PreTrainedModel

from controlprefix.errors import TrainingDataError
from controlprefix.model.steering import Steering
from controlprefix.training import checkpoint as state
from controlprefix.training.objectives import Objective, Pair, TrainingRow
from controlprefix.training.parameterization import LearnedSlots
from controlprefix.training.run import Run, in_batches
from controlprefix.training.settings import TrainingSettings


def train(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    slots: LearnedSlots,
    *,
    pad_id: int,
    settings: TrainingSettings,
    progress: bool,
    folder: Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
) -> Run:
    """Learn prefixes on rows; everything else, the model first of all, stays as it is.

    Processes that accelerate started share each step's rows, and all return the same.

    Args:
        model: Frozen.
        rows: At least two where a validation split is asked for.
        slots: What is learned.
        pad_id: Any id.
        settings: How.
        progress: Show a progress bar.
        folder: Where to write the state of the run, every `save_every` steps and at the end.
        resume: Go on from the state in that folder, where there is one.
        accelerator: With a precision and trackers of your own.

    Returns:
        The run, at its end; nothing is saved yet.

    Raises:
        TrainingDataError: If there are no rows, or the loss is no longer a number.
        StoreError: If the state of the run cannot be read or written.

    Reference:
        Li & Liang, "Prefix-Tuning", 2021, https://arxiv.org/abs/2101.00190; joint
        training of task and attribute prefixes as in Clive et al., 2021,
        https://arxiv.org/abs/2110.08329.
    """
    if not rows:
        raise TrainingDataError("there are no examples to learn from")
    state.require_folder(folder, resume)
    run = Run(rows, slots, settings, model.device)
    if folder is not None and resume:
        run.take_up(folder)
    _Loop(model, run, accelerator or Accelerator(), pad_id=pad_id).go(folder, progress)
    return run


class _Loop:
    """Computes a run's losses, over pieces of a batch and over processes."""

    def __init__(
        self, model: PreTrainedModel, run: Run, accelerator: Accelerator, *, pad_id: int
    ) -> None:
        self.run = run
        self.accelerator = accelerator
        self._model = model
        self._steering = Steering.of(model)
        self._objective = Objective(model, pad_id=pad_id, contrast=run.settings.contrast)
        self._optimizer = accelerator.prepare_optimizer(run.optimizer)

    def go(self, folder: Path | None, progress: bool) -> None:
        """Take all steps that are left."""
        run, settings = self.run, self.run.settings
        main = self.accelerator.is_main_process
        before, began = run.done.seconds, time.monotonic()
        if run.wants_a_look:
            run.looked(self.validation_loss())
        with (
            _checkpointing(self._model, settings.gradient_checkpointing),
            _bar(progress and main, run.steps, run.done.step) as advance,
        ):
            while not run.is_over:
                loss = self.step()
                if run.wants_a_look:
                    run.looked(self.validation_loss())
                run.done.seconds = before + time.monotonic() - began
                due = run.is_over or run.done.step % settings.save_every == 0
                if folder is not None and main and due:
                    run.save(folder)
                known = run.done.validation[-1][1] if run.done.validation else None
                self.accelerator.log(
                    {"loss": loss, **({} if known is None else {"validation": known})},
                    step=run.done.step,
                )
                advance(loss, known)

    def step(self) -> float:
        """Learn from some rows; gives their loss, nats a target token."""
        run = self.run
        pairs, seed = run.begin()
        loss = self.nats_a_token(pairs, seed)
        run.require_finite(loss)
        self.add_up_gradients()
        self.accelerator.clip_grad_norm_(run.slots.parameters(), run.settings.max_grad_norm)
        self._optimizer.step()
        run.finish(pairs, loss)
        return loss

    def nats_a_token(self, pairs: Sequence[Pair], seed: int | None = None) -> float:
        """The loss of some rows over all processes.

        The gradients that are left in the parameters count every token of a run alike.
        """
        targets = sum(len(pair.row.targets) for pair in pairs)
        mine = pairs[self.accelerator.process_index :: self.accelerator.num_processes]
        total = 0.0
        size = self.run.settings.micro_batch or max(1, len(mine))
        for at in range(0, len(mine), size):
            some = mine[at : at + size]
            keys = {key for pair in some for row in pair if row for key, _ in row.learned}
            batch = self._objective.assembled(some, self.run.slots.prefixes(keys, seed))
            with (
                self.accelerator.autocast(),
                self._steering.attached(batch, everywhere=True),
            ):
                nats = self._objective(some).sum()
                if nats.requires_grad:  # inside the block: checkpoints run attention again
                    self.accelerator.backward(nats / self.run.targets_a_step)
            total += float(nats.detach()) / targets
        if self.accelerator.num_processes > 1:
            over_all = torch.tensor(total, dtype=torch.float64, device=self._model.device)
            total = float(self.accelerator.reduce(over_all, reduction="sum"))
        return total

    def add_up_gradients(self) -> None:
        """Over all processes. A parameter that no row of the step uses keeps no gradient."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.run.slots.parameters())
        used = torch.tensor([float(p.grad is not None) for p in parameters])
        used = self.accelerator.reduce(used.to(self._model.device), reduction="sum")
        for parameter, number in zip(parameters, used.tolist(), strict=True):
            if number:
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(mine, reduction="sum")

    def validation_loss(self) -> float:
        """Of the held-out rows, nats a target token; without contrast."""
        total, targets = 0.0, 0
        with torch.no_grad():
            for batch in in_batches(self.run.held_out, self.run.settings.batch_size):
                count = sum(len(row.targets) for row in batch)
                total += self.nats_a_token([Pair(row) for row in batch]) * count
                targets += count
        return total / targets


# A second run would take the first one's settings for the model's own.
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Checkpoint activations while inside, without switching on the model's dropout.

    transformers checkpoints only modules in training mode, where dropout would
    make each pass another; a frozen model has nothing to regularize.
    """
    if not wanted:
        yield
        return
    with _one_at_a_time, contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            for name, value in list(vars(module).items()):
                is_rate = "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
                if is_rate and isinstance(value, float) and value:
                    setattr(module, name, 0.0)
                    undo.callback(setattr, module, name, value)
        model.train()
        if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            # Slots reach a layer from outside its arguments, which only this kind follows.
            _switch(model, "enable")({"use_reentrant": False})
            undo.callback(_switch(model, "disable"))
        yield


def _switch(model: PreTrainedModel, which: str) -> Callable[..., Any]:
    """`activation_checkpointing_*`, or what transformers called it before 5.20."""
    renamed = getattr(model, f"activation_checkpointing_{which}", None)
    return renamed or getattr(model, f"gradient_checkpointing_{which}")


@contextlib.contextmanager
def _bar(shown: bool, steps: int, done: int) -> Iterator[Callable[[float, float | None], Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with ProgressBar(*columns, disable=not shown) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss="…")

        def advance(loss: float, held_out: float | None) -> None:
            known = "" if held_out is None else f", held out {held_out:.3f}"
            bar.update(task, advance=1, loss=f"{loss:.3f}{known}")

        yield advance
