"""What users' prefixes give away, and what giving away less costs.

The authors and the decoder are those of `personal.py`: run that first. Run this with
`python benchmarks/leaks.py DATA`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from personal import DECODER, SLOTS, Personal
from rich.console import Console
from side_by_side import record

WAYS: dict[str, dict[str, Any] | None] = {
    "enrolled, code": None,
    "code, 3 passes": {"decoder": DECODER},
    "all slots, from the decoder, 1 pass": {"decoder": DECODER, "as_codes": False, "epochs": 1},
    "all slots, from the decoder, 3 passes": {"decoder": DECODER, "as_codes": False},
    "all slots, from the decoder, early end": {
        "decoder": DECODER,
        "as_codes": False,
        "epochs": 10,
        "validation": 0.2,
    },
    "all slots, from the decoder, 10 passes": {"decoder": DECODER, "as_codes": False, "epochs": 10},
    "all slots, from own text, 3 passes": {},
}
COLUMNS = (
    ("gain", "gain", 3),
    ("membership_auc", "membership", 2),
    ("extraction_rate", "word for word", 2),
    ("exposure_bits", "exposure", 1),
)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = " | ".join(title for _, title, _ in COLUMNS)
    rows = [
        f"| {way} | {' | '.join(f'{found[key]:.{d}f}' for key, _, d in COLUMNS)} |"
        for way, found in results["ways"].items()
    ]
    return "\n\n".join(
        [
            "# What a user's prefix gives away",
            f"Means over {results['authors']} bloggers, {results['texts']} posts each; "
            f"SmolLM2-135M in bfloat16, {SLOTS} slots. Written by `{results['command']}` with "
            "`leaks.json` beside it.",
            "**gain**: nats per token taken off the author's newest posts. **membership**: how "
            "often a post it was learned from is told from a newer one by its likelihood (0.5: "
            "never; the older posts of an author are a little more alike too). **word for word**: "
            "share of the posts continued exactly for 16 tokens. **exposure**: bits a planted "
            "number is told by, of 8; 1.4 is what chance gives in the mean.",
            "\n".join([f"| way | {header} |", "| --- |" + " --- |" * len(COLUMNS), *rows]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--store", default="sqlite:///personal.db", help="with the decoder")
    parser.add_argument("--authors", type=int, default=4)
    parser.add_argument("--texts", type=int, default=16, help="of each author")
    parser.add_argument("--num-canaries", type=int, default=2, help="planted among each one's")
    options = parser.parse_args()
    vars(options).update(users=160, posts=16, epochs=2.0, rows=8, words=40, work=None)
    personal = Personal(options)
    cp = personal.cp
    results: dict[str, Any] = {"authors": options.authors, "texts": options.texts, "ways": {}}
    for way, how in WAYS.items():
        reports = []
        for one in personal.authors:
            given = personal.given[one][: options.texts]
            if how is None:
                cp.enroll(one, given, decoder=DECODER)
            else:
                personal.trained({one: given}, **how)
            audit = cp.audit_user(one, given, personal.test[one], num_canaries=options.num_canaries)
            reports.append(asdict(audit))
            cp.forget_user(one)
        results["ways"][way] = {key: mean(r[key] for r in reports) for key, _, _ in COLUMNS}
        Console(width=160).print(way, results["ways"][way])
        path = record("leaks", results)
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())) + "\n")


if __name__ == "__main__":
    main()
