"""Sweeps: validation losses over numbers of slots and parameterizations."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from controlprefix.errors import StoreError
from controlprefix.training.settings import ParameterizationName

_TOLERANCE = 0.01  # nats per token


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        parameterization, num_slots: What was tried.
        loss: Validation loss, nats per target token.
        seconds: Wall-clock time.
    """

    parameterization: ParameterizationName
    num_slots: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SweepReport:
    """All runs of a sweep, in the order they were made."""

    points: tuple[SweepPoint, ...]

    @property
    def best(self) -> SweepPoint:
        """The run with the fewest slots within 0.01 nats of the lowest loss."""
        max_loss = min(point.loss for point in self.points) + _TOLERANCE
        return min(
            (point for point in self.points if point.loss <= max_loss),
            key=lambda point: (point.num_slots, point.loss),
        )

    def save(self, folder: str | Path) -> None:
        """Write `sweep.json`, and `sweep.png` if matplotlib is installed.

        Raises:
            StoreError: If the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "sweep.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
            self._draw(folder / "sweep.png")
        except OSError as error:
            raise StoreError(f"cannot write the sweep to {folder}: {error}") from error

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            return  # installed with the extra `eval`
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(point.parameterization for point in self.points):
            line = sorted(
                (point.num_slots, point.loss)
                for point in self.points
                if point.parameterization == name
            )
            axes.plot(*zip(*line, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="slots", ylabel="validation loss, nats per target token")
        axes.legend()
        figure.savefig(path, dpi=120)
