"""Folders of runs on the command line, and what Ctrl-C does."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlprefix.cli.common import err, out
from controlprefix.errors import RequestError, TrainingInterrupted

if TYPE_CHECKING:
    from controlprefix.training import TrainingReport

RUNS = Path("runs")
_SAVED = ("checkpoint.safetensors", "finished.jsonl", "report.json")  # one is in a run that began


@dataclass(frozen=True)
class UsersRunArguments:
    """Where a run over many users is recorded."""

    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that records which users are finished. Default: a new one in runs/, "
            "named after the data."
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --folder; left out, the latest one in runs/ of this data.",
        ),
    ] = False

    def options(self, data: Path) -> dict[str, Any]:
        """Keyword arguments of a training function, after the folder is printed.

        Args:
            data: What the run is named after.

        Raises:
            RequestError: If there is no run to resume.
        """
        folder = self.folder or self._default_folder(data)
        err.print(f"the run is recorded in {folder}")
        return {"folder": folder, "resume": self.resume}

    def _default_folder(self, data: Path) -> Path:
        name = data.name.split(".")[0] or "run"
        runs = [RUNS / name, *(RUNS / f"{name}-{i}" for i in range(2, 10_000))]
        if not self.resume:
            return next(path for path in runs if not path.exists())
        existing = [path for path in runs if any((path / file).is_file() for file in _SAVED)]
        if not existing:
            raise RequestError(
                f"there is no run of {data} in {RUNS.absolute()} that was saved; give its "
                "--folder, or start one without --resume"
            )
        return max(existing, key=lambda path: path.stat().st_mtime)


@dataclass(frozen=True)
class RunArguments(UsersRunArguments):
    """Where a run is recorded, and who watches it."""

    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run's checkpoint, report and curves. Default: a new one in runs/, "
            "named after the data."
        ),
    ] = None
    tracker: Annotated[
        str | None, typer.Option(help="Log to one of accelerate's trackers, such as tensorboard.")
    ] = None

    def options(self, data: Path) -> dict[str, Any]:
        """Keyword arguments of a training function, after the folder is printed."""
        tracker = {} if self.tracker is None else {"tracker": self.tracker}
        return {**super().options(data), **tracker}


def print_saved(report: "TrainingReport") -> None:
    """Print what a run stored."""
    for name, version in report.saved.items():
        out.print(f"stored {name} version {version}")


@contextlib.contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """Print what stands after Ctrl-C, and exit as a shell expects."""
    try:
        yield
    except TrainingInterrupted as interrupted:
        err.print(str(interrupted).replace("resume continues", "--resume continues"))
        raise typer.Exit(130) from None
