"""Steered against plain generation: same model, same batch, same number of tokens.

Every round feeds each contender one token at a time, in turn, so that noise of the machine
falls on all alike. `first token` is the pass over the prompt, `next token` one decoding step.
Plain is the model with transformers' cache, as its `generate` has it; steered contenders have
the cache that ours has. `plain, our cache` and `…, transformers' cache` tell the two apart.

Run it with `python benchmarks/generate.py`, `--model llama-1b` for a larger shape.
"""

import argparse
import contextlib
from collections.abc import Callable
from functools import partial

import plots
import torch
from shapes import NAMES, assembled, build, mixed_batch, mixed_parts, prompts
from side_by_side import Comparison, Measures, compare, now, peak_mib, report
from transformers import DynamicCache, PreTrainedModel

from controlprefix import PrefixBatch
from controlprefix.model.kv_cache import growing_cache
from controlprefix.model.steering import Steering

TASK_SLOTS = 16


class Contender:
    """A model with something attached, asked for one token after another."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: PrefixBatch | None,
        rows: int,
        length: int,
        our_cache: bool = True,
    ):
        self.model, self.batch, self.rows, self.our_cache = model, batch, rows, our_cache
        self.given = prompts(rows, length, str(model.device))
        self.cache = DynamicCache(config=model.config)

    def first(self) -> Measures:
        """Time a pass over the prompt, into an empty cache."""
        ours = growing_cache(self.model, self.rows) if self.our_cache else None
        self.cache = ours or DynamicCache(config=self.model.config)
        return {"first token seconds": self._pass(self.given["input_ids"])}

    def next(self) -> Measures:
        """Time one more token."""
        mask = self.given["attention_mask"]
        self.given["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return {"next token seconds": self._pass(self.given["input_ids"][:, -1:])}

    def _pass(self, ids: torch.Tensor) -> float:
        steering = Steering.for_model(self.model)
        attached = steering.attached(self.batch) if self.batch else contextlib.nullcontext()
        mask = self.given["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad(), attached:
            began = now()
            self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                logits_to_keep=1,
            )
            return now() - began


def measure(
    model: PreTrainedModel, rows: int, slots: list[int], options: argparse.Namespace
) -> list[Comparison]:
    """All numbers of own slots beside each other, with and without a shared task."""
    batches: dict[str, PrefixBatch | None] = {"plain": None, "plain, our cache": None}
    for own in slots:
        batches[f"{own} own slots"] = mixed_batch(model, rows, own)
        batches[f"{own} own slots, {TASK_SLOTS} shared"] = mixed_batch(model, rows, own, TASK_SLOTS)
    batches[f"{slots[0]} own slots, transformers' cache"] = mixed_batch(model, rows, slots[0])
    contenders = {
        name: Contender(
            model, batch, rows, options.prompt, name != "plain" and "transformers'" not in name
        )
        for name, batch in batches.items()
    }
    case = f"{rows} rows"
    first: dict[str, Callable[[], Measures]] = {k: c.first for k, c in contenders.items()}
    found = compare(case, first, rounds=options.rounds)
    steps: dict[str, Callable[[], Measures]] = {k: c.next for k, c in contenders.items()}
    return found + compare(case, steps, rounds=options.tokens, warm_up=3)


def memory(model: PreTrainedModel, rows: int, own: int, options: argparse.Namespace) -> list[str]:
    """Peak memory of assembly and decoding, beside what the slots themselves take."""

    def used(own_slots: int, task_slots: int) -> float:
        contender = Contender(model, None, rows, options.prompt)
        contender.first()
        parts = mixed_parts(model, rows, own_slots, task_slots) if own_slots else None

        def work() -> None:
            if parts:
                contender.batch = assembled(model, parts)
            for _ in range(8):
                contender.next()

        return peak_mib(work)

    used(0, 0)  # what the first run leaves in torch's own pools
    geometry = Steering.for_model(model).geometry
    slot = geometry.slot_size("decoder") * model.dtype.itemsize / (1 << 20)
    plain = used(0, 0)
    return [
        f"{rows} rows: {used(own, task) - plain:.0f} MiB more than plain at its peak with {own} "
        f"own slots a row and {task} shared, their assembly included; the slots themselves are "
        f"{(rows * own + task) * slot:.0f} MiB"
        for task in (0, TASK_SLOTS, 16 * TASK_SLOTS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=NAMES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--num-slots", type=int, nargs="+", default=[16, 48, 128])
    parser.add_argument("--prompt", type=int, default=24, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decoding steps measured")
    parser.add_argument("--rounds", type=int, default=5, help="of the pass over the prompt")
    options = parser.parse_args()

    model = build(options.model, options.device)
    run = partial(measure, model, slots=options.num_slots, options=options)
    found = [one for rows in options.rows for one in run(rows)]
    notes = memory(model, max(r for r in options.rows if r <= 32), 48, options)
    name = f"generate-{options.model}-{options.device}"
    if options.prompt != parser.get_default("prompt"):
        name += f"-{options.prompt}"
    path = report(name, found, reference="the plain model", notes=notes)
    plots.decoding(path)


if __name__ == "__main__":
    main()
