"""Steered against plain generation: same model, same batch, same number of tokens.

Run it with `python benchmarks/generate.py`.
"""

import argparse
from functools import partial

import torch
from side_by_side import Comparison, compare, report

from controlprefix import ControlPrefix, Part, Prefix, assemble
from controlprefix.steering import Steering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--tokens", type=int, default=16, help="generated a row")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    cp = ControlPrefix.from_pretrained("smollm2", store="sqlite://")
    found: list[Comparison] = []
    for num_rows in options.rows:
        # Rows of different lengths, as they come; the pad is on the left.
        texts = [
            "Tell me a long story about a ship" + " and a whale" * (i % 4) for i in range(num_rows)
        ]
        inputs = cp.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        run = partial(
            cp.model.generate,
            **inputs,
            max_new_tokens=options.tokens,
            min_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=cp.tokenizer.eos_token_id,
        )
        for num_slots in options.slots:
            task = _prefix(cp, 16, 0)
            own = [_prefix(cp, num_slots, i + 1) for i in range(num_rows)]
            batches = {
                "own slots": [[Part(prefix)] for prefix in own],
                "shared task of 16 and own": [[Part(task), Part(prefix)] for prefix in own],
            }
            contenders = {"plain": run} | {
                name: partial(_steered, cp, parts, run) for name, parts in batches.items()
            }
            case = f"{num_rows} rows, {num_slots} slots"
            found += compare(case, contenders, repeats=options.repeats)
    report("generate", "python benchmarks/generate.py", "the plain model", found)


def _prefix(cp: ControlPrefix, num_slots: int, seed: int) -> Prefix:
    """Random slots that attention notices but that do not derail the model's numbers."""
    prefix = Prefix.random(cp.geometry, num_slots=num_slots, scale=0.5, seed=seed)
    return prefix.to(dtype=cp.model.dtype)


def _steered(cp: ControlPrefix, parts: list[list[Part]], run: partial[torch.Tensor]) -> None:
    batch = assemble(parts, cp.geometry, dtype=cp.model.dtype)
    with Steering.of(cp.model).attached(batch):
        run()


if __name__ == "__main__":
    main()
