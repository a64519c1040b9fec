"""Starting: `import controlprefix`, and `from_pretrained` beside transformers' own loading.

Each is a process of its own, one after the other in turn. Run it with
`python benchmarks/load.py`.
"""

import argparse
import subprocess
import sys

from side_by_side import Measures, compare, report

from controlprefix.model.loading import packaged_model

THEIRS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto").eval()
"""
OURS = """
from controlprefix import ControlPrefix
ControlPrefix.from_pretrained("smollm2", store="sqlite://")
"""


def process(code: str) -> Measures:
    """Seconds that a fresh process spends in some code, its own start left out."""
    timer = f"import time; began = time.perf_counter()\n{code}\nprint(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", timer], capture_output=True, text=True, check=True)
    return {"seconds": float(done.stdout.split()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = str(packaged_model("smollm2"))
    found = compare(
        "import",
        {
            "import torch": lambda: process("import torch"),
            "import controlprefix": lambda: process("import controlprefix"),
        },
        rounds=options.rounds,
    )
    found += compare(
        "load smollm2, imports included",
        {
            "transformers": lambda: process(THEIRS.format(folder=folder)),
            "controlprefix": lambda: process(OURS),
        },
        rounds=options.rounds,
    )
    notes = [
        f"{one.case}: {one.contender} {one.value:.2f} s, the other {one.reference:.2f} s, "
        f"{one.value - one.reference:+.2f} s"
        for one in found
    ]
    report("load", found, reference="the other", notes=notes)


if __name__ == "__main__":
    main()
