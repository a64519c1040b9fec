"""Learning curves, as JSON and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from controlprefix.errors import StoreError


def write(folder: Path, report: Any) -> None:
    """Write `report.json`, and `curves.png` where matplotlib is installed.

    Raises:
        StoreError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        draw(folder / "curves.png", report.losses, report.validation, report.best_step)
    except OSError as error:
        raise StoreError(f"cannot write the learning curves to {folder}: {error}") from error


def draw(
    path: Path,
    losses: Sequence[float],
    validation: Sequence[tuple[int, float]],
    best_step: int,
) -> None:
    """The loss of each step's batch, its running mean, and of the held-out rows."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return  # installed with the extra `eval`
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", label="each batch")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="held out")
        axes.axvline(best_step, color="tab:orange", linestyle=":", label=f"kept: step {best_step}")
    axes.set(xlabel="step", ylabel="nats a target token")
    axes.legend()
    figure.savefig(path, dpi=120)


def _smooth(losses: Sequence[float]) -> list[float]:
    """An exponential mean that forgets over ten steps, without the pull of its beginning."""
    kept, weight, found = 0.0, 0.0, []
    for loss in losses:
        kept, weight = 0.9 * kept + 0.1 * loss, 0.9 * weight + 0.1
        found.append(kept / weight)
    return found
