"""Trainer: trains prefixes on examples or an instruction, and stores them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from controlprefix.cancellation import raise_if_stopped
from controlprefix.errors import ContextLengthError, TrainingDataError, shortened
from controlprefix.example import Example
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.model.slot_attention import QueryText, observe
from controlprefix.prefixes import Prefix, PrefixKey
from controlprefix.processes import in_main_process, process_state
from controlprefix.store import NewVersion, PrefixStore, VersionRef
from controlprefix.training.checkpoint import run_identity
from controlprefix.training.control import RunControl, run_destination
from controlprefix.training.distillation import with_instruction
from controlprefix.training.initialization import Initialization, Initializations
from controlprefix.training.loop import train
from controlprefix.training.objectives import Objective, TrainingRow
from controlprefix.training.parameterization import parameterize
from controlprefix.training.preparation import (
    Learnable,
    Preparation,
    check_trainable,
    prepare,
)
from controlprefix.training.report import TrainingReport
from controlprefix.training.row_losses import row_losses
from controlprefix.training.settings import (
    ParameterizationName,
    TrainingSettings,
)
from controlprefix.training.shortening import ShorteningReport, shorten
from controlprefix.training.sweep import SweepPoint, SweepReport
from controlprefix.training.trainable import PrefixModel

_log = logging.getLogger("controlprefix")


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
        validation: Sequence[Example],
        num_slots_of: Callable[[PrefixKey], int | None],
        control: RunControl,
    ) -> TrainingReport:
        """Train on examples: see `ControlPrefix.train`.

        Args:
            examples: With default labels.
            settings: Hyperparameters.
            learn, num_slots, init: As in `ControlPrefix.train`.
            control: Run folder, progress, tracker and callbacks.
            validation: Held-out examples; if there are none, the settings hold some out.
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
            validation=validation,
            num_slots_of=num_slots_of,
        )
        return self._train_and_publish(preparation, settings, control)

    def distill(
        self,
        instruction: str,
        key: PrefixKey,
        examples: Sequence[Example],
        settings: TrainingSettings,
        *,
        num_slots: int,
        num_skipped: int,
        control: RunControl,
    ) -> TrainingReport:
        """Train on the predictions of the model with an instruction: see `ControlPrefix.distill`.

        Args:
            instruction: What the teacher reads in front of each prompt.
            key: The prefix to train.
            examples: Prompts with the teacher's completions, which name that prefix.
            settings: Hyperparameters.
            num_slots: Slots of the prefix.
            num_skipped: Prompts that were left out before.
            control: Run folder, progress, tracker and callbacks.
        """
        tokenizer = self._frozen.request_tokenizer
        fitting, teacher_ids = [], dict[int, Sequence[int]]()
        for number, example in enumerate(examples, 1):
            prompt = with_instruction(instruction, example.prompt or "")
            ids = tokenizer.prompt_ids(example.model_copy(update={"prompt": prompt}))
            num_new = len(tokenizer.inner_ids(example.completion))
            if tokenizer.has_room(ids, num_new):
                fitting.append(example)
                teacher_ids[id(example)] = ids
            elif settings.too_long == "refuse":
                raise ContextLengthError(
                    f"instruction, prompt and completion {number} have {len(ids) + num_new} "
                    f"tokens; the model's context has {tokenizer.context_length}; shorten them, or "
                    "give too_long='skip'"
                )
        if not fitting:
            raise TrainingDataError("no prompt fits the model's context with the instruction")
        preparation = prepare(
            fitting,
            self._frozen,
            self._resolver,
            settings,
            learn=cast(Learnable, "attributes" if key.kind == "attribute" else key.kind),
            num_slots=num_slots,
            init={key: instruction},
            complete=lambda example, row: row._replace(teacher=teacher_ids[id(example)]),
        )
        num_skipped += preparation.num_skipped + len(examples) - len(fitting)
        preparation = replace(preparation, num_skipped=num_skipped)
        return self._train_and_publish(preparation, settings, control)

    def trainable(
        self,
        examples: Sequence[Example],
        settings: TrainingSettings,
        *,
        learn: Learnable | Sequence[Learnable] | None,
        num_slots: int | Mapping[Learnable, int],
        init: Initialization | Initializations,
        num_slots_of: Callable[[PrefixKey], int | None],
        prepared: Callable[[Example], Example],
    ) -> PrefixModel:
        """Prefixes at their initialization, for your own loop: `ControlPrefix.trainable`."""
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
        prefixes = parameterize(settings, preparation.initial, preparation.scale)
        self._store.require_writable(preparation.initial)

        def publish(values: Mapping[PrefixKey, Prefix]) -> dict[str, int]:
            details = {"training": {"loop": "own", "parameterization": settings.parameterization}}
            return self._publish(values, details, preparation)

        return PrefixModel(self._frozen, prefixes, publish, prepared)

    def sweep(
        self,
        examples: Sequence[Example],
        *,
        num_slots: Sequence[int],
        parameterizations: Sequence[ParameterizationName],
        learn: Learnable | Sequence[Learnable] | None,
        init: Initialization | Initializations,
        validation: Sequence[Example],
        options: Mapping[str, Any],
        progress: bool,
    ) -> SweepReport:
        """Train with each number of slots and each parameterization, and store nothing.

        Args:
            examples: With default labels.
            num_slots, parameterizations: What to try.
            learn, init, progress: As in `ControlPrefix.train`.
            validation: Held-out examples; if there are none, the options hold some out.
            options: Fields of `TrainingSettings`.

        Raises:
            TrainingDataError: If there is nothing to try, nothing is held out, or `init` has
                prefixes.
        """
        if not num_slots or not parameterizations:
            raise TrainingDataError("nothing to try; give num_slots and parameterizations")
        by_prefix = init.values() if isinstance(init, Mapping) else ()
        if str(init).startswith("stored") or any(isinstance(p, Prefix) for p in by_prefix):
            raise TrainingDataError(
                "a sweep tries numbers of slots, and a stored or given prefix keeps its own; give "
                "another init"
            )
        points = []
        for name in parameterizations:
            for count in num_slots:
                settings = TrainingSettings.from_options({**options, "parameterization": name})
                preparation = prepare(
                    examples,
                    self._frozen,
                    self._resolver,
                    settings,
                    learn=learn,
                    num_slots=count,
                    init=init,
                    validation=validation,
                )
                preparation.require_held_out(settings, "a sweep")
                run = train(
                    self._frozen,
                    preparation.rows,
                    parameterize(settings, preparation.initial, preparation.scale),
                    settings=settings,
                    held_out=preparation.held_out,
                    control=RunControl(progress=progress),
                )
                report = run.report()
                points.append(SweepPoint(name, count, report.best_loss, report.seconds))
        return SweepReport(tuple(points))

    def shorten(
        self, key: PrefixKey, examples: Sequence[Example], *, keep: float, removal_number: int
    ) -> ShorteningReport:
        """Store a prefix with only the slots it needs: see `ControlPrefix.shorten`.

        Args:
            key, examples, keep: As there.
            removal_number: Number of the last entry of the store's audit log from before the rows
                were read.
        """
        stored = self._store.for_model(self._frozen.fingerprint)
        current = stored.version_info(key)
        prefix = self._resolver.get(key, version=current.version).to(device=self._frozen.device)
        prefix.require_joint("shortening, which refits the shares of one softmax")
        rows = self._rows_naming(key, examples)
        query_texts = [QueryText(row.prompt, row.targets, row.frozen_parts) for row in rows]
        attention = observe(self._frozen, prefix, query_texts)

        def loss_with(candidate: Prefix | None) -> float:
            losses = row_losses(self._frozen, rows, {} if candidate is None else {key: candidate})
            return sum(losses) / sum(len(row.targets) for row in rows)

        shorter, report = shorten(prefix, attention, loss_with, keep=keep)
        if shorter is not prefix:
            shorter = replace(shorter, relevance=prefix.relevance)
            if prefix.dial:
                _log.warning("%s has other slots now, so its dial is gone: calibrate it again", key)
        details = {**current.details, "shortened": {"from": prefix.num_slots, "keep": keep}}
        if not shorter.dial:
            details.pop("calibrated", None)  # the dial that it describes
        new = NewVersion(
            key,
            shorter,
            details,
            replaces=current.version,
            dtype=current.storage_dtype,
            sources=() if key.kind == "user" else {r.user for r in examples if r.user is not None},
            derived_from=VersionRef(self._frozen.fingerprint, current.version),
        )
        (version,) = self._store.put([new], removal_number=removal_number)
        return replace(report, version=version)

    def _train_and_publish(
        self,
        preparation: Preparation,
        settings: TrainingSettings,
        control: RunControl,
        objective: Objective | None = None,
    ) -> TrainingReport:
        """Train, and publish all trained prefixes together, or none."""
        self._store.require_writable(preparation.initial)
        if settings.patience is not None:
            preparation.require_held_out(settings, "patience")
        if settings.contrast:
            preparation.warn_without_contrast()
        destination = run_destination(self._store, self._frozen)
        prefixes = parameterize(settings, preparation.initial, preparation.scale)
        objective = objective or Objective(self._frozen, contrast=settings.contrast)
        earlier = control.stored_report(destination)
        stored = self._store.for_model(self._frozen.fingerprint)
        if earlier is not None and self._starts_from(earlier, preparation.initial):
            rows, held_out = preparation.rows, preparation.held_out
            identity = run_identity(settings, rows, held_out, prefixes, objective.identity())
            if (earlier.rows_hash, earlier.settings) == (identity["rows"], settings.to_dict()):
                return earlier
            raise TrainingDataError(
                f"the run in {control.folder} is finished, and training starts from what it "
                "stored; give another folder to train further"
            )
        run = train(
            self._frozen,
            preparation.rows,
            prefixes,
            settings=settings,
            held_out=preparation.held_out,
            control=control,
            objective=objective,
        )
        done = run.report()
        if earlier is not None and earlier.is_same_run(done):
            keys = preparation.initial
            # By one process for all: it stores them if they are not there.
            if in_main_process(lambda: stored.has_versions(earlier.saved, keys)):
                return earlier
        untrained = run.untrained() - objective.other_keys()
        if untrained:
            names = shortened(sorted(map(str, untrained)))
            _log.warning("no step had a row of %s: not stored", names)
        trained = {
            key: prefix
            for key, prefix in run.prefixes.materialize().items()
            if key not in untrained
        }
        report = replace(
            run.report(),
            left_out=preparation.left_out,
            untrained=tuple(sorted(map(str, untrained))),
            num_cut=preparation.num_cut,
            num_skipped=preparation.num_skipped,
            **destination,
        )
        details = {
            "training": {
                "examples": len(preparation.rows),
                # Users by number: their names must not stay where they are forgotten.
                "learned": [str(key) for key in trained if key.kind != "user"],
                "users": sum(key.kind == "user" for key in trained),
                "best_step": report.best_step,
                "best_loss": round(report.best_loss, 4),
                **settings.to_dict(),
            }
        }
        raise_if_stopped()
        report = replace(report, saved=self._publish(trained, details, preparation))
        if control.folder is not None and process_state().is_main_process:
            report.save(control.folder)
        return report

    def _starts_from(self, earlier: TrainingReport, initial: Mapping[PrefixKey, Prefix]) -> bool:
        """Whether a run would start from what a finished run stored: then it is that run."""
        stored = self._store.for_model(self._frozen.fingerprint).fetch(initial)
        return all(
            key in stored
            and stored[key].version == earlier.saved.get(str(key))
            and isinstance(value := stored[key].value, Prefix)
            and value.digest == prefix.digest
            for key, prefix in initial.items()
        )

    def _publish(
        self,
        prefixes: Mapping[PrefixKey, Prefix],
        details: Mapping[str, Any],
        preparation: Preparation,
    ) -> dict[str, int]:
        """Store prefixes, by the first process; returns their versions in all processes.

        What tasks and labels learned from users is marked when one of them is forgotten.
        """
        new = []
        for key, trained in prefixes.items():
            prefix = trained.to(dtype=self._frozen.dtype)
            start = preparation.initial_versions.get(key)
            sources = () if key.kind == "user" else preparation.users
            if start is None or not isinstance(start.value, Prefix):
                new.append(NewVersion(key, prefix, details, sources=sources))
                continue
            if start.value.dial:
                _log.warning("%s has other slots now, so its dial is gone: calibrate it again", key)
            new.append(
                NewVersion(
                    key,
                    replace(prefix, relevance=start.value.relevance),  # its prompts are the same
                    details,
                    sources=sources,
                    derived_from=VersionRef(self._frozen.fingerprint, start.version),
                )
            )
        put = self._store.put_unless_forgotten
        versions = in_main_process(lambda: put(new, preparation.removal_number))
        return {str(key): version for key, version in versions.items()}

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
                place = resolved.request.place(i)
                raise TrainingDataError(f"{place} does not name {key}; give examples of it")
            tokenized = tokenizer.example_ids(resolved.request)
            learned = [(key, part.strength)]
            frozen_parts = list(parts.values())
            row = TrainingRow.from_example(tokenized, tokenizer.end_id, frozen_parts, learned)
            rows.append(row)
        if not rows:
            raise TrainingDataError(f"there are no examples of {key}")
        return rows
