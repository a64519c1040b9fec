"""Users an hour: many in one run against PEFT one after the other, from the same texts.

The authors, the decoder and the ways are those of `personal.py`, which says where data and
store are: run that first, or this learns the decoder. Each round gives every way the same
authors; what counts is time to a held-out loss, so both stand side by side.

Run it with `python benchmarks/users.py DATA`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from personal import DECODER, Personal
from side_by_side import Measures, compare, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--store", default="sqlite:///personal.db", help="with the decoder")
    parser.add_argument("--work", type=Path, default=Path("personal.run"))
    parser.add_argument("--authors", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="of each author")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    vars(options).update(users=160, posts=16, epochs=2.0, rows=4, words=40)
    personal = Personal(options)
    if DECODER not in personal.cp.names("decoder"):
        personal.decoder()
    # Nobody need write anything here.
    personal.options.texts, num_texts = 0, options.texts

    def ours(**how: Any) -> Measures:
        way = partial(personal.trained, **how)
        return _of_interest(personal.measure(way, num_texts, judged=False))

    def peft(kind: str) -> Measures:
        return _of_interest(personal.peft(kind, num_texts, judged=False))

    contenders: dict[str, Callable[[], Measures]] = {
        "PEFT LoRA r8, 3 passes": partial(peft, "LoRA"),
        "PEFT prefix tuning, 3 passes": partial(peft, "prefix"),
        "ours, own text, 3 passes": ours,
        "ours, decoder, 3 passes": partial(ours, decoder=DECODER, as_codes=False),
        "ours, decoder, 1 pass": partial(ours, decoder=DECODER, as_codes=False, epochs=1),
        "ours, code, 1 pass": partial(ours, decoder=DECODER, epochs=1),
    }
    case = f"{options.authors} authors, {num_texts} posts each"
    found = compare(case, contenders, rounds=options.rounds)
    report("users", found, reference="PEFT LoRA r8, 3 passes")


def _of_interest(found: dict[str, float]) -> Measures:
    return {"user seconds": found["seconds a user"], "nats": found["nats"]}


if __name__ == "__main__":
    main()
