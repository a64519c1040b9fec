"""The training loop: examples in, the best prefixes out, the model untouched."""

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from controlprefix.assembly import Part, assemble
from controlprefix.encoding import EncodedExample
from controlprefix.errors import TrainingDataError, known_names
from controlprefix.likelihood import token_log_probs
from controlprefix.prefix import Prefix
from controlprefix.steering import Steering
from controlprefix.store import PrefixKey
from controlprefix.training.parameters import DirectSlots

_BUCKET = 8  # batches are cut from runs of this many batches sorted by length


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to learn.

    Attributes:
        epochs: Passes over the training rows, unless `steps` is given.
        steps: Optimizer steps in all.
        batch_size: Rows a step.
        learning_rate: Of AdamW, at its highest: after a linear warm-up over the
            first tenth of the steps, before a cosine decay to a tenth.
        max_grad_norm: Gradients are clipped to this norm.
        validation: Fraction of the rows held out to choose the best step by; 0
            keeps the last step.
        evaluations: How often to look at the held-out rows.
        gradient_checkpointing: Compute activations again in the backward pass, for
            less memory and the same gradients.
        seed: Of the split and the order of rows.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 3e-2
    max_grad_norm: float = 1.0
    validation: float = 0.1
    evaluations: int = 5
    gradient_checkpointing: bool = False
    seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Settings by name.

        Raises:
            TrainingDataError: If there is none of that name, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        for name in settings.keys() - known:
            raise TrainingDataError(
                f"unknown setting {name!r}; there are: {known_names(name, known)}"
            )
        return cls(**settings)

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "evaluations", "seed")
        for field_ in fields(self):
            value = getattr(self, field_.name)
            wanted = int if field_.name in whole else (int, float)
            if not isinstance(value, wanted) and not (field_.name == "steps" and value is None):
                kind = "a whole number" if field_.name in whole else "a number"
                raise TrainingDataError(f"{field_.name} is {value!r}; it must be {kind}")
        for name, ok, want in (
            ("epochs", 0 < self.epochs < math.inf, "above 0"),
            ("steps", self.steps is None or self.steps > 0, "above 0"),
            ("seed", 0 <= self.seed < 1 << 63, "0 or more, and below 2**63"),
            ("batch_size", self.batch_size > 0, "above 0"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("validation", 0 <= self.validation < 1, "at least 0 and below 1"),
            ("evaluations", self.evaluations > 0, "above 0"),
        ):
            if not ok:
                raise TrainingDataError(f"{name} is {getattr(self, name)}; it must be {want}")


class TrainingRow(NamedTuple):
    """One training row: its tokens, the frozen parts it has, and the learned ones by key."""

    encoded: EncodedExample
    frozen: Sequence[Part]
    learned: Sequence[tuple[PrefixKey, float]]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What happened.

    Attributes:
        losses: Of each step's batch, nats a token (the end token counted).
        validation: `(step, loss on held-out rows)`; step 0 is the start.
        best_step: Whose prefixes were kept.
        num_rows, num_tokens: Seen while training, repeats counted.
        seconds: Wall-clock time.
        saved: Version numbers in the store, such as `{"user 'ana'": 2}`.
        left_out: What examples name that was neither learned nor stored.
    """

    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int
    num_rows: int
    num_tokens: int
    seconds: float
    saved: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def best_loss(self) -> float:
        """On held-out rows where there are any, else the last batch's."""
        return min((loss for _, loss in self.validation), default=self.losses[-1])


def train(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    start: Mapping[PrefixKey, Prefix],
    *,
    end_id: int | None,
    pad_id: int,
    settings: TrainingSettings,
    progress: bool,
) -> tuple[dict[PrefixKey, Prefix], TrainingReport]:
    """Learn prefixes on rows; everything else, the model first of all, stays as it is.

    Args:
        model: Frozen.
        rows: At least two where a validation split is asked for.
        start: The prefixes to learn, as they begin.
        end_id: Appended to each completion, so that it is learned where to end.
        pad_id: Any id.
        settings: How.
        progress: Show a progress bar.

    Returns:
        The prefixes of the best step, in float32, and a report, nothing saved yet.

    Raises:
        TrainingDataError: If there are no rows, or the loss is no longer a number.

    Reference:
        Li & Liang, "Prefix-Tuning", 2021, https://arxiv.org/abs/2101.00190 (without
        the MLP); joint training of task and attribute prefixes as in Clive et al.,
        2021, https://arxiv.org/abs/2110.08329.
    """
    if not rows:
        raise TrainingDataError("there are no examples to learn from")
    began = time.monotonic()
    order = random.Random(settings.seed)
    training, held_out = _split(rows, settings.validation, order)
    steps = settings.steps or math.ceil(
        settings.epochs * math.ceil(len(training) / settings.batch_size)
    )
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise TrainingDataError("training in several processes is not supported; start one")
    steering = Steering.of(model)
    slots = DirectSlots(start).to(accelerator.device)
    optimizer = torch.optim.AdamW(slots.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, _schedule(steps))
    slots, optimizer, schedule = accelerator.prepare(slots, optimizer, schedule)

    def loss_of(batch: Sequence[TrainingRow]) -> torch.Tensor:
        learned = slots.prefixes()
        parts = [
            [*row.frozen, *(Part(learned[name], strength) for name, strength in row.learned)]
            for row in batch
        ]
        end = () if end_id is None else (end_id,)
        assembled = assemble(parts, steering.geometry, device=model.device, dtype=model.dtype)
        with steering.attached(assembled, everywhere=True):
            log_probs, mask = token_log_probs(
                model,
                [row.encoded.prompt for row in batch],
                [(*row.encoded.completion, *end) for row in batch],
                pad_id=pad_id,
            )
            loss = -log_probs.sum() / mask.sum()
            if loss.requires_grad:  # inside the block: checkpoints run attention again
                accelerator.backward(loss)
        return loss.detach()

    def validation_loss() -> float:
        with torch.no_grad():
            batches = list(_batches(held_out, settings.batch_size, None))
            weights = [sum(len(row.encoded.completion) + 1 for row in batch) for batch in batches]
            total = sum(float(loss_of(b)) * w for b, w in zip(batches, weights, strict=True))
        return total / sum(weights)

    losses: list[float] = []
    validation: list[tuple[int, float]] = []
    best, best_step, num_rows, num_tokens = slots.materialized(), 0, 0, 0
    if held_out:
        validation.append((0, validation_loss()))
    evaluate_at = {
        round(steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)
    }
    stream = _endless(training, settings.batch_size, order)
    with _checkpointing(model, settings.gradient_checkpointing), _bar(progress, steps) as advance:
        for step in range(1, steps + 1):
            batch = next(stream)
            optimizer.zero_grad()
            loss = float(loss_of(batch))
            if not math.isfinite(loss):
                raise TrainingDataError(
                    f"the loss is {loss} at step {step}; nothing was stored; lower learning_rate "
                    f"(now {settings.learning_rate})"
                )
            accelerator.clip_grad_norm_(slots.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss)
            num_rows += len(batch)
            num_tokens += sum(len(r.encoded.prompt) + len(r.encoded.completion) for r in batch)
            if held_out and step in evaluate_at:
                validation.append((step, validation_loss()))
                if validation[-1][1] <= min(loss for _, loss in validation):
                    best, best_step = slots.materialized(), step
            advance(loss, validation[-1][1] if validation else None)
    if not held_out:
        best, best_step = slots.materialized(), steps
    report = TrainingReport(
        losses=tuple(losses),
        validation=tuple(validation),
        best_step=best_step,
        num_rows=num_rows,
        num_tokens=num_tokens,
        seconds=time.monotonic() - began,
    )
    return best, report


def _split(
    rows: Sequence[TrainingRow], fraction: float, order: random.Random
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    shuffled = order.sample(list(rows), len(rows))
    num_held_out = round(fraction * len(rows))
    if num_held_out == len(rows):
        raise TrainingDataError(
            f"validation {fraction} of {len(rows)} examples leaves none to learn from; lower "
            "it, or give more examples"
        )
    return shuffled[num_held_out:], shuffled[:num_held_out]


def _length(row: TrainingRow) -> int:
    return len(row.encoded.prompt) + len(row.encoded.completion)


def _batches(
    rows: Sequence[TrainingRow], size: int, order: random.Random | None
) -> Iterator[list[TrainingRow]]:
    """One pass, batches of similar length; shuffled with `order`, else shortest first."""
    shuffled = order.sample(list(rows), len(rows)) if order else list(rows)
    run = size * _BUCKET if order else len(rows)
    batches = []
    for at in range(0, len(shuffled), run):
        bucket = sorted(shuffled[at : at + run], key=_length)
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    if order:
        order.shuffle(batches)
    yield from batches


def _endless(
    rows: Sequence[TrainingRow], size: int, order: random.Random
) -> Iterator[list[TrainingRow]]:
    while True:
        yield from _batches(rows, size, order)


def _schedule(steps: int) -> Callable[[int], float]:
    warm_up = max(1, round(0.1 * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, steps - warm_up)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    return factor


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
def _bar(shown: bool, steps: int) -> Iterator[Callable[[float, float | None], Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("training", total=steps, loss="…")

        def advance(loss: float, held_out: float | None) -> None:
            known = "" if held_out is None else f", held out {held_out:.3f}"
            bar.update(task, advance=1, loss=f"{loss:.3f}{known}")

        yield advance
