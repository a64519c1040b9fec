"""Compare ways of doing the same work, interleaved in one process, as ratios with their spread.

Machines are shared and noisy, so only a ratio of two runs beside each other means
something: each repeat runs every contender once, in an order that turns, and the
ratios are taken within the repeat.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Comparison:
    """One contender against the first, over the repeats.

    Attributes:
        case, contender: What was compared.
        ratio: Median speed relative to the reference; above 1 is faster.
        low, high: Smallest and largest ratio of the repeats.
        seconds: Median seconds of the contender; absolute times mean little.
    """

    case: str
    contender: str
    ratio: float
    low: float
    high: float
    seconds: float


def compare(
    case: str, contenders: Mapping[str, Callable[[], object]], *, repeats: int = 7
) -> list[Comparison]:
    """Run contenders interleaved, the first being the reference; one warm-up round is dropped."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        turned = names[repeat % len(names) :] + names[: repeat % len(names)]
        for name in turned:
            began = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    reference = seconds[names[0]]
    found = []
    for name in names[1:]:
        ratios = [r / own for r, own in zip(reference, seconds[name], strict=True)]
        found.append(
            Comparison(
                case=case,
                contender=name,
                ratio=round(statistics.median(ratios), 3),
                low=round(min(ratios), 3),
                high=round(max(ratios), 3),
                seconds=round(statistics.median(seconds[name]), 4),
            )
        )
    return found


def report(name: str, command: str, reference: str, found: Sequence[Comparison]) -> None:
    """Print the table and write `docs/results/<name>.json`."""
    table = Table("case", "contender", f"speed against {reference}", "spread", "seconds")
    for one in found:
        spread = f"{one.low:.2f} to {one.high:.2f}"
        table.add_row(one.case, one.contender, f"{one.ratio:.2f}", spread, f"{one.seconds:.3f}")
    Console().print(table)
    record = {
        "command": command,
        "reference": reference,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "comparisons": [asdict(one) for one in found],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
