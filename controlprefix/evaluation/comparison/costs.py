"""Time and memory of a piece of work."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import torch


class Costs:
    """Seconds, and peak memory in MiB beyond what was in use before, of work so far.

    On a GPU the memory is what torch allocates, on Linux the resident memory; elsewhere 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_mib = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Add the time of a block, and its memory if it is the largest."""
        gc.collect()
        on_gpu = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / (1 << 20)
        else:
            with contextlib.suppress(AttributeError, OSError):  # return freed memory to the system
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = _status_mib("VmRSS")
        start = now()
        yield
        self.seconds += now() - start
        peak = torch.cuda.max_memory_allocated() / (1 << 20) if on_gpu else _status_mib("VmHWM")
        self.peak_mib = max(self.peak_mib, peak - before)


def now() -> float:
    """Seconds on a clock, after all work queued on the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _status_mib(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if name in line), 0.0)
