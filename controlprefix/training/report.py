"""TrainingReport: the result of a run, as files in its folder."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from controlprefix._io import atomic_path
from controlprefix._version import __version__
from controlprefix.errors import MissingDependencyError, StoreError
from controlprefix.reports import (
    few_rows_note,
    figure_of,
    provenance,
    render,
    to_png,
    write_report,
)

REPORT_FILE = "report.json"
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The result of a training run.

    Attributes:
        losses: Loss of each step's batch, nats per token (the end token counted).
        validation: `(step, validation loss)`; step 0 is the initialization.
        best_step: The step whose prefixes were kept.
        learning_rates, grad_norms: One per step; the norm is before clipping.
        metrics: Further figures of each step, such as the mean `reward`.
        num_examples, num_held_out: Rows to train on, and for validation.
        num_rows, num_tokens: Rows and tokens trained on, repeats counted.
        seconds: Wall-clock time.
        num_parameters: Trained parameters.
        settings: All settings by name, the seed among them.
        data_hash: SHA-256 of the settings, the rows and the initialization.
        rows_hash: SHA-256 of the rows.
        saved: Version numbers in the store, such as `{"user 'ana'": 2}`.
        store, tenant, model: Where they were stored, and for which model.
        left_out: What examples name that was neither trained nor stored.
        untrained: What no step had a row of; it was not stored.
        num_cut, num_skipped: Rows that did not fit the model's context and were cut or skipped.
        library_version: Version of controlprefix.
    """

    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int
    learning_rates: tuple[float, ...]
    grad_norms: tuple[float, ...]
    metrics: tuple[Mapping[str, float], ...]
    num_examples: int
    num_held_out: int
    num_rows: int
    num_tokens: int
    seconds: float
    num_parameters: int
    settings: Mapping[str, Any]
    data_hash: str
    rows_hash: str = ""
    saved: Mapping[str, int] = field(default_factory=dict)
    store: str = ""
    tenant: str = ""
    model: str = ""
    left_out: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    num_cut: int = 0
    num_skipped: int = 0
    library_version: str = __version__

    def is_same_run(self, other: "TrainingReport") -> bool:
        """Whether another report is of the same run, such as one that was resumed when done."""
        return (self.data_hash, self.losses) == (other.data_hash, other.losses)

    @property
    def best_loss(self) -> float:
        """The lowest validation loss, or the last batch's loss if nothing was held out."""
        return min((loss for _, loss in self.validation), default=self.losses[-1])

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `history.csv`, and with the extra `eval` a page and its plot.

        These are `report.html` and `curves.png`.

        Raises:
            StoreError: If the folder cannot be written.
        """
        folder = Path(folder)
        content = {**asdict(self), "best_loss": self.best_loss}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / REPORT_FILE) as unfinished:
                unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            with (folder / "history.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                names = ["step", "loss", "learning_rate", "grad_norm", "validation_loss"]
                writer.writerow([*names, *self._metric_names])
                writer.writerows(self._history())
        except OSError as error:
            raise StoreError(f"cannot write the report to {folder}: {error}") from error
        try:
            plot = draw_curves(self)
            write_report(folder, {"curves.png": plot, "report.html": _render(self, plot)})
        except MissingDependencyError:
            return  # the figures are in the other files

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Read a report that `save` wrote; None if there is none that can be read."""
        try:
            content: Any = json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))
            del content["best_loss"]
            content["validation"] = tuple(tuple(item) for item in content["validation"])
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in content.items()
            }
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def _metric_names(self) -> list[str]:
        return list(dict.fromkeys(name for metrics in self.metrics for name in metrics))

    def _history(self) -> list[list[Any]]:
        """A row per step, and one for the validation of the initialization."""
        validation, names = dict(self.validation), self._metric_names
        steps = zip(self.losses, self.learning_rates, self.grad_norms, self.metrics, strict=True)
        rows: list[list[Any]] = [
            [step, *values, validation.get(step, ""), *(metrics.get(name, "") for name in names)]
            for step, (*values, metrics) in enumerate(steps, 1)
        ]
        first = [0, "", "", "", validation.get(0), *("" for _ in names)]
        return [first, *rows] if 0 in validation else rows


def _render(report: TrainingReport, plot: bytes) -> str:
    names = [f"{name} version {version}" for name, version in report.saved.items()]
    title = names[0] if len(names) == 1 else f"{len(names)} prefixes" if names else "a trial"
    validation = dict(report.validation)
    first, best = validation.get(0), validation.get(report.best_step)
    losses = [("trained on, last step", f"{report.losses[-1]:.3f}")]
    if first is not None and best is not None:
        losses.insert(0, ("held out, at the start", f"{first:.3f}"))
        losses.insert(1, (f"held out, step {report.best_step}, which was kept", f"{best:.3f}"))
    words = few_rows_note(report.num_held_out) if report.num_held_out else ""
    if first is not None and best is not None and best >= first:
        words = f"Training did not help: no step beat the start on held-out rows. {words}"
    return render(
        "training.html",
        {"curves": plot},
        title=title,
        report=report,
        in_words=words or ("" if validation else "Nothing was held out: the last step was kept."),
        losses=losses,
        settings=[(name, value) for name, value in report.settings.items() if value is not None],
        about=provenance(
            model=report.model, store=report.store, tenant=report.tenant, prefixes=names
        ),
    )


def draw_curves(report: TrainingReport) -> bytes:
    """A plot of each metric of the steps as PNG; without any, the losses, validation too.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    names = dict.fromkeys(name for metrics in report.metrics for name in metrics)
    curves = {name: [m.get(name, math.nan) for m in report.metrics] for name in names}
    curves = curves or {"nats per target token": list(report.losses)}
    figure = figure_of((7, 1 + 3 * len(curves)))
    steps = range(1, len(report.losses) + 1)
    for axes, (name, values) in zip(
        figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True
    ):
        axes.plot(steps, values, color="0.8", label="batch")
        axes.plot(steps, _running_mean(values), color="tab:blue", label="running mean")
        if report.validation and not names:
            axes.plot(
                *zip(*report.validation, strict=True), "o-", color="tab:orange", label="validation"
            )
            best = report.best_step
            axes.axvline(best, color="tab:orange", linestyle=":", label=f"kept: step {best}")
        axes.set(xlabel="step", ylabel=name)
        axes.legend()
    return to_png(figure)


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about ten steps, with bias correction."""
    average, weight, means = 0.0, 0.0, []
    for loss in losses:
        average, weight = 0.9 * average + 0.1 * loss, 0.9 * weight + 0.1
        means.append(average / weight)
    return means


def identity_hash(identity: Mapping[str, Any]) -> str:
    """A hash of a run's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder has the checkpoint of a run that is not the one of its report."""
    try:
        with safe_open(folder / CHECKPOINT_FILE, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["controlprefix"])
        identity, step = identity_hash(saved["identity"]), int(saved["progress"]["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False  # there is none that could be resumed
    report = TrainingReport.load(folder)
    return report is None or report.data_hash != identity or len(report.losses) < step
