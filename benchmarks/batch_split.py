"""adapters' BatchSplit against its own plain model: a prefix a row, as adapters does it.

adapters pins an older transformers, so this runs in an environment of its own, which
`make bench` sets up in `.venv-adapters`: `python benchmarks/batch_split.py FOLDER`, where
FOLDER holds the packaged model (`controlprefix.model.loading.packaged_model`).
"""

import argparse
from collections.abc import Callable
from functools import partial

import adapters
import torch
from adapters import PrefixTuningConfig
from adapters.composition import BatchSplit
from side_by_side import Measures, compare, now, report
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--people", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()  # it notes at each step that plain runs have no adapter
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).eval()
    adapters.init(model)
    names = [f"person{i}" for i in range(max(options.people))]
    for name in names:
        config = PrefixTuningConfig(prefix_length=options.num_slots, bottleneck_size=512)
        model.add_adapter(name, config=config)
    model.to(torch.bfloat16)

    def run(rows: int, people: list[str]) -> Measures:
        model.active_adapters = BatchSplit(*people, batch_sizes=[1] * rows) if people else None
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 40_000, (rows, 24), generator=generator)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        began = now()
        with torch.no_grad():
            model.generate(
                **given,
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return {"all requests seconds": now() - began}

    found = []
    for rows in options.people:
        both: dict[str, Callable[[], Measures]] = {
            "plain": partial(run, rows, []),
            "adapters BatchSplit": partial(run, rows, names[:rows]),
        }
        case = f"{rows} people, {options.tokens} tokens each"
        found += compare(case, both, rounds=options.rounds)
    report("batch-split", found, reference="its own plain model")


if __name__ == "__main__":
    main()
