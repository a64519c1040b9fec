"""Start-up: `import controlprefix`, and `from_pretrained` against transformers' own loading.

Each measurement is a new process; contenders take turns. Both load the model in the dtype that
`from_pretrained` chooses here.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from controlprefix.model.loading import load, packaged_model

from lib.interleaved import Measures, compare
from lib.results import arguments, save_comparisons

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({folder!r})
AutoModelForCausalLM.from_pretrained({folder!r}, dtype={dtype!r}).eval()
"""
CONTROLPREFIX = """
from controlprefix import ControlPrefix
ControlPrefix.from_pretrained("smollm2", store="sqlite://")
"""


def process(code: str) -> Measures:
    """Seconds that a new process spends in some code, without the start of Python."""
    timer = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", timer], capture_output=True, text=True, check=True)
    return {"seconds": float(done.stdout.split()[-1])}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, rounds=7).parse_args(argv)
    comparisons = compare(
        "import",
        {
            "import torch": partial(process, "import torch"),
            "import controlprefix": partial(process, "import controlprefix"),
        },
        rounds=options.rounds,
    )
    folder = str(packaged_model("smollm2"))
    dtype = str(load("smollm2")[0].dtype).removeprefix("torch.")
    comparisons += compare(
        "load smollm2, imports included",
        {
            "transformers": partial(process, TRANSFORMERS.format(folder=folder, dtype=dtype)),
            "controlprefix": partial(process, CONTROLPREFIX),
        },
        rounds=options.rounds,
    )
    notes = [
        f"{row.case}: {row.contender} {row.value:.2f} s, reference {row.reference:.2f} s, "
        f"{row.value - row.reference:+.2f} s"
        for row in comparisons
    ]
    save_comparisons(
        options.results, "loading", comparisons, reference="torch or transformers", notes=notes
    )


if __name__ == "__main__":
    main()
