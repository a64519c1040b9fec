"""The training loop: optimizer steps of one or several runs in common passes over the model.

A row attends only to the prefixes of its own run, so the gradient of the sum of all losses is
each run's own gradient. Each run has its own optimizer, rows, validation and end.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from controlprefix._io import progress_bar
from controlprefix.cancellation import delayed_interrupt
from controlprefix.errors import TrainingDataError, TrainingInterrupted
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.training.control import RunControl
from controlprefix.training.objectives import ContrastPair, Objective, TrainingRow
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.run import TrainingRun
from controlprefix.training.settings import TrainingSettings

_MAX_ROWS_PER_PASS = 64


def train(
    frozen: FrozenModel,
    rows: Sequence[TrainingRow],
    prefixes: TrainablePrefixes,
    *,
    settings: TrainingSettings,
    held_out: Sequence[TrainingRow] = (),
    control: RunControl = RunControl(),  # noqa: B008 (it cannot be changed)
    objective: Objective | None = None,
) -> TrainingRun:
    """Train prefixes on rows; nothing else changes, above all not the model.

    Processes that accelerate started share each step's rows, and all return the same.

    Args:
        frozen: The model.
        rows: Rows to train on.
        prefixes: What is trained.
        settings: Hyperparameters.
        held_out: Rows to choose the best step by; without any, the last step is kept.
        control: Run folder, progress, tracker and callbacks.
        objective: What is minimized; left out, the one that the rows and the settings name.

    Returns:
        The finished run, with the parameters of its best step; nothing is stored yet.

    Raises:
        TrainingDataError: If there are no rows, or the loss is not finite.
        StoreError: If a checkpoint cannot be read or written.
        TrainingInterrupted: After Ctrl-C, once a checkpoint is written.

    Reference:
        Li & Liang, "Prefix-Tuning", 2021, https://arxiv.org/abs/2101.00190; joint
        training of task and attribute prefixes as in Clive et al., 2021,
        https://arxiv.org/abs/2110.08329.
    """
    own_trackers = [] if control.accelerator is None else list(control.accelerator.trackers)
    accelerator = control.make_accelerator()
    objective = objective or Objective(frozen, contrast=settings.contrast)
    folder = control.folder
    try:
        run = TrainingRun(rows, held_out, prefixes, settings, frozen.device, objective.identity())
        if folder is not None and control.resume:
            run.resume_from(folder)
    except BaseException:
        if not own_trackers:
            _finish_trackers(accelerator)
        raise
    loop = TrainingLoop(frozen, settings, accelerator, objective)
    is_main = accelerator.is_main_process
    earlier_s, started = run.progress.seconds, time.monotonic()
    visible = control.progress and is_main
    with (
        contextlib.ExitStack() as at_the_end,
        progress_bar("training", run.num_steps, visible=visible) as update,
        delayed_interrupt() as is_interrupted,
    ):
        if not own_trackers:  # or the caller ends them
            at_the_end.callback(_finish_trackers, accelerator)
        at_the_end.callback(loop.release)
        # A checkpoint may lie beyond the end, if the run resumes with fewer steps than before.
        while not run.is_finished or run.validation_due:
            failures = loop.step([run])
            if failures:
                raise TrainingDataError(failures[run])
            run.progress.seconds = earlier_s + time.monotonic() - started
            interrupted = _in_any(accelerator, is_interrupted()) and not run.is_finished
            due = run.is_finished or run.progress.step % settings.save_steps == 0
            if folder is not None and is_main and (due or interrupted):
                run.save(folder)
            info = run.step_info()
            metrics = {"loss": info.loss, "learning_rate": info.learning_rate}
            metrics |= {"grad_norm": info.grad_norm, **info.metrics}
            if info.validation_loss is not None:
                metrics["validation"] = info.validation_loss
            accelerator.log(metrics, step=info.step)
            names = info.metrics or [name for name in ("loss", "validation") if name in metrics]
            notes = [f"{name} {metrics[name]:.3f}" for name in names]
            update(info.step, ", ".join(notes))
            if control.on_step is not None:
                control.on_step(info)
            validated = run.progress.validation[-1:]
            if control.on_validation is not None and validated and validated[0][0] == info.step:
                control.on_validation(info)
            if interrupted:
                raise TrainingInterrupted(_stopped(run, folder))
    run.restore_best()
    return run


def _finish_trackers(accelerator: Accelerator) -> None:
    """End what is tracked. `end_training` would end the connection of the processes too."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def _in_any(accelerator: Accelerator, is_interrupted: bool) -> bool:
    """Whether any process was interrupted: then all stop at the same step."""
    if accelerator.num_processes == 1:
        return is_interrupted
    flag = torch.tensor(float(is_interrupted), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def _stopped(run: TrainingRun, folder: Path | None) -> str:
    message = f"stopped at step {run.progress.step} of {run.num_steps}; nothing was stored"
    if folder is None:
        return f"{message}, and there is no checkpoint, since the run has no folder"
    return f"{message}; the checkpoint is in {folder}, resume=True (--resume) continues from it"


class TrainingLoop:
    """Takes steps of runs.

    Args:
        frozen: The model.
        settings: Hyperparameters that all runs have in common.
        accelerator: Shares a single run's rows between processes; None for several runs.
        objective: What is minimized; left out, the one that the rows and the settings name.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        settings: TrainingSettings,
        accelerator: Accelerator | None = None,
        objective: Objective | None = None,
    ) -> None:
        self._frozen = frozen
        self._accelerator = accelerator
        self._objective = objective or Objective(frozen, contrast=settings.contrast)
        self._max_rows = settings.micro_batch_size or _MAX_ROWS_PER_PASS
        self._checkpoints_activations = settings.gradient_checkpointing
        self._prepared_optimizers: dict[TrainingRun, Any] = {}

    def release(self) -> None:
        """Let an accelerator that outlives the loop forget its optimizers."""
        for prepared in self._prepared_optimizers.values():
            if self._accelerator is not None and prepared in self._accelerator._optimizers:
                self._accelerator._optimizers.remove(prepared)
        self._prepared_optimizers.clear()

    def step(self, runs: Sequence[TrainingRun]) -> dict[TrainingRun, str]:
        """Take one step of each run that is not finished, with validation passes that are due.

        Returns:
            The runs that failed, and why; the others are not affected.
        """
        failures: dict[TrainingRun, str] = {}
        self._validate(runs, failures)
        self._objective.take_metrics()  # those of the validation pass are no step's
        active = [run for run in runs if run not in failures and not run.is_finished]
        steps = {}
        for run in active:
            pairs, seed = run.begin_step()
            fraction_done = (run.progress.step - 1) / run.num_steps
            steps[run] = self._objective.expand(pairs, run.prefixes, seed, fraction_done), seed
        losses = self._losses(
            [(run, pair) for run, (pairs, _) in steps.items() for pair in pairs],
            {run: seed for run, (_, seed) in steps.items()},
        )
        metrics = self._objective.take_metrics(self._gather)
        for run, (pairs, _) in steps.items():
            try:
                run.require_finite(losses[run])
            except TrainingDataError as error:
                failures[run] = str(error)
                continue
            grad_norm = self._update_parameters(run)
            run.record_step(pairs, losses[run], grad_norm, metrics)
        self._validate([run for run in active if run not in failures], failures)
        return failures

    def _validate(self, runs: Sequence[TrainingRun], failures: dict[TrainingRun, str]) -> None:
        """The validation passes that are due."""
        due = [run for run in runs if run.validation_due]
        if not due:
            return
        with torch.no_grad():
            losses = self._losses(
                [(run, ContrastPair(row)) for run in due for row in run.held_out], {}
            )
        for run in due:
            try:
                run.require_finite(losses[run])
                run.record_validation(losses[run])
            except TrainingDataError as error:
                failures[run] = str(error)

    def _losses(
        self, rows: Sequence[tuple[TrainingRun, ContrastPair]], seeds: Mapping[TrainingRun, int]
    ) -> dict[TrainingRun, float]:
        """Each run's loss in nats per target token; gradients are left in its parameters."""
        num_targets: dict[TrainingRun, int] = {}
        for run, pair in rows:
            num_targets[run] = num_targets.get(run, 0) + len(pair.row.targets)
        losses = dict.fromkeys(num_targets, 0.0)
        by_length = sorted(rows, key=lambda item: item[1].row.num_tokens)
        if self._accelerator is not None:
            by_length = by_length[
                self._accelerator.process_index :: self._accelerator.num_processes
            ]
        lengths = [pair.row.num_tokens for _, pair in by_length]
        # Not around all of training: it switches the KV cache off, which sampled texts need.
        checkpointing = activation_checkpointing(
            self._frozen.model, self._checkpoints_activations and torch.is_grad_enabled()
        )
        with checkpointing:
            for batch in self._frozen.batches(lengths, self._max_rows):
                chunk = [by_length[i] for i in batch]
                values = self._backward(chunk, seeds)
                for (run, _), value in zip(chunk, values, strict=True):
                    losses[run] += value / num_targets[run]
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            for run, loss in losses.items():
                total = torch.tensor(loss, dtype=torch.float64, device=self._frozen.device)
                losses[run] = float(self._accelerator.reduce(total, reduction="sum"))
        return losses

    def _backward(
        self,
        chunk: Sequence[tuple[TrainingRun, ContrastPair]],
        seeds: Mapping[TrainingRun, int],
    ) -> list[float]:
        """The loss of each pair in nats, after the backward pass of their sum."""
        pairs = [pair for _, pair in chunk]
        prefixes: dict[PrefixKey, Prefix] = {}
        for run in dict.fromkeys(run for run, _ in chunk):
            pair_rows = (row for other, pair in chunk if other is run for row in pair if row)
            keys = {key for row in pair_rows for key, _ in row.learned}
            prefixes.update(run.prefixes.prefixes(keys, seeds.get(run)))
        batch = self._objective.assemble(pairs, prefixes)
        autocast = self._accelerator.autocast() if self._accelerator else contextlib.nullcontext()
        with autocast, self._frozen.attached(batch, everywhere=True):
            losses = self._objective(pairs)
            per_step = torch.tensor([run.targets_per_step for run, _ in chunk])
            normalized = losses / per_step.to(losses.device)
            # A loss that is not finite ends its own run, not the others.
            finite = normalized[normalized.detach().isfinite()]
            if finite.requires_grad and len(finite):
                # Inside the block, since activation checkpoints run attention again.
                if self._accelerator is not None:
                    self._accelerator.backward(finite.sum())
                else:
                    finite.sum().backward()
        return losses.detach().tolist()

    def _update_parameters(self, run: TrainingRun) -> float:
        """Take an optimizer step; returns the norm of the gradients before clipping."""
        parameters = list(run.prefixes.parameters())
        max_norm = run.settings.max_grad_norm
        if self._accelerator is None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            run.optimizer.step()
            return float(norm)
        if run not in self._prepared_optimizers:
            prepared = self._accelerator.prepare_optimizer(run.optimizer)
            self._prepared_optimizers[run] = prepared
        self._sum_gradients(parameters)
        norm = self._accelerator.clip_grad_norm_(parameters, max_norm)
        self._prepared_optimizers[run].step()
        return 0.0 if norm is None else float(norm)

    def _gather(self, values: Sequence[float]) -> list[float]:
        """The values of all processes."""
        if self._accelerator is None or self._accelerator.num_processes == 1:
            return list(values)
        gathered: list[float] = gather_object(list(values))
        return gathered

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over processes; a parameter that no row uses keeps none."""
        if self._accelerator is None or self._accelerator.num_processes == 1:
            return
        has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
        counts = self._accelerator.reduce(has_gradient.to(self._frozen.device), reduction="sum")
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if count:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(own, reduction="sum")


# A second run would take the first one's changes for the model's own settings.
_checkpointing_lock = threading.Lock()


@contextlib.contextmanager
def activation_checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Checkpoint activations while inside, without switching on the model's dropout.

    transformers checkpoints only modules in training mode, so every dropout rate is set to 0
    meanwhile: gradients equal those without checkpointing.
    """
    if not enabled:
        yield
        return
    with _checkpointing_lock, contextlib.ExitStack() as undo:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                is_rate = "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
                if is_rate and isinstance(value, float) and value:
                    setattr(module, name, 0.0)
                    undo.callback(setattr, module, name, value)
        for module in model.modules():  # set back before the rates
            undo.callback(setattr, module, "training", module.training)
        model.train()
        if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            # Slots reach a layer from outside its arguments, which only this kind supports.
            _switch(model, "enable")({"use_reentrant": False})
            undo.callback(_switch(model, "disable"))
        yield


def _switch(model: PreTrainedModel, verb: str) -> Callable[..., Any]:
    """`activation_checkpointing_*`, or what transformers called it before 5.20."""
    renamed = getattr(model, f"activation_checkpointing_{verb}", None)
    return renamed or getattr(model, f"gradient_checkpointing_{verb}")
