"""RunControl: run folder, resuming, progress display, tracker and callbacks."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, TypeVar

from controlprefix.errors import (
    MissingDependencyError,
    StoreError,
    TrainingDataError,
)
from controlprefix.processes import process_state
from controlprefix.training.report import TrainingReport, is_unfinished

if TYPE_CHECKING:
    from accelerate import Accelerator

    from controlprefix.model import FrozenModel
    from controlprefix.store import PrefixStore


Result = TypeVar("Result")


class StepInfo(NamedTuple):
    """What callbacks get.

    Attributes:
        step, num_steps: Steps done, and in total.
        loss: Loss of the step's batch, nats per target token.
        learning_rate: Learning rate of the step.
        grad_norm: Norm of the gradients before clipping.
        validation_loss: The latest validation loss; None if nothing is held out.
        metrics: Further figures of the step, such as the mean `reward`.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    validation_loss: float | None
    metrics: Mapping[str, float]


Callback = Callable[[StepInfo], None]


class RunOptions(TypedDict, total=False):
    """Keyword arguments of the training functions: the fields of `RunControl`."""

    folder: str | Path | None
    resume: bool
    progress: bool
    accelerator: "Accelerator | None"
    tracker: str | None
    on_step: Callback | None
    on_validation: Callback | None


@dataclass(frozen=True)
class RunControl:
    """Run folder, resuming, progress display, accelerator, tracker and callbacks of a run.

    Attributes:
        folder: Where to write checkpoints, the report, the history and learning curves.
        resume: Continue from the checkpoint in that folder, if there is one.
        progress: Show progress.
        accelerator: Your own `Accelerator`, to set mixed precision or trackers. Processes that
            accelerate started share the work either way.
        tracker: Log to one of accelerate's trackers, such as `tensorboard`.
        on_step, on_validation: Called after each step, and after each validation pass.
    """

    folder: Path | None = None
    resume: bool = False
    progress: bool = True
    accelerator: "Accelerator | None" = None
    tracker: str | None = None
    on_step: Callback | None = None
    on_validation: Callback | None = None

    @classmethod
    def split_off(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The control of a run, and the other options.

        Raises:
            TrainingDataError: If a value is invalid, or as `require_folder`.
            StoreError: As `require_folder`.
        """
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in options.items() if name in names}
        folder = own.get("folder")
        if not isinstance(folder, (str, os.PathLike, type(None))):
            raise TrainingDataError(f"folder is {folder!r}; give a path")
        for name in ("on_step", "on_validation"):
            if own.get(name) is not None and not callable(own[name]):
                raise TrainingDataError(f"{name} is {own[name]!r}; give a function")
        control = cls(**{**own, "folder": None if folder is None else Path(folder)})
        control.require_folder()
        return control, {name: value for name, value in options.items() if name not in names}

    def require_folder(self) -> None:
        """Create the folder, so that a wrong path fails before training.

        Raises:
            TrainingDataError: If there is no folder to resume from, or another run in the folder
                is not finished.
            StoreError: If the folder cannot be created.
        """
        if self.folder is None:
            if self.resume:
                raise TrainingDataError("resume continues from a checkpoint; give its folder")
            return
        if not self.resume and is_unfinished(self.folder):
            raise TrainingDataError(
                f"{self.folder} holds an unfinished run; continue it with resume=True (--resume), "
                "or give another folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the run's folder {self.folder}: {error}") from error

    def stored_report(self, destination: Mapping[str, str]) -> TrainingReport | None:
        """The report of a run to be resumed, if it was finished and stored.

        Args:
            destination: The store, the tenant and the model.
        """
        earlier = TrainingReport.load(self.folder) if self.folder and self.resume else None
        if earlier is None or not earlier.saved:
            return None
        same_place = all(getattr(earlier, name) == value for name, value in destination.items())
        return earlier if same_place else None

    def make_accelerator(self) -> "Accelerator":
        """The accelerator, logging to the tracker if there is one.

        Raises:
            TrainingDataError: If accelerate has no such tracker, both are given, or the accelerator
                accumulates gradients.
            MissingDependencyError: If the tracker's package is not installed.
        """
        from accelerate import Accelerator

        process_state()  # chosen before accelerate chooses it
        own = self.accelerator
        if own is not None and own.gradient_accumulation_steps != 1:
            raise TrainingDataError(
                f"accelerator has gradient_accumulation_steps {own.gradient_accumulation_steps}; "
                "leave it at 1: a step is batch_size rows, in passes of micro_batch_size"
            )
        if self.tracker is None:
            if own is not None and own.log_with and not own.trackers:
                own.init_trackers("controlprefix")
            return own or Accelerator()
        if self.accelerator is not None:
            raise TrainingDataError(
                "tracker and accelerator are both given; set log_with on your Accelerator, or "
                "leave it out"
            )
        try:
            with warnings.catch_warnings():  # it only warns of a package that is missing
                warnings.simplefilter("ignore", UserWarning)
                accelerator = Accelerator(log_with=self.tracker, project_dir=self.folder or ".")
        except (ValueError, ImportError) as error:
            raise TrainingDataError(f"tracker {self.tracker!r}: {error}") from error
        if not accelerator.log_with:
            raise MissingDependencyError(
                f"tracker {self.tracker!r} needs its package: pip install {self.tracker}"
            )
        accelerator.init_trackers("controlprefix")
        return accelerator


def run_destination(store: "PrefixStore", frozen: "FrozenModel") -> dict[str, Any]:
    """Where a run stores its prefixes, as a `TrainingReport` has it."""
    return {
        "store": store.display_name,
        "tenant": store.tenant,
        "model": frozen.geometry.model_name,
    }
