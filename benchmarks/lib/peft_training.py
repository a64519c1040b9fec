"""Training and scoring of PEFT adapters, as PEFT's documentation does it."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

from controlprefix.model.tokenization import TokenizedExample

CAUSAL = TaskType.CAUSAL_LM
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
END, PAD = 2, 0  # SmolLM2's end and padding tokens

# Method -> a function of the number of slots that returns its configuration, whether it is
# initialized from the training text, and learning rates to choose from.
METHODS: dict[str, dict[str, Any]] = {
    "PEFT prefix tuning": {
        "config": lambda slots: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=slots),
        "rates": (1e-2, 3e-2, 1e-1),
    },
    "PEFT prefix tuning from text": {
        "config": lambda slots: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=slots),
        "from_text": True,
        "rates": (3e-3, 1e-2, 3e-2),
    },
    "PEFT cartridge": {
        "config": lambda slots: CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=slots),
        "from_text": True,
        "rates": (1e-2, 3e-2, 1e-1),
    },
    "PEFT prompt tuning": {
        "config": lambda slots: PromptTuningConfig(
            task_type=CAUSAL,
            num_virtual_tokens=slots,
            prompt_tuning_init=PromptTuningInit.RANDOM,
        ),
        "rates": (3e-2, 1e-1, 3e-1),
    },
    "PEFT LoRA r8": {
        "config": lambda _: LoraConfig(
            task_type=CAUSAL, r=8, lora_alpha=16, target_modules=ATTENTION
        ),
        "rates": (1e-3, 3e-3, 1e-2),
    },
}


def initialize_from_text(model: PeftModel, tokenizer: Any, text: str) -> None:
    """Set an adapter's virtual tokens to the keys and values of a text."""
    initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)


def padded(rows: Sequence[TokenizedExample], *, with_end: bool) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of examples, padded on the right; prompts have no label."""
    sequences = [[*row.prompt, *row.completion, *([END] if with_end else [])] for row in rows]
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    labels = ids.masked_fill(mask == 0, -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(
    rows: Sequence[TokenizedExample], batch_size: int, seed: int
) -> Iterator[Sequence[TokenizedExample]]:
    """Batches without end, shuffled anew in each epoch."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(list(rows), len(rows))
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def train(
    model: PeftModel,
    rows: Sequence[TokenizedExample],
    *,
    batch_size: int,
    learning_rate: float,
    steps: int,
    seed: int,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Train the adapter with AdamW.

    Args:
        model: A PEFT model; only its adapter takes gradients.
        rows: Training rows.
        batch_size, learning_rate, steps, seed: As usual.
        schedule: Multiplier of the learning rate at a step, from 1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    model.train()
    stream = batches(rows, batch_size, seed)
    for step in range(1, steps + 1):
        inputs = padded(next(stream), with_end=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        optimizer.zero_grad()
        model(**{name: value.to(model.device) for name, value in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def nll(model: Any, rows: Sequence[TokenizedExample], batch_size: int = 16) -> tuple[float, int]:
    """Sum of the negative log-likelihood of completions in nats, and their number of tokens."""
    total, num_tokens = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row.prompt) + len(row.completion))
    for i in range(0, len(by_length), batch_size):
        inputs = padded(by_length[i : i + batch_size], with_end=False)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :].float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
        )
        total += float(losses)
        num_tokens += int((labels != -100).sum())
    return total, num_tokens


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float | None = 0.8,
) -> list[str]:
    """Texts after prompts of token ids, sampled, or greedy without a temperature."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=END,
        pad_token_id=PAD,
        **sampling,
    )
    # PEFT's prompt methods return the new tokens alone.
    new = output[:, longest:] if output.shape[1] > longest else output
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
