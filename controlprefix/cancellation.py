"""Stopping long work that another thread, or Ctrl-C, asks to end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from controlprefix.errors import TrainingInterrupted

Condition = Callable[[], bool]

# Whether to stop, asked after a training step, and asked during other work.
_conditions: ContextVar[tuple[Condition, Condition] | None] = ContextVar("conditions", default=None)


@contextlib.contextmanager
def stoppable(must_stop: Condition, after_step: Condition | None = None) -> Iterator[None]:
    """Stop work inside, with `TrainingInterrupted`, when a function says so.

    Args:
        must_stop: Asked now and then.
        after_step: Asked in its place after each training step.
    """
    token = _conditions.set((after_step or must_stop, must_stop))
    try:
        yield
    finally:
        _conditions.reset(token)


def raise_if_stopped() -> None:
    """Stop work inside `stoppable`, where its function says so.

    Raises:
        TrainingInterrupted: If it does.
    """
    if (conditions := _conditions.get()) is not None and conditions[1]():
        raise TrainingInterrupted("stopped")


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C until the block asks for it, so that no step is left half done.

    A second Ctrl-C interrupts at once. In other threads than the main one, nothing is changed.
    Inside `stoppable`, its function decides instead.

    Yields:
        A function that tells whether to stop.
    """
    if (conditions := _conditions.get()) is not None:
        yield conditions[0]
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
