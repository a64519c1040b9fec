"""Folders of runs on the command line, and what Ctrl-C does."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlprefix.cli.common import err, out
from controlprefix.errors import RequestError, TrainingInterrupted, known_names
from controlprefix.processes import is_main_process

if TYPE_CHECKING:
    from controlprefix.training import TrainingReport

RUNS = Path("runs")
_RECORD = "run.json"
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
            help="Continue the run in --folder; left out, the latest one in runs/ of this command "
            "and data.",
        ),
    ] = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a training function, without the folder."""
        return {"resume": self.resume}

    @contextlib.contextmanager
    def recorded(self, command: str, data: Path) -> Iterator[dict[str, Any]]:
        """Print the run's folder, and yield the keyword arguments of a training function.

        After Ctrl-C the process exits as a shell expects. A folder in which nothing was saved is
        removed.

        Args:
            command: The command, so that `--resume` finds its own runs.
            data: What the run is named after.

        Raises:
            RequestError: If there is no run to resume.
        """
        from controlprefix.processes import in_main_process

        about = {"command": command, "data": str(data.resolve())}

        def begin() -> tuple[Path, bool]:
            folder = self.folder or self._default_folder(data, about)
            err.print(f"the run is recorded in {folder}")
            is_new = not folder.exists()
            if not self.resume and not _was_saved(folder):  # an earlier run may not be finished
                _record(folder, about)
            return folder, is_new

        folder, is_new = in_main_process(begin)
        try:
            with exit_when_interrupted():
                yield {"folder": folder, **self.options()}
            if not self.resume and is_main_process():
                _record(folder, about)
        finally:
            if is_main_process():  # without the others, which may have ended
                _clean_up(folder, is_new)

    def _default_folder(self, data: Path, about: dict[str, str]) -> Path:
        name = data.name.split(".")[0] or "run"
        if not self.resume:
            runs = (RUNS / name, *(RUNS / f"{name}-{i}" for i in range(2, 10_000)))
            return next(path for path in runs if not path.exists())
        others = {path: _read_record(path) for path in RUNS.glob("*") if _was_saved(path)}
        own = [path for path, record in others.items() if record == about]
        if own:
            return max(own, key=lambda path: path.stat().st_mtime)
        names = [f"{p} ({r['command']} {Path(r['data']).name})" for p, r in others.items() if r]
        raise RequestError(
            f"there is no run of this command and {data} in {RUNS.absolute()} that was saved; give "
            f"its --folder, or start one without --resume. There are: {known_names('', names)}"
        )


@dataclass(frozen=True)
class RunArguments(UsersRunArguments):
    """Options of run folders, resuming, progress and trackers."""

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

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a training function, without the folder."""
        tracker = {} if self.tracker is None else {"tracker": self.tracker}
        return {**super().options(), **tracker}


def _record(folder: Path, about: dict[str, str]) -> None:
    """Note in a run's folder which command and data it is of."""
    with contextlib.suppress(OSError):  # training says why a folder cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RECORD).write_text(json.dumps(about))


def _clean_up(folder: Path, is_new: bool) -> None:
    """Remove the record of a run in which nothing was saved, and the folder that it made."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {_RECORD}:
            (folder / _RECORD).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()


def _read_record(folder: Path) -> dict[str, str]:
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(record, dict) and {"command", "data"} <= record.keys()
    return record if is_whole else {}


def _was_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _SAVED)


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
        err.print(str(interrupted))
        raise typer.Exit(130) from None
