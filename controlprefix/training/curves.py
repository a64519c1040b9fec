"""Learning curves, as JSON and as a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from controlprefix.errors import StoreError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write(
    folder: Path,
    report: "DataclassInstance",
    *,
    losses: Sequence[float],
    validation: Sequence[tuple[int, float]],
    best_step: int,
) -> None:
    """Write `report.json`, and `curves.png` if matplotlib is installed.

    Args:
        folder: Created if it does not exist.
        report: What `report.json` holds.
        losses: Loss per step.
        validation: `(step, validation loss)`.
        best_step: The step that was kept.

    Raises:
        StoreError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        draw(folder / "curves.png", losses, validation, best_step)
    except OSError as error:
        raise StoreError(f"cannot write the learning curves to {folder}: {error}") from error


def draw(
    path: Path,
    losses: Sequence[float],
    validation: Sequence[tuple[int, float]],
    best_step: int,
) -> None:
    """Plot the loss of each step, its running mean, and the validation loss."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return  # installed with the extra `eval`
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", label="batch")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation")
        axes.axvline(best_step, color="tab:orange", linestyle=":", label=f"kept: step {best_step}")
    axes.set(xlabel="step", ylabel="nats per target token")
    axes.legend()
    figure.savefig(path, dpi=120)


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about ten steps, with bias correction."""
    average, weight, means = 0.0, 0.0, []
    for loss in losses:
        average, weight = 0.9 * average + 0.1 * loss, 0.9 * weight + 0.1
        means.append(average / weight)
    return means
