"""Compare implementations of the same work, interleaved in one process, as ratios with spread.

Machines are shared and noisy, so only the ratio of two neighbouring runs is meaningful: each
round runs every contender once, in rotated order, and ratios are computed within the round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Measures = Mapping[str, float]  # measure, such as "seconds" or "peak MiB" -> value


@dataclass(frozen=True)
class Comparison:
    """One contender against the reference, over all rounds.

    Attributes:
        case, contender, measure: What was compared.
        ratio: Median over rounds of contender / reference; for a measure in seconds the
            inverse, so that above 1 is faster.
        low, high: Quartiles of that ratio.
        reference, value: Medians of both, absolute; not comparable between machines.
        rounds: Number of rounds.
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

    def __str__(self) -> str:
        digits = 1 if self.ratio >= 3 else 2
        low, high = (f"{value:.{digits}f}" for value in (self.low, self.high))
        return f"{self.ratio:.{digits}f} ({low} to {high})"


def timed(work: Callable[[], object]) -> Callable[[], Measures]:
    """A contender with one measure: how long the work takes."""

    def run() -> Measures:
        start = now()
        work()
        return {"seconds": now() - start}

    return run


def now() -> float:
    """Seconds on a clock, after all work queued on the device has finished."""
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
    """Run contenders interleaved, and compare each with the first one.

    Args:
        case: Name of what is compared.
        contenders: Name -> a function that does the work once and returns its measures.
        rounds: Rounds that count.
        warm_up: Rounds before them.
    """
    names = list(contenders)
    measures: dict[str, list[Measures]] = {name: [] for name in names}
    for i in range(-warm_up, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            values = contenders[name]()
            if i >= 0:
                measures[name].append(values)
    reference = measures[names[0]]
    return [
        _comparison(
            case,
            name,
            measure,
            [values[measure] for values in reference],
            [values[measure] for values in measures[name]],
        )
        for name in names[1:]
        for measure in measures[name][0]
        if measure in reference[0]
    ]


def _comparison(
    case: str, name: str, measure: str, reference: Sequence[float], values: Sequence[float]
) -> Comparison:
    is_time = measure.endswith("seconds")
    ratios = [
        (a / b if is_time else b / a) if a and b else float("nan")
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
    """Peak memory while the work runs, less what was in use before it, in MiB.

    On a GPU what torch allocates, else the resident memory that Linux reports.
    """
    # Imported here, since the library is not installed everywhere that this file is used.
    from controlprefix.evaluation.comparison.costs import Costs

    costs = Costs()
    with costs.watched():
        work()
    return costs.peak_mib
