"""Steered against plain generation: same model, same batch, same number of tokens.

In each round every contender decodes one token, so that noise of the machine affects all alike.
`first token` is the forward pass over the prompt, `next token` one decode step. The plain model
has transformers' cache, steered ones the cache of this library; `plain, growing cache` and
`…, transformers' cache` separate the effect of the cache.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from controlprefix import PrefixBatch
from controlprefix.model.kv_cache import growing_cache
from controlprefix.model.steering import Steering

from lib import plots
from lib.interleaved import Comparison, Measures, compare, now, peak_mib
from lib.models import (
    add_model_options,
    assembled,
    load_from,
    mixed_batch,
    mixed_parts,
    random_prompts,
)
from lib.results import arguments, save_comparisons

TASK_SLOTS = 16


class Decoder:
    """A model with a prefix batch attached, which decodes one token per call."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: PrefixBatch | None,
        rows: int,
        length: int,
        growing: bool = True,
    ) -> None:
        self.model, self.batch, self.rows, self.growing = model, batch, rows, growing
        self.inputs = random_prompts(rows, length, str(model.device))
        self.cache = DynamicCache(config=model.config)

    def first(self) -> Measures:
        """Time a pass over the prompt into an empty cache."""
        num_slots = self.batch.num_slots if self.batch else 0
        cache = growing_cache(self.model, self.rows, num_slots) if self.growing else None
        self.cache = cache or DynamicCache(config=self.model.config)
        return {"first token seconds": self._forward(self.inputs["input_ids"])}

    def next(self) -> Measures:
        """Time one decode step."""
        mask = self.inputs["attention_mask"]
        self.inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return {"next token seconds": self._forward(self.inputs["input_ids"][:, -1:])}

    def _forward(self, ids: torch.Tensor) -> float:
        steering = Steering.for_model(self.model)
        attached = steering.attached(self.batch) if self.batch else contextlib.nullcontext()
        mask = self.inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad(), attached:
            start = now()
            self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                logits_to_keep=1,
            )
            return now() - start


def measure(model: PreTrainedModel, rows: int, options: argparse.Namespace) -> list[Comparison]:
    """All numbers of own slots side by side, with and without a shared task."""
    num_slots = options.num_slots
    batches: dict[str, PrefixBatch | None] = {"plain": None, "plain, growing cache": None}
    for own in num_slots:
        batches[f"{own} own slots"] = mixed_batch(model, rows, own)
        batches[f"{own} own slots, {TASK_SLOTS} shared"] = mixed_batch(model, rows, own, TASK_SLOTS)
    slots = num_slots[0]
    batches[f"{slots} own slots, transformers' cache"] = batches[f"{slots} own slots"]
    decoders = {
        name: Decoder(
            model, batch, rows, options.prompt, name != "plain" and "transformers'" not in name
        )
        for name, batch in batches.items()
    }
    case = f"{rows} rows" if rows > 1 else "1 row"
    first: dict[str, Callable[[], Measures]] = {k: d.first for k, d in decoders.items()}
    comparisons = compare(case, first, rounds=options.rounds)
    steps: dict[str, Callable[[], Measures]] = {k: d.next for k, d in decoders.items()}
    return comparisons + compare(case, steps, rounds=options.tokens, warm_up=3)


def memory(model: PreTrainedModel, rows: int, own: int, length: int) -> list[str]:
    """Peak memory of assembly and decoding, beside the size of the slots themselves."""

    def peak(own_slots: int, task_slots: int) -> float:
        decoder = Decoder(model, None, rows, length)
        decoder.first()
        parts = mixed_parts(model, rows, own_slots, task_slots) if own_slots else None

        def work() -> None:
            if parts:
                decoder.batch = assembled(model, parts)
            for _ in range(8):
                decoder.next()

        return peak_mib(work)

    peak(0, 0)  # fills torch's own pools
    geometry = Steering.for_model(model).geometry
    slot_mib = geometry.slot_size("decoder") * model.dtype.itemsize / (1 << 20)
    plain = peak(0, 0)
    return [
        f"{rows} rows: peak memory {peak(own, task) - plain:.0f} MiB above plain with {own} own "
        f"slots per row and {task} shared, assembly included; the slots themselves take "
        f"{(rows * own + task) * slot_mib:.0f} MiB"
        for task in (0, TASK_SLOTS, 16 * TASK_SLOTS)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=5)
    add_model_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--num-slots", type=int, nargs="+", default=[16, 48, 128])
    parser.add_argument("--prompt", type=int, default=24, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps measured")
    options = parser.parse_args(argv)

    frozen = load_from(options)
    comparisons = [row for rows in options.rows for row in measure(frozen.model, rows, options)]
    notes = memory(frozen.model, max(r for r in options.rows if r <= 32), 48, options.prompt)
    name = f"decoding-{options.model}-{options.device}"
    if options.prompt != parser.get_default("prompt"):
        name += f"-{options.prompt}"
    path = save_comparisons(
        options.results,
        name,
        comparisons,
        reference="the plain model",
        model=frozen,
        notes=notes,
    )
    plots.decoding(path)


if __name__ == "__main__":
    main()
