"""Stopping long work that another thread asks to end."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from controlprefix.errors import TrainingInterrupted

_must_stop: ContextVar[Callable[[], bool] | None] = ContextVar("must_stop", default=None)


@contextlib.contextmanager
def stoppable(must_stop: Callable[[], bool]) -> Iterator[None]:
    """Stop training inside, with `TrainingInterrupted`, when a function says so.

    Args:
        must_stop: Called after each step.
    """
    token = _must_stop.set(must_stop)
    try:
        yield
    finally:
        _must_stop.reset(token)


def stop_condition() -> Callable[[], bool] | None:
    """The function of the innermost `stoppable`, if there is one."""
    return _must_stop.get()


def raise_if_stopped() -> None:
    """Stop other long work inside `stoppable`, where its function says so.

    Raises:
        TrainingInterrupted: If it does.
    """
    if (must_stop := _must_stop.get()) is not None and must_stop():
        raise TrainingInterrupted("stopped")
