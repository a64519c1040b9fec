"""What a user would do instead, for requests of different people waiting at once.

- PEFT prefix tuning runs one adapter at a time, so one request after the other.
- PEFT LoRA can mix adapters in a batch.
- A person's texts can stand in the prompt. Only here do outputs differ in quality, and which
  is better depends on the texts; here it is speed and K/V that are compared.
- adapters' BatchSplit needs an older transformers: `benchmarks/batch_split.py`.

Greedy decoding, all rows as long as each other; random prefixes. Run it with
`python benchmarks/peers.py`.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import plots
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
)
from shapes import NAMES, build, mixed_batch, prompts
from side_by_side import Comparison, Measures, compare, now, report
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from controlprefix.model.kv_cache import growing_cache
from controlprefix.model.steering import Steering

PEOPLE_SLOTS = 16


class FirstToken(LogitsProcessor):
    """Notes when the first new token's logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or now()
        return scores


def generate(
    model: PreTrainedModel, given: dict[str, torch.Tensor], tokens: int, **more: object
) -> torch.Tensor:
    """Greedy tokens, always as many."""
    return model.generate(  # type: ignore[operator]  # stubs: Tensor | Module
        **given,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **more,
    )


def steered(model: PreTrainedModel, rows: int, tokens: int) -> Measures:
    """All requests in one batch, assembly included."""
    first = FirstToken()
    given = prompts(rows, 24, str(model.device))
    prepared = mixed_batch(model, rows, PEOPLE_SLOTS)
    began = now()
    with Steering.for_model(model).attached(prepared):
        generate(
            model,
            given,
            tokens,
            past_key_values=growing_cache(model, rows),
            logits_processor=LogitsProcessorList([first]),
        )
    return _measures(began, first)


def one_at_a_time(model: PreTrainedModel, rows: int, tokens: int) -> Measures:
    """PEFT prefix tuning: switch to a person's adapter, generate, go on to the next."""
    given = prompts(rows, 24, str(model.device))
    began = now()
    for i in range(rows):
        model.set_adapter(f"person{i}")
        one = {name: value[i : i + 1] for name, value in given.items()}
        generate(model, one, tokens)
    return {"all requests seconds": now() - began}


def mixed_lora(model: PreTrainedModel, rows: int, tokens: int) -> Measures:
    """PEFT LoRA: each row names its adapter."""
    given = prompts(rows, 24, str(model.device))
    began = now()
    generate(model, given, tokens, adapter_names=[f"person{i}" for i in range(rows)])
    return {"all requests seconds": now() - began}


def in_the_prompt(model: PreTrainedModel, rows: int, tokens: int, texts: int) -> Measures:
    """The person's texts before the prompt, in one batch."""
    first = FirstToken()
    given = prompts(rows, 24 + texts, str(model.device))
    began = now()
    generate(model, given, tokens, logits_processor=LogitsProcessorList([first]))
    return _measures(began, first)


def _measures(began: float, first: FirstToken) -> Measures:
    assert first.at is not None
    return {"all requests seconds": now() - began, "first token seconds": first.at - began}


def _adapters(model: PreTrainedModel, config: PeftConfig, people: int) -> PeftModel:
    """A copy of the model with an adapter for each person."""
    adapted = get_peft_model(copy.deepcopy(model), config, adapter_name="person0")
    for i in range(1, people):
        adapted.add_adapter(f"person{i}", copy.copy(config))
    return adapted.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=NAMES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--prompt-people", type=int, default=8, help="with texts in the prompt")
    parser.add_argument("--texts", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = build(options.model, options.device)
    people, tokens = options.people, options.tokens

    prefix = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PEOPLE_SLOTS, inference_mode=True
    )
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"], inference_mode=True
    )

    def against(rows: int, peers: dict[str, Callable[[], Measures]]) -> list[Comparison]:
        """How much faster we are than each peer."""
        found: list[Comparison] = []
        for name, peer in peers.items():
            both = {name: peer, "controlprefix": lambda: steered(model, rows, tokens)}
            case = f"{rows} people, {tokens} tokens each, against {name}"
            found += compare(case, both, rounds=options.rounds)
        return found

    prefixes, loras = _adapters(model, prefix, people), _adapters(model, lora, people)
    found = against(
        people,
        {
            "PEFT prefix tuning, one at a time": partial(one_at_a_time, prefixes, people, tokens),
            "PEFT LoRA r8 on q and v, mixed": partial(mixed_lora, loras, people, tokens),
        },
    )
    few = options.prompt_people
    found += against(
        few,
        {
            f"{n} tokens of texts in the prompt": partial(in_the_prompt, model, few, tokens, n)
            for n in options.texts
        },
    )
    slot = Steering.for_model(model).geometry.slot_size("decoder") * model.dtype.itemsize
    notes = [
        f"K/V of a person: {PEOPLE_SLOTS} slots {PEOPLE_SLOTS * slot:,} bytes; {n} tokens of texts "
        f"{n * slot:,} bytes, {n / PEOPLE_SLOTS:.1f} times as much"
        for n in options.texts
    ]
    path = report(
        f"peers-{options.model}-{options.device}", found, reference="the peer", notes=notes
    )
    plots.peers(Path(path))


if __name__ == "__main__":
    main()
