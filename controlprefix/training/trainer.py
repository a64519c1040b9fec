"""Trainer: trains prefixes on examples or an instruction, and stores them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from controlprefix.errors import TrainingDataError
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.request import Example
from controlprefix.store import NewVersion, PrefixStore
from controlprefix.training.initialization import Initialization, Initializations
from controlprefix.training.loop import train
from controlprefix.training.objectives import ContrastPair, Objective, TrainingRow
from controlprefix.training.parameterization import parameterize
from controlprefix.training.preparation import Learnable, Preparation, check_trainable, prepare
from controlprefix.training.run import TrainingReport, batches_by_length, split
from controlprefix.training.settings import ParameterizationName, TrainingSettings
from controlprefix.training.shortening import ShorteningReport, shorten
from controlprefix.training.slot_attention import slot_masses
from controlprefix.training.sweep import SweepPoint, SweepReport

_EVALUATION_BATCH_SIZE = 16


class Trainer:
    """Trains prefixes for one frozen model, and keeps them in one store.

    Args:
        frozen: The model.
        store: Where to publish.
        resolver: Finds the parts that are not trained.
    """

    def __init__(self, frozen: FrozenModel, store: PrefixStore, resolver: Resolver) -> None:
        self._frozen = frozen
        self._store = store
        self._resolver = resolver

    def train(
        self,
        examples: Sequence[Example],
        settings: TrainingSettings,
        *,
        learn: Learnable | Sequence[Learnable] | None,
        num_slots: int | Mapping[Learnable, int],
        init: Initialization | Initializations,
        num_slots_of: Callable[[PrefixKey], int | None],
        folder: str | Path | None,
        resume: bool,
        progress: bool,
        accelerator: Accelerator | None,
    ) -> TrainingReport:
        """Train on examples: see `ControlPrefix.train`.

        Args:
            examples: With default labels.
            settings: Hyperparameters.
            learn, num_slots, init, folder, resume, progress, accelerator: As there.
            num_slots_of: Slots of one prefix, where that differs from `num_slots`.
        """
        preparation = prepare(
            examples,
            self._frozen,
            self._resolver,
            settings,
            learn=learn,
            num_slots=num_slots,
            init=init,
            num_slots_of=num_slots_of,
        )
        return self._train_and_publish(
            preparation, settings, folder, resume=resume, progress=progress, accelerator=accelerator
        )

    def distill(
        self,
        instruction: str,
        key: PrefixKey,
        examples: Sequence[Example],
        settings: TrainingSettings,
        *,
        num_slots: int,
        folder: str | Path | None,
        resume: bool,
        progress: bool,
        accelerator: Accelerator | None,
    ) -> TrainingReport:
        """Train on the predictions of the model with an instruction: see `ControlPrefix.distill`.

        Args:
            instruction: What the teacher reads in front of each prompt.
            key: The prefix to train.
            examples: Prompts with the teacher's completions, which name that prefix.
            settings: Hyperparameters.
            num_slots, folder, resume, progress, accelerator: As there.
        """
        preparation = prepare(
            examples,
            self._frozen,
            self._resolver,
            settings,
            learn=cast(Learnable, "attributes" if key.kind == "attribute" else key.kind),
            num_slots=num_slots,
            init={key: instruction},
        )
        rows = []
        for row, example in zip(preparation.rows, examples, strict=True):
            prompt = with_instruction(instruction, example.prompt or "")
            instructed = example.model_copy(update={"prompt": prompt})
            teacher = self._frozen.request_tokenizer.prompt_ids(instructed)
            rows.append(row._replace(teacher=teacher))
        return self._train_and_publish(
            replace(preparation, rows=rows),
            settings,
            folder,
            resume=resume,
            progress=progress,
            accelerator=accelerator,
        )

    def sweep(
        self,
        examples: Sequence[Example],
        *,
        num_slots: Sequence[int],
        parameterizations: Sequence[ParameterizationName],
        learn: Learnable | Sequence[Learnable] | None,
        init: Initialization | Initializations,
        options: Mapping[str, Any],
        progress: bool,
    ) -> SweepReport:
        """Train with each number of slots and each parameterization, and store nothing.

        Args:
            examples: With default labels.
            num_slots, parameterizations: What to try.
            learn, init, progress: As in `ControlPrefix.train`.
            options: Fields of `TrainingSettings`.

        Raises:
            TrainingDataError: If there is nothing to try, or nothing is held out.
        """
        if not num_slots or not parameterizations:
            raise TrainingDataError("nothing to try; give num_slots and parameterizations")
        points = []
        for name in parameterizations:
            for count in num_slots:
                settings = TrainingSettings.from_options({**options, "parameterization": name})
                _require_held_out(len(examples), settings, "a sweep")
                preparation = prepare(
                    examples,
                    self._frozen,
                    self._resolver,
                    settings,
                    learn=learn,
                    num_slots=count,
                    init=init,
                )
                run = train(
                    self._frozen,
                    preparation.rows,
                    parameterize(settings, preparation.initial, preparation.scale),
                    settings=settings,
                    progress=progress,
                )
                report = run.report()
                points.append(SweepPoint(name, count, report.best_loss, report.seconds))
        return SweepReport(tuple(points))

    def shorten(
        self, key: PrefixKey, examples: Sequence[Example], *, keep: float
    ) -> ShorteningReport:
        """Store a prefix with only the slots it needs: see `ControlPrefix.shorten`."""
        prefix = self._resolver.get(key).to(device=self._frozen.device)
        rows = self._rows_naming(key, examples)
        masses = slot_masses(self._frozen, rows, prefix)

        def loss_with(candidate: Prefix | None) -> float:
            return self._loss(rows, {} if candidate is None else {key: candidate})

        shorter, report = shorten(prefix, masses, loss_with, keep=keep)
        details = {"shortened": {"from": prefix.num_slots, "keep": keep}}
        (version,) = self._store.put([NewVersion(key, shorter, details)])
        return replace(report, version=version)

    def _train_and_publish(
        self,
        preparation: Preparation,
        settings: TrainingSettings,
        folder: str | Path | None,
        *,
        resume: bool,
        progress: bool,
        accelerator: Accelerator | None,
    ) -> TrainingReport:
        """Train, and publish all trained prefixes together, or none."""
        self._store.require_writable(preparation.initial)
        if settings.patience is not None:
            _require_held_out(len(preparation.rows), settings, "patience")
        folder = None if folder is None else Path(folder)
        run = train(
            self._frozen,
            preparation.rows,
            parameterize(settings, preparation.initial, preparation.scale),
            settings=settings,
            progress=progress,
            folder=folder,
            resume=resume,
            accelerator=accelerator,
        )
        prefixes, report = run.prefixes.materialize(), run.report()
        details = {
            "training": {
                "examples": len(preparation.rows),
                "learned": [str(key) for key in prefixes],
                "best_step": report.best_step,
                "best_loss": round(report.best_loss, 4),
                **settings.to_dict(),
            }
        }
        versions = [0] * len(prefixes)
        if PartialState().is_main_process:
            if folder is not None:
                report.save(folder)
            versions = self._store.put(
                [
                    NewVersion(key, prefix.to(dtype=self._frozen.dtype), details)
                    for key, prefix in prefixes.items()
                ]
            )
        versions = broadcast_object_list(versions)
        saved = {str(key): version for key, version in zip(prefixes, versions, strict=True)}
        return replace(report, saved=saved, left_out=preparation.left_out)

    def _rows_naming(self, key: PrefixKey, examples: Sequence[Example]) -> list[TrainingRow]:
        """Rows in which a stored prefix is the trained part and all others are frozen.

        Raises:
            TrainingDataError: If there are none, or one does not name the prefix.
        """
        check_trainable(examples)
        rows = []
        tokenizer = self._frozen.request_tokenizer
        for i, resolved in enumerate(self._resolver.resolve(examples), 1):
            parts = {(p.used.kind, p.used.name): p.part for p in resolved.parts}
            part = parts.pop((key.kind, key.name), None)
            if part is None:
                raise TrainingDataError(f"row {i} does not name {key}; give examples of it")
            tokenized = tokenizer.example_ids(resolved.request)
            learned = [(key, part.strength)]
            frozen_parts = list(parts.values())
            row = TrainingRow.from_example(tokenized, tokenizer.end_id, frozen_parts, learned)
            rows.append(row)
        if not rows:
            raise TrainingDataError(f"there are no examples of {key}")
        return rows

    def _loss(self, rows: Sequence[TrainingRow], prefixes: Mapping[PrefixKey, Prefix]) -> float:
        """Nats per target token of rows, with only those trained parts that are given."""
        objective = Objective(self._frozen)
        total = 0.0
        for batch_rows in batches_by_length(rows, _EVALUATION_BATCH_SIZE):
            pairs = [
                ContrastPair(
                    row._replace(learned=[item for item in row.learned if item[0] in prefixes])
                )
                for row in batch_rows
            ]
            batch = objective.assemble(pairs, prefixes)
            with torch.no_grad(), self._frozen.attached(batch):
                total += float(objective(pairs).sum())
        return total / sum(len(row.targets) for row in rows)


def distillation_target(
    *, task: str | None, attribute: str | None, label: str | None, user: str | None
) -> tuple[PrefixKey, dict[str, Any]]:
    """The one prefix to distill into, and the request fields that name it.

    Raises:
        TrainingDataError: If not exactly one is named.
    """
    if (attribute is None) != (label is None):
        raise TrainingDataError("give an attribute and its label, or neither")
    targets: list[tuple[PrefixKey, dict[str, Any]]] = []
    if task is not None:
        targets.append((PrefixKey("task", task), {"task": task}))
    if attribute is not None and label is not None:
        key = PrefixKey.for_label(attribute, label)
        targets.append((key, {"attributes": {attribute: label}}))
    if user is not None:
        targets.append((PrefixKey("user", user), {"user": user}))
    if len(targets) != 1:
        raise TrainingDataError("name one to learn: a task, an attribute and its label, or a user")
    return targets[0]


def with_instruction(instruction: str, prompt: str) -> str:
    """A prompt as the teacher reads it."""
    return f"{instruction}\n\n{prompt}" if prompt else instruction


def _require_held_out(num_rows: int, settings: TrainingSettings, what: str) -> None:
    if not split(num_rows, settings, random.Random(settings.seed))[1]:
        raise TrainingDataError(
            f"{what} needs held-out examples, but validation {settings.validation} of {num_rows} "
            "examples is none; raise it, or give more examples"
        )
