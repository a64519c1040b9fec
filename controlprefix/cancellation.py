"""Stopping long work that another thread, or Ctrl-C, asks to end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

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


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C until the block asks for it, so that no step is left half done.

    A second Ctrl-C interrupts at once. In other threads than the main one, nothing is changed.
    Inside `stoppable`, its function decides instead.

    Yields:
        A function that tells whether to stop.
    """
    if (must_stop := stop_condition()) is not None:
        yield must_stop
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()
    earlier = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, earlier)

    if earlier is not signal.default_int_handler:  # somebody else handles it
        yield lambda: False
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, earlier)
