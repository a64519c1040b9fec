"""The command line: `controlprefix --help`."""

import os
import sys

from controlprefix.cli import (  # noqa: F401 (they add commands)
    capacity,
    compare,
    data,
    evaluate,
    generate,
    jobs,
    preferences,
    prefixes,
    reinforce,
    serve,
    store,
    train,
    users,
)
from controlprefix.cli.common import app, err
from controlprefix.cli.config import apply_config
from controlprefix.errors import ControlPrefixError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; an error is one line on standard error, and exit code 2."""
    try:
        apply_config()
        app()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ControlPrefixError as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        err.print(f"error: {error}{notes}")
        sys.exit(2)
