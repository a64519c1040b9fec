"""The training loop: rows in, the best prefixes out, the model untouched."""

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn
from transformers import PreTrainedModel

from controlprefix.errors import TrainingDataError
from controlprefix.geometry import Site
from controlprefix.prefix import Prefix
from controlprefix.steering import Steering
from controlprefix.store import PrefixKey
from controlprefix.training import curves, state
from controlprefix.training.objectives import Objective, Pair, TrainingRow, pair_up
from controlprefix.training.parameterization import Parameterization
from controlprefix.training.settings import TrainingSettings

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


def train(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    start: Mapping[PrefixKey, Prefix],
    scale: Mapping[Site, Tensor],
    *,
    pad_id: int,
    settings: TrainingSettings,
    progress: bool,
    folder: Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
) -> tuple[dict[PrefixKey, Prefix], TrainingReport]:
    """Learn prefixes on rows; everything else, the model first of all, stays as it is.

    Processes that accelerate started share each step's rows, and all return the same.

    Args:
        model: Frozen.
        rows: At least two where a validation split is asked for.
        start: The prefixes to learn, as they begin.
        scale: See `Parameterization`.
        pad_id: Any id.
        settings: How.
        progress: Show a progress bar.
        folder: Where to write the state of the run, every `save_every` steps and at the end.
        resume: Go on from the state in that folder, where there is one.
        accelerator: With a precision and trackers of your own.

    Returns:
        The prefixes of the best step, in float32, and a report, nothing saved yet.

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
    run = _Run(
        model,
        rows,
        start,
        scale,
        pad_id=pad_id,
        settings=settings,
        accelerator=accelerator or Accelerator(),
    )
    run.go(folder, resume=resume, progress=progress)
    return run.best, run.report()


class _Run:
    """One run: what it learns, and how far it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[TrainingRow],
        start: Mapping[PrefixKey, Prefix],
        scale: Mapping[Site, Tensor],
        *,
        pad_id: int,
        settings: TrainingSettings,
        accelerator: Accelerator,
    ) -> None:
        self.model = model
        self.settings = settings
        self.accelerator = accelerator
        self.steering = Steering.of(model)
        self.objective = Objective(model, pad_id=pad_id, contrast=settings.contrast)
        self.order = random.Random(settings.seed)
        self.training, self.held_out = _split(rows, settings.validation, self.order)
        self.identity = state.identity_of(settings, rows, start)
        per_epoch = math.ceil(len(self.training) / settings.batch_size)
        self.steps = settings.steps or math.ceil(settings.epochs * per_epoch)
        self.slots = Parameterization(
            settings.parameterization,
            start,
            scale,
            width=settings.width,
            freeze_first_slot=settings.freeze_first_slot,
            seed=settings.seed,
        ).to_device(model.device)
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(
                self.slots.parameters(),
                lr=settings.rate,
                weight_decay=settings.weight_decay,
            )
        )
        self.done = state.Progress()
        self.best = self.slots.materialized()

    def go(self, folder: Path | None, *, resume: bool, progress: bool) -> None:
        """Take all steps that are left."""
        settings, done = self.settings, self.done
        if folder is not None:
            state.require_folder(folder)
        if folder is not None and resume:
            inner = self.optimizer.optimizer
            found = state.load(folder, self.identity, self.slots, inner, self.best)
            if found is not None:
                done, self.best = found
                self.done = done
        main = self.accelerator.is_main_process
        looks = {
            round(self.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)
        }
        stream = _endless(self.training, settings.batch_size, self.order)
        for _ in range(done.step):
            next(stream)
        before = done.seconds
        began = time.monotonic()
        if self.held_out and not done.validation:
            done.validation.append((0, self.validation_loss()))
        with (
            _checkpointing(self.model, settings.gradient_checkpointing),
            _bar(progress and main, self.steps, done.step) as advance,
        ):
            while done.step < self.steps and not self.is_over:
                loss = self.step(next(stream))
                if self.held_out and done.step in looks:
                    self.look()
                done.seconds = before + time.monotonic() - began
                over = done.step == self.steps or self.is_over
                if folder is not None and main and (over or done.step % settings.save_every == 0):
                    self.save(folder)
                known = done.validation[-1][1] if done.validation else None
                self.accelerator.log(
                    {"loss": loss, **({} if known is None else {"validation": known})},
                    step=done.step,
                )
                advance(loss, known)
        if not self.held_out:
            self.best, done.best_step = self.slots.materialized(), done.step

    @property
    def is_over(self) -> bool:
        """Whether the last looks found nothing better."""
        patience, looks = self.settings.patience, [loss for _, loss in self.done.validation]
        if patience is None or len(looks) <= patience:
            return False
        return min(looks[-patience:]) >= min(looks[:-patience])

    def step(self, batch: Sequence[TrainingRow]) -> float:
        """Learn from some rows; gives their loss, nats a target token."""
        settings, done = self.settings, self.done
        done.step += 1
        # What is drawn depends on the seed and the step alone, so a run can be taken up anywhere.
        draw = random.Random(f"{settings.seed}:{done.step}")
        pairs = [Pair(row) for row in batch]
        if settings.contrast:
            pairs = pair_up(batch, self.best.keys(), draw)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * share_of_rate(done.step, self.steps)
        self.optimizer.zero_grad()
        loss = self.nats_a_token(pairs, draw)
        if not math.isfinite(loss):
            raise TrainingDataError(
                f"the loss is {loss} at step {done.step}; nothing was stored; lower learning_rate "
                f"(now {settings.rate})"
            )
        self.add_up_gradients()
        self.accelerator.clip_grad_norm_(self.slots.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        done.losses.append(loss)
        done.num_rows += len(batch)
        done.num_tokens += sum(row.num_tokens for row in batch)
        return loss

    def nats_a_token(self, pairs: Sequence[Pair], draw: random.Random | None = None) -> float:
        """The loss of some rows over all processes; its gradients are left in the parameters."""
        targets = sum(len(pair.row.targets) for pair in pairs)
        mine = pairs[self.accelerator.process_index :: self.accelerator.num_processes]
        total = 0.0
        seed = draw.randrange(1 << 62) if draw else None
        size = self.settings.micro_batch or max(1, len(mine))
        for at in range(0, len(mine), size):
            some = mine[at : at + size]
            keys = {key for p in some for row in p if row for key, _ in row.learned}
            prefixes = self.slots.prefixes(keys)
            if draw and self.settings.slot_dropout:
                prefixes = self._dropped(prefixes, seed)
            batch = self.objective.assembled(some, prefixes)
            with (
                self.accelerator.autocast(),
                self.steering.attached(batch, everywhere=True),
            ):
                loss = self.objective(some) / targets
                if loss.requires_grad:  # inside the block: checkpoints run attention again
                    self.accelerator.backward(loss)
            total += float(loss.detach())
        if self.accelerator.num_processes > 1:
            over_all = torch.tensor(total, dtype=torch.float64, device=self.model.device)
            total = float(self.accelerator.reduce(over_all, reduction="sum"))
        return total

    def _dropped(
        self, prefixes: Mapping[PrefixKey, Prefix], seed: int | None
    ) -> dict[PrefixKey, Prefix]:
        """Without some of their slots: each prefix's own draw, the same in every process."""
        kept: dict[PrefixKey, Prefix] = {}
        for key, prefix in prefixes.items():
            draw = torch.Generator().manual_seed(_seed_of(seed, key))
            chance = torch.rand(prefix.num_slots, generator=draw)
            stays = chance >= self.settings.slot_dropout
            stays[chance.argmax()] = True  # one at least
            kept[key] = Prefix(
                prefix.geometry,
                {site: rows[stays[: len(rows)]] for site, rows in prefix.slots.items()},
            )
        return kept

    def add_up_gradients(self) -> None:
        """Over all processes. A parameter that no row of the step uses keeps no gradient."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.slots.parameters())
        used = torch.tensor([float(p.grad is not None) for p in parameters])
        used = self.accelerator.reduce(used.to(self.model.device), reduction="sum")
        for parameter, number in zip(parameters, used.tolist(), strict=True):
            if number:
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(mine, reduction="sum")

    def look(self) -> None:
        """At the held-out rows; keep the prefixes if they are the best so far."""
        self.done.validation.append((self.done.step, self.validation_loss()))
        if self.done.validation[-1][1] <= min(loss for _, loss in self.done.validation):
            self.best, self.done.best_step = self.slots.materialized(), self.done.step

    def validation_loss(self) -> float:
        """Of the held-out rows, nats a target token; without contrast."""
        with torch.no_grad():
            batches = list(_batches(self.held_out, self.settings.batch_size, None))
            weights = [sum(len(row.targets) for row in batch) for batch in batches]
            found = [self.nats_a_token([Pair(row) for row in batch]) for batch in batches]
        return sum(x * w for x, w in zip(found, weights, strict=True)) / sum(weights)

    def save(self, folder: Path) -> None:
        """Write the state of the run."""
        inner = self.optimizer.optimizer
        state.save(folder, self.identity, self.done, self.slots, inner, self.best)

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


def _seed_of(seed: int | None, key: PrefixKey) -> int:
    """A seed for one prefix: the same in every process."""
    return random.Random(f"{seed}:{key.kind}:{key.name}").randrange(1 << 62)


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


def _batches(
    rows: Sequence[TrainingRow], size: int, order: random.Random | None
) -> Iterator[list[TrainingRow]]:
    """One pass, batches of similar length; shuffled with `order`, else shortest first."""
    shuffled = order.sample(list(rows), len(rows)) if order else list(rows)
    run = size * _BUCKET if order else len(rows)
    batches = []
    for at in range(0, len(shuffled), run):
        bucket = sorted(shuffled[at : at + run], key=lambda row: row.num_tokens)
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    if order:
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
