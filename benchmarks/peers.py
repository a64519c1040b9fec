"""Requests of different users that wait at once, against what a user would do instead.

- PEFT prefix tuning runs one adapter at a time, so one request after another.
- PEFT LoRA can mix adapters in a batch.
- A user's texts can be in the prompt. Only here outputs differ in quality; what is compared is
  speed and the size of keys and values.
- BatchSplit of adapters needs an older transformers: `benchmarks/adapters_batch_split.py`.

Greedy decoding, rows of equal length, random prefixes.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from controlprefix.model.kv_cache import growing_cache
from controlprefix.model.steering import Steering

from lib import plots
from lib.interleaved import Comparison, Measures, compare, now
from lib.models import add_model_options, load_from, mixed_batch, random_prompts
from lib.results import arguments, save_comparisons

NUM_SLOTS = 16
PROMPT_TOKENS = 24


class FirstTokenTimer(LogitsProcessor):
    """Records when the logits of the first new token are ready."""

    def __init__(self) -> None:
        self.start = now()
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or now()
        return scores

    def measures(self) -> Measures:
        """Seconds until the first token, and until now."""
        assert self.first is not None
        return {
            "all requests seconds": now() - self.start,
            "first token seconds": self.first - self.start,
        }


def generate(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int, **options: object
) -> torch.Tensor:
    """Greedy generation of exactly `tokens` tokens."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def steered(model: PreTrainedModel, rows: int, tokens: int) -> Measures:
    """All requests in one batch with a prefix each, assembly included."""
    inputs = random_prompts(rows, PROMPT_TOKENS, str(model.device))
    batch = mixed_batch(model, rows, NUM_SLOTS)
    timer = FirstTokenTimer()
    with Steering.for_model(model).attached(batch):
        generate(
            model,
            inputs,
            tokens,
            past_key_values=growing_cache(model, rows),
            logits_processor=LogitsProcessorList([timer]),
        )
    return timer.measures()


def one_at_a_time(model: PeftModel, rows: int, tokens: int) -> Measures:
    """PEFT prefix tuning: set a user's adapter and generate, user after user."""
    inputs = random_prompts(rows, PROMPT_TOKENS, str(model.device))
    start = now()
    for i in range(rows):
        model.set_adapter(f"user{i}")
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        generate(model, row, tokens)
    return {"all requests seconds": now() - start}


def mixed_lora(model: PeftModel, rows: int, tokens: int) -> Measures:
    """PEFT LoRA: each row of the batch names its adapter."""
    inputs = random_prompts(rows, PROMPT_TOKENS, str(model.device))
    start = now()
    generate(model, inputs, tokens, adapter_names=[f"user{i}" for i in range(rows)])
    return {"all requests seconds": now() - start}


def in_the_prompt(model: PreTrainedModel, rows: int, tokens: int, num_text: int) -> Measures:
    """`num_text` tokens of the user's texts before each prompt, in one batch."""
    inputs = random_prompts(rows, PROMPT_TOKENS + num_text, str(model.device))
    timer = FirstTokenTimer()
    generate(model, inputs, tokens, logits_processor=LogitsProcessorList([timer]))
    return timer.measures()


def with_adapters(model: PreTrainedModel, config: PeftConfig, num_users: int) -> PeftModel:
    """A copy of the model with an adapter per user."""
    adapted = get_peft_model(copy.deepcopy(model), config, adapter_name="user0")
    for i in range(1, num_users):
        adapted.add_adapter(f"user{i}", copy.copy(config))
    return adapted.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    add_model_options(parser)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--prompt-users", type=int, default=8, help="users with texts in prompts")
    parser.add_argument("--texts", type=int, nargs="+", default=[500, 1000, 2000], help="tokens")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args(argv)
    frozen = load_from(options)
    model, users, tokens = frozen.model, options.users, options.tokens

    def against(rows: int, peers: dict[str, Callable[[], Measures]]) -> list[Comparison]:
        """The speed of this library as a multiple of each peer's."""
        comparisons: list[Comparison] = []
        for name, peer in peers.items():
            pair: dict[str, Callable[[], Measures]] = {
                name: peer,
                "controlprefix": partial(steered, model, rows, tokens),
            }
            case = f"{rows} users, {tokens} tokens each, against {name}"
            comparisons += compare(case, pair, rounds=options.rounds)
        return comparisons

    causal = TaskType.CAUSAL_LM
    prefix = PrefixTuningConfig(task_type=causal, num_virtual_tokens=NUM_SLOTS, inference_mode=True)
    lora = LoraConfig(
        task_type=causal, r=8, target_modules=["q_proj", "v_proj"], inference_mode=True
    )
    prefixes, loras = with_adapters(model, prefix, users), with_adapters(model, lora, users)
    comparisons = against(
        users,
        {
            "PEFT prefix tuning, one at a time": partial(one_at_a_time, prefixes, users, tokens),
            "PEFT LoRA r8 on q and v, mixed": partial(mixed_lora, loras, users, tokens),
        },
    )
    few = options.prompt_users
    comparisons += against(
        few,
        {
            f"{n} tokens of texts in the prompt": partial(in_the_prompt, model, few, tokens, n)
            for n in options.texts
        },
    )
    slot = frozen.geometry.slot_size("decoder") * model.dtype.itemsize
    notes = [
        f"keys and values of a user: {NUM_SLOTS} slots {NUM_SLOTS * slot:,} bytes; {n} tokens of "
        f"texts {n * slot:,} bytes, {n / NUM_SLOTS:.1f} times as much"
        for n in options.texts
    ]
    path = save_comparisons(
        options.results,
        f"peers-{options.model}-{options.device}",
        comparisons,
        reference="the peer",
        model=frozen,
        notes=notes,
    )
    plots.peers(path)


if __name__ == "__main__":
    main()
