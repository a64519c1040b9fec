"""Atomic file writes, progress bars, and optional packages."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from controlprefix.errors import MissingDependencyError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path that takes the place of `path` when the block succeeds.

    Readers see the old file or folder or the new one, never a part of it. After an error
    nothing is left behind.

    Raises:
        OSError: If the temporary file cannot be put in place.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, *, visible: bool = True, note: str = ""
) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar while inside; the block gets `update(num_completed, note)`.

    Args:
        description: Label in front of the bar.
        total: Number of items; None if it is not known.
        visible: Whether to show anything.
        note: Text behind the bar at the start.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task(description, total=total, note=note)

        def update(num_completed: int, note: str) -> None:
            bar.update(task, completed=num_completed, note=note)

        yield update


@contextlib.contextmanager
def requires_extra(extra: str, purpose: str) -> Iterator[None]:
    """Wrap the import of an optional package, and say how to install it if it is missing.

    Args:
        extra: The extra of this package that installs it.
        purpose: What needs it, as the subject of a sentence.

    Raises:
        MissingDependencyError: If the import in the block fails.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {error.name}: pip install 'controlprefix[{extra}]'"
        ) from error
