"""Users trained per hour: many in one run, against PEFT one after another, from the same posts.

Each round gives every contender the same authors; NLL on held-out posts is shown beside the time.
The decoder and the authors are those of `authors.py` (DATA as there).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lib.authors import DECODER, Authors, add_author_options
from lib.interleaved import Measures, compare
from lib.results import arguments, save_comparisons


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    add_author_options(parser)
    parser.add_argument("--authors", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="posts of each author")
    options = parser.parse_args(argv)
    authors = Authors(options)
    if DECODER not in authors.cp.names("decoder"):
        authors.train_decoder()

    def measures(figures: dict[str, float]) -> Measures:
        return {"user seconds": figures["seconds per user"], "nll": figures["nll"]}

    def controlprefix(**settings: Any) -> Measures:
        return measures(authors.measure(partial(authors.trained, **settings), options.texts))

    def peft(name: str) -> Measures:
        return measures(authors.measure_peft(name, options.texts))

    contenders: dict[str, Callable[[], Measures]] = {
        "PEFT LoRA r8, 3 epochs": partial(peft, "PEFT LoRA r8"),
        "PEFT prefix tuning, 3 epochs": partial(peft, "PEFT prefix tuning from text"),
        "controlprefix, no decoder, 3 epochs": controlprefix,
        "controlprefix, decoder, 3 epochs": partial(controlprefix, decoder=DECODER, as_codes=False),
        "controlprefix, decoder, 1 epoch": partial(
            controlprefix, decoder=DECODER, as_codes=False, epochs=1
        ),
        "controlprefix, code, 1 epoch": partial(controlprefix, decoder=DECODER, epochs=1),
    }
    case = f"{options.authors} authors, {options.texts} posts each"
    save_comparisons(
        options.results,
        "user-training-speed",
        compare(case, contenders, rounds=options.rounds),
        reference="PEFT LoRA r8, 3 epochs",
        model=authors.cp.frozen_model,
    )


if __name__ == "__main__":
    main()
