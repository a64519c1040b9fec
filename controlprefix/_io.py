"""Atomic file writes, progress bars, and optional packages."""

import contextlib
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from controlprefix.errors import MissingDependencyError

_SECONDS_PER_LINE = 10.0


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
    description: str, total: int | None, *, visible: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Show progress on standard error while inside: a bar, or a line now and then in a log.

    Args:
        description: Label in front.
        total: Number of items; None if it is not known.
        visible: Whether to show anything.

    Yields:
        `update(num_completed, note)`.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if visible and not (console.is_terminal or console.is_jupyter):
        yield _progress_lines(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not visible) as bar:
        task = bar.add_task(description, total=total, note="")

        def update(num_completed: int, note: str) -> None:
            bar.update(task, completed=num_completed, note=note)

        yield update


def _progress_lines(description: str, total: int | None) -> Callable[[int, str], None]:
    """An `update` that writes a line to standard error, at most every ten seconds."""
    last = -_SECONDS_PER_LINE

    def update(num_completed: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if num_completed != total and now - last < _SECONDS_PER_LINE:
            return
        last = now
        count = str(num_completed) if total is None else f"{num_completed}/{total}"
        print(f"{description} {count} {note}".rstrip(), file=sys.stderr, flush=True)

    return update


def finite(value: Any) -> Any:
    """A nested value with None for NaN and infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
