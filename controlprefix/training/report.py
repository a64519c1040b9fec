"""TrainingReport: the result of a run, as files in its folder."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from controlprefix._io import atomic_path
from controlprefix._version import __version__
from controlprefix.errors import StoreError

REPORT_FILE = "report.json"


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
    saved: Mapping[str, int] = field(default_factory=dict)
    store: str = ""
    tenant: str = ""
    model: str = ""
    left_out: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    num_cut: int = 0
    num_skipped: int = 0
    library_version: str = __version__

    @property
    def best_loss(self) -> float:
        """The lowest validation loss, or the last batch's loss if nothing was held out."""
        return min((loss for _, loss in self.validation), default=self.losses[-1])

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `history.csv`, and `curves.png` if matplotlib is installed.

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
            draw_curves(folder / "curves.png", self)
        except OSError as error:
            raise StoreError(f"cannot write the report to {folder}: {error}") from error

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


def draw_curves(path: Path, report: TrainingReport) -> None:
    """Plot each metric of the steps; without any, the losses, and the validation loss."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return  # installed with the extra `eval`
    names = dict.fromkeys(name for metrics in report.metrics for name in metrics)
    curves = {name: [m.get(name, math.nan) for m in report.metrics] for name in names}
    curves = curves or {"nats per target token": list(report.losses)}
    figure = Figure(figsize=(7, 1 + 3 * len(curves)), layout="constrained")
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
    figure.savefig(path, dpi=120)


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about ten steps, with bias correction."""
    average, weight, means = 0.0, 0.0, []
    for loss in losses:
        average, weight = 0.9 * average + 0.1 * loss, 0.9 * weight + 0.1
        means.append(average / weight)
    return means
