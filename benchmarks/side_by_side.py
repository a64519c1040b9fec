"""Compare ways of doing the same work, interleaved in one process, as ratios with their spread.

Machines are shared and noisy, so only a ratio of two runs beside each other means
something: each round runs every contender once, in an order that turns, and ratios are
taken within the round.
"""

import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "docs" / "results"

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """One contender against the reference, over the rounds.

    Attributes:
        case, contender, measure: What was compared.
        ratio: Median of (the contender's / the reference's); for seconds, the other way
            round, so that above 1 is faster.
        low, high: Its quartiles.
        reference, value: Medians of both, absolute: on a shared machine they mean little.
        rounds: How often.
    """

    case: str
    contender: str
    measure: str
    ratio: float
    low: float
    high: float
    reference: float
    value: float
    rounds: int


def timed(work: Callable[[], object]) -> Callable[[], Measures]:
    """A contender whose one measure is how long it takes."""

    def run() -> Measures:
        began = now()
        work()
        return {"seconds": now() - began}

    return run


def now() -> float:
    """Seconds on a clock, when all work given to the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    case: str,
    contenders: Mapping[str, Callable[[], Measures]],
    *,
    rounds: int,
    warm_up: int = 1,
) -> list[Comparison]:
    """Run contenders interleaved, the first being the reference, and compare each measure."""
    names = list(contenders)
    measured: dict[str, list[Measures]] = {name: [] for name in names}
    for i in range(-warm_up, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            found = contenders[name]()
            if i >= 0:
                measured[name].append(found)
    reference = measured[names[0]]
    return [
        _comparison(
            case,
            name,
            measure,
            [one[measure] for one in reference],
            [one[measure] for one in measured[name]],
        )
        for name in names[1:]
        for measure in measured[name][0]
        if measure in reference[0]
    ]


def _comparison(
    case: str, name: str, measure: str, reference: Sequence[float], values: Sequence[float]
) -> Comparison:
    faster = measure.endswith("seconds")
    ratios = [
        (a / b if faster else b / a) if a and b else float("nan")
        for a, b in zip(reference, values, strict=True)
    ]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Comparison(
        case=case,
        contender=name,
        measure=measure,
        ratio=round(statistics.median(ratios), 3),
        low=round(quartiles[0], 3),
        high=round(quartiles[2], 3),
        reference=round(statistics.median(reference), 5),
        value=round(statistics.median(values), 5),
        rounds=len(ratios),
    )


def peak_mib(work: Callable[[], object]) -> float:
    """How much more memory is used at most while the work runs than before it, in MiB.

    On a GPU what torch allocates, else what Linux counts as resident.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / (1 << 20)
    with contextlib.suppress(AttributeError):  # glibc: what was freed goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = _status_mib("VmRSS")
    work()
    return _status_mib("VmHWM") - resident


def _status_mib(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) / 1024


def report(
    name: str, found: Sequence[Comparison], *, reference: str, notes: Sequence[str] = ()
) -> Path:
    """Print the table and write `docs/results/<name>.json`; returns where."""
    table = Table("case", "contender", "measure", f"against {reference}", "quartiles", "value")
    for one in found:
        spread = f"{one.low:.2f} to {one.high:.2f}"
        table.add_row(
            one.case, one.contender, one.measure, f"{one.ratio:.2f}", spread, f"{one.value:.4g}"
        )
    Console(width=140).print(table)
    for note in notes:
        Console().print(note)
    return record(
        name,
        {"reference": reference, "notes": list(notes), "comparisons": [asdict(o) for o in found]},
    )


def record(name: str, results: Mapping[str, object]) -> Path:
    """Write results beside the command and the machine they were found with."""
    script = Path(sys.argv[0]).resolve()
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    command = command.replace(str(Path.home()), "~")
    about = {
        "command": command,
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, **results}, indent=2) + "\n")
    return path


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
