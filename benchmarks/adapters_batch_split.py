"""A prefix per row with BatchSplit of adapters, against the plain model of that environment.

adapters needs an older transformers, so this runs in an environment of its own, which
`make bench` sets up in `.venv-adapters`. FOLDER holds the packaged model
(`controlprefix.model.loading.packaged_model`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import adapters
import torch
from adapters import PrefixTuningConfig
from adapters.composition import BatchSplit
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lib.interleaved import Comparison, Measures, compare, now
from lib.results import arguments, save_comparisons


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--users", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args(argv)
    logging.set_verbosity_error()  # else it warns at each step that plain runs have no adapter
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    adapters.init(model)
    names = [f"user{i}" for i in range(max(options.users))]
    for name in names:
        # Keys and values themselves, as a trained prefix is deployed.
        config = PrefixTuningConfig(prefix_length=options.num_slots, flat=True)
        model.add_adapter(name, config=config)
    model.to(dtype)

    def run(rows: int, users: Sequence[str]) -> Measures:
        model.active_adapters = BatchSplit(*users, batch_sizes=[1] * rows) if users else None
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 40_000, (rows, 24), generator=generator)
        start = now()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return {"all requests seconds": now() - start}

    comparisons: list[Comparison] = []
    for rows in options.users:
        pair: dict[str, Callable[[], Measures]] = {
            "plain": partial(run, rows, ()),
            "adapters BatchSplit": partial(run, rows, names[:rows]),
        }
        case = f"{rows} users, {options.tokens} tokens each"
        comparisons += compare(case, pair, rounds=options.rounds)
    save_comparisons(
        options.results, "adapters-batch-split", comparisons, reference="its plain model"
    )


if __name__ == "__main__":
    main()
