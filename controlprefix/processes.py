"""The processes of a run: those that torchrun or `accelerate launch` started."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from controlprefix.errors import ControlPrefixError

if TYPE_CHECKING:
    from accelerate import PartialState

Result = TypeVar("Result")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def is_main_process() -> bool:
    """Whether this process is the first one, which prints; needs no package."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def process_state() -> "PartialState":
    """The processes as accelerate knows them, and the device of this one.

    Raises:
        ControlPrefixError: If several were started that do not know each other.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Left to itself, accelerate does not connect processes that have no GPU.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=True) if on_cpu else PartialState()
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes == 1 < num_started:
        raise ControlPrefixError(
            f"{num_started} processes were started, but accelerate was set up in this one before "
            "for one alone; call controlprefix first, or set ACCELERATE_USE_CPU=true"
        )
    return state


def in_main_process(action: Callable[[], Result]) -> Result:
    """Run an action in the first of the processes that accelerate started.

    Args:
        action: Such as storing a prefix, once.

    Returns:
        Its result, in every process.

    Raises:
        Exception: What it raises, in every process, so that none waits for ever.
    """
    from accelerate.utils import broadcast_object_list

    state = process_state()
    if state.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            # Others would wait for ever; and not every error can be sent.
            is_own = isinstance(error, ControlPrefixError)
            outcome[1] = error if is_own else RuntimeError(f"{type(error).__name__}: {error}")
            broadcast_object_list(outcome)
            raise
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return cast(Result, result)
