"""Trainer: examples or an instruction in, stored prefixes out, for one model and one store."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from controlprefix.attributes import attribute_name
from controlprefix.errors import TrainingDataError
from controlprefix.inference.resolver import Resolver
from controlprefix.model.steering import Steering
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.prefix import Prefix
from controlprefix.request import Example
from controlprefix.store import NewVersion, PrefixKey, PrefixStore
from controlprefix.training.loop import train
from controlprefix.training.objectives import Objective, Pair, TrainingRow
from controlprefix.training.parameterization import ParameterizationName
from controlprefix.training.preparation import (
    Given,
    Learned,
    Preparation,
    Start,
    prepare,
    require_as_trained,
)
from controlprefix.training.run import Run, TrainingReport, in_batches, split
from controlprefix.training.selection import slot_masses
from controlprefix.training.settings import TrainingSettings
from controlprefix.training.shortening import ShorteningReport, shorten
from controlprefix.training.sweep import SweepPoint, SweepReport

_EVALUATED = 16  # rows at a time


class Trainer:
    """Learns prefixes for one frozen model, and keeps them in one store."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: RequestEncoder,
        store: PrefixStore,
        resolver: Resolver,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._store = store
        self._resolver = resolver

    def prepare(
        self,
        examples: Sequence[Example],
        *,
        learn: Learned | Sequence[Learned],
        num_slots: int | Mapping[Learned, int],
        init: Start | Given,
        settings: TrainingSettings,
        slots_of: Callable[[PrefixKey], int | None] | None = None,
    ) -> Preparation:
        """See `controlprefix.training.preparation.prepare`."""
        return prepare(
            examples,
            self._model,
            self._encoder,
            self._store,
            self._resolver,
            learn=learn,
            num_slots=num_slots,
            init=init,
            settings=settings,
            slots_of=slots_of,
        )

    def prepare_to_distill(
        self,
        instruction: str,
        key: PrefixKey,
        asked: Sequence[Mapping[str, Any]],
        completions: Sequence[str],
        *,
        num_slots: int,
        settings: TrainingSettings,
    ) -> Preparation:
        """Rows whose teacher reads the instruction, and a prefix that starts from it.

        Raises:
            TrainingDataError: If there is not a completion a prompt, or all are empty.
        """
        if len(completions) != len(asked):
            raise TrainingDataError(
                f"{len(completions)} completions for {len(asked)} prompts; give one each"
            )
        examples = [
            Example(**fields, completion=completion)
            for fields, completion in zip(asked, completions, strict=True)
            if completion.strip()
        ]
        prepared = self.prepare(
            examples,
            learn=cast(Learned, "attributes" if key.kind == "attribute" else key.kind),
            num_slots=num_slots,
            init={key: instruction},
            settings=settings,
        )
        rows = []
        for row, example in zip(prepared.rows, examples, strict=True):
            asks = instructed(instruction, example.prompt or "")
            read = self._encoder.prompt_ids(example.model_copy(update={"prompt": asks}))
            rows.append(row._replace(teacher=read))
        return replace(prepared, rows=rows)

    def learn(
        self,
        prepared: Preparation,
        settings: TrainingSettings,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool = True,
        accelerator: Accelerator | None = None,
    ) -> TrainingReport:
        """Train, and store what was learned: all of it, or nothing."""
        self._store.require_writable(prepared.start)
        if settings.patience is not None:
            _require_held_out(len(prepared.rows), settings, "patience counts looks at")
        into = None if folder is None else Path(folder)
        run = self._train(
            prepared, settings, progress, folder=into, resume=resume, accelerator=accelerator
        )
        run.end()
        learned, report = run.slots.materialized(), run.report()
        details = {
            "training": {
                "examples": len(prepared.rows),
                "learned": [str(key) for key in learned],
                "best_step": report.best_step,
                "best_loss": round(report.best_loss, 4),
                **settings.as_dict(),
            }
        }
        numbers = [0] * len(learned)
        if PartialState().is_main_process:
            if into is not None:
                report.save(into)
            numbers = self._store.put(
                [
                    NewVersion(key, prefix.to(dtype=self._model.dtype), details)
                    for key, prefix in learned.items()
                ]
            )
        numbers = broadcast_object_list(numbers)
        saved = {str(key): number for key, number in zip(learned, numbers, strict=True)}
        return replace(report, saved=saved, left_out=prepared.left_out)

    def sweep(
        self,
        examples: Sequence[Example],
        *,
        slots: Sequence[int],
        parameterizations: Sequence[ParameterizationName],
        learn: Learned | Sequence[Learned],
        init: Start | Given,
        settings: Mapping[str, Any],
        progress: bool,
    ) -> SweepReport:
        """Learn with each number of slots and each parameterization, and store nothing."""
        if not slots or not parameterizations:
            raise TrainingDataError("there is nothing to try; give slots and parameterizations")
        points = []
        for name in parameterizations:
            for num_slots in slots:
                chosen = TrainingSettings.of({**settings, "parameterization": name})
                _require_held_out(len(examples), chosen, "a sweep compares losses of")
                prepared = self.prepare(
                    examples, learn=learn, num_slots=num_slots, init=init, settings=chosen
                )
                report = self._train(prepared, chosen, progress).report()
                points.append(SweepPoint(name, num_slots, report.best_loss, report.seconds))
        return SweepReport(tuple(points))

    def shorten(
        self, key: PrefixKey, examples: Sequence[Example], *, keep: float
    ) -> ShorteningReport:
        """Store a prefix with only the slots it needs."""
        prefix = self._store.get(key, Steering.of(self._model).geometry.fingerprint).prefix
        prefix = prefix.to(device=self._model.device)
        rows = self._rows_with(key, examples)
        pad_id = self._encoder.pad_id
        masses = slot_masses(self._model, rows, prefix, pad_id=pad_id)

        def nats_with(candidate: Prefix | None) -> float:
            return self._nats(rows, {} if candidate is None else {key: candidate})

        shorter, report = shorten(prefix, masses, nats_with, keep=keep)
        details = {"shortened": {"from": prefix.num_slots, "keep": keep}}
        (number,) = self._store.put([NewVersion(key, shorter, details)])
        return replace(report, version=number)

    def _train(
        self,
        prepared: Preparation,
        settings: TrainingSettings,
        progress: bool,
        *,
        folder: Path | None = None,
        resume: bool = False,
        accelerator: Accelerator | None = None,
    ) -> Run:
        return train(
            self._model,
            prepared.rows,
            settings.parameterized(prepared.start, prepared.scale),
            pad_id=self._encoder.pad_id,
            settings=settings,
            progress=progress,
            folder=folder,
            resume=resume,
            accelerator=accelerator,
        )

    def _rows_with(self, key: PrefixKey, examples: Sequence[Example]) -> list[TrainingRow]:
        """Rows whose other parts are as stored."""
        require_as_trained(examples)
        rows = []
        end_id = next(iter(self._encoder.end_ids), None)
        for i, (example, found) in enumerate(
            zip(examples, self._resolver.resolve(examples), strict=True), 1
        ):
            parts = {PrefixKey(one.used.kind, one.used.name): one.part for one in found}  # type: ignore[arg-type]
            if key not in parts:
                raise TrainingDataError(f"row {i} does not name {key}; give examples of it")
            own = [(key, parts.pop(key).strength)]
            encoded = self._encoder.encode(example)
            rows.append(TrainingRow.of(encoded, end_id, list(parts.values()), own))
        if not rows:
            raise TrainingDataError(f"there are no examples of {key}")
        return rows

    def _nats(self, rows: Sequence[TrainingRow], prefixes: Mapping[PrefixKey, Prefix]) -> float:
        """Of rows with those prefixes alone, a target token."""
        objective = Objective(self._model, pad_id=self._encoder.pad_id)
        total = 0.0
        for some in in_batches(rows, _EVALUATED):
            pairs = [
                Pair(row._replace(learned=[one for one in row.learned if one[0] in prefixes]))
                for row in some
            ]
            batch = objective.assembled(pairs, prefixes)
            with torch.no_grad(), Steering.of(self._model).attached(batch):
                total += float(objective(pairs).sum())
        return total / sum(len(row.targets) for row in rows)


def _require_held_out(count: int, settings: TrainingSettings, why: str) -> None:
    if not split(count, settings, random.Random(settings.seed))[1]:
        raise TrainingDataError(
            f"{why} held-out examples, and validation {settings.validation} of {count} is none; "
            "raise it, or give more examples"
        )


def instructed(instruction: str, prompt: str) -> str:
    """A prompt as the teacher reads it."""
    return f"{instruction}\n\n{prompt}" if prompt else instruction


def to_distill(
    prompts: Sequence[str],
    task: str | None,
    attribute: str | None,
    label: str | None,
    user: str | None,
) -> tuple[PrefixKey, list[dict[str, Any]]]:
    """The one prefix to learn, and for each prompt the fields of a request that names it.

    Raises:
        TrainingDataError: If not exactly one is named, or there is no prompt.
    """
    if (attribute is None) != (label is None):
        raise TrainingDataError("give an attribute and its label, or neither")
    named: list[tuple[PrefixKey, dict[str, Any]]] = []
    if task is not None:
        named.append((PrefixKey("task", task), {"task": task}))
    if attribute is not None and label is not None:
        key = PrefixKey("attribute", attribute_name(attribute, label))
        named.append((key, {"attributes": {attribute: label}}))
    if user is not None:
        named.append((PrefixKey("user", user), {"user": user}))
    if len(named) != 1:
        raise TrainingDataError("name one to learn: a task, an attribute and its label, or a user")
    if isinstance(prompts, str) or not prompts:
        raise TrainingDataError("there are no prompts to distill on; give a list of texts")
    ((key, fields),) = named
    return key, [{"prompt": prompt, **fields} for prompt in prompts]
