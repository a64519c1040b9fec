"""Training, scoring and sampling of any adapted transformers model, by standard means.

Rows are padded on the right, so that positions count from 0 in every row, also for models that
take no positions.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from controlprefix.model import FrozenModel
from controlprefix.model.log_probs import target_losses
from controlprefix.model.neutral_generation import neutral_config
from controlprefix.model.padding import pad_rows
from controlprefix.model.tokenization import RequestTokenizer, TokenizedExample

_IGNORED = -100  # labels that transformers leaves out of the loss


def train(
    model: nn.Module,
    rows: Sequence[TokenizedExample],
    tokenizer: RequestTokenizer,
    *,
    batch_size: int,
    learning_rate: float,
    steps: int,
    seed: int,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Train the parameters that take gradients with AdamW.

    Args:
        model: An adapted model; prompts are not learned.
        rows: Training rows.
        tokenizer: The model's.
        batch_size, learning_rate, steps, seed: As usual.
        schedule: Multiplier of the learning rate at a step, from 1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = parameters[0].device
    model.train()
    stream = batches(rows, batch_size, seed)
    for step in range(1, steps + 1):
        inputs = padded(next(stream), tokenizer, with_end=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        optimizer.zero_grad()
        model(**{name: value.to(device) for name, value in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def batches(
    rows: Sequence[TokenizedExample], batch_size: int, seed: int
) -> Iterator[Sequence[TokenizedExample]]:
    """Batches without end, shuffled anew in each epoch."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(list(rows), len(rows))
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def padded(
    rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer, *, with_end: bool
) -> dict[str, Tensor]:
    """Token ids, mask and labels of examples, padded on the right; prompts have no label."""
    end = tokenizer.end_id
    ends = [[end] if with_end and end is not None and row.is_whole else [] for row in rows]
    sequences = [[*row.prompt, *row.completion, *own] for row, own in zip(rows, ends, strict=True)]
    ids, mask = pad_rows(sequences, tokenizer.pad_id, left=False)
    labels = ids.masked_fill(mask == 0, _IGNORED)
    for i, row in enumerate(rows):
        labels[i, : len(row.prompt)] = _IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def completion_logits(
    model: Any, rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer
) -> tuple[Tensor, Tensor]:
    """What a model predicts at the tokens of completions, without end tokens.

    Args:
        model: A transformers model, with whatever changes it.
        rows: Examples.
        tokenizer: The model's.

    Returns:
        Logits `(num_targets, vocab_size)` row by row, and the target ids `(num_targets,)`.
    """
    inputs, labels = _inputs_and_labels(model, rows, tokenizer)
    # Virtual tokens, if there are any, are in front.
    logits = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
    targets = labels != _IGNORED
    return logits[:, :-1][targets], labels[targets]


@torch.no_grad()
def completion_states(
    model: Any, rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer
) -> list[Tensor]:
    """The last layer's states from which completions are predicted.

    Args:
        model, rows, tokenizer: As in `completion_logits`.

    Returns:
        Per row `(num_targets, hidden_size)`, float32, on the CPU.
    """
    inputs, labels = _inputs_and_labels(model, rows, tokenizer)
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    states = output.hidden_states[-1][:, -inputs["input_ids"].shape[1] : -1]
    pairs = zip(states, labels != _IGNORED, strict=True)
    return [own[targets].float().cpu() for own, targets in pairs]


def _inputs_and_labels(
    model: Any, rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer
) -> tuple[dict[str, Tensor], Tensor]:
    """What a model reads, on its device, and the next token where it is to be predicted."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in padded(rows, tokenizer, with_end=False).items()}
    return inputs, inputs.pop("labels")[:, 1:]


def nll(
    model: Any, rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer, batch_size: int = 16
) -> tuple[float, int]:
    """Sum of the negative log-likelihood of completions in nats, and their number of tokens."""
    nats = nll_of_rows(model, rows, tokenizer, batch_size)
    return sum(nats), sum(len(row.completion) for row in rows)


@torch.no_grad()
def nll_of_rows(
    model: Any, rows: Sequence[TokenizedExample], tokenizer: RequestTokenizer, batch_size: int = 16
) -> list[float]:
    """The negative log-likelihood of each row's completion in nats, without its end token."""
    nats = [0.0] * len(rows)
    by_length = sorted(
        range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].completion)
    )
    for first in range(0, len(by_length), batch_size):
        indices = by_length[first : first + batch_size]
        logits, targets = completion_logits(model, [rows[i] for i in indices], tokenizer)
        losses = target_losses(logits, targets)
        lengths = [len(rows[i].completion) for i in indices]
        for i, own in zip(indices, losses.split(lengths), strict=True):
            nats[i] = float(own.sum())
    return nats


@torch.no_grad()
def sample(
    model: Any,
    frozen: FrozenModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float | None = 0.8,
    **options: Any,
) -> list[str]:
    """Texts after prompts of token ids, sampled, or greedy without a temperature.

    Args:
        model: A transformers model, with whatever changes it.
        frozen: The plain model, for its tokenizer.
        prompts: Token ids.
        max_new_tokens, seed, temperature: As usual.
        **options: Further options of `generate`.
    """
    device = next(model.parameters()).device
    tokenizer = frozen.request_tokenizer
    ids, mask = pad_rows(prompts, tokenizer.pad_id, left=True)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=neutral_config(frozen, max_new_tokens=max_new_tokens, **sampling),
        **options,
    )
    # PEFT's prompt methods return the new tokens alone.
    longest = ids.shape[1]
    new = output[:, longest:] if output.shape[1] > longest else output
    return [str(text) for text in frozen.tokenizer.batch_decode(new, skip_special_tokens=True)]
