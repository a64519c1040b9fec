"""Log-probabilities of target tokens, for scores and as the training loss."""

import contextlib
import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from controlprefix.model.frozen import FrozenModel
from controlprefix.model.images import image_inputs, image_positions
from controlprefix.model.languages import start_ids_of
from controlprefix.model.padding import pad_rows

_CHUNK_TOKENS = 64  # tokens whose float32 logits are held at a time, forward and backward


def token_log_probs(
    frozen: FrozenModel, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats) of target tokens after their prompts.

    Args:
        frozen: The model, with whatever is attached to it.
        prompts: Token ids per row, at least one each.
        targets: Token ids per row that follow the prompt.

    Returns:
        Log-probabilities `(num_rows, longest_target)`, float32, zero at padding, and a mask
        of the same shape.
    """
    logits, target_ids, mask = target_logits(frozen, prompts, targets)
    losses = chunked_losses(logits, target_ids)
    return losses.new_zeros(mask.shape).masked_scatter(mask, -losses), mask


def chunked_losses(logits: Tensor, target_ids: Tensor) -> Tensor:
    """`target_losses` of many tokens, a chunk at a time, forward and backward.

    Args:
        logits: `(num_tokens, vocab_size)`.
        target_ids: `(num_tokens,)`.

    Returns:
        Nats, `(num_tokens,)`.
    """
    return torch.cat(
        [
            checkpoint(target_losses, chunk, ids, use_reentrant=False)
            for chunk, ids in zip(
                logits.split(_CHUNK_TOKENS), target_ids.split(_CHUNK_TOKENS), strict=True
            )
        ]
    )


def kl_divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence (nats) of the teacher's next-token distributions from the student's.

    Args:
        logits, teacher: `(num_tokens, vocab_size)`.

    Returns:
        `(num_tokens,)`, float32.
    """
    return torch.cat(
        [
            checkpoint(_kl_of_chunk, student, target, use_reentrant=False)
            for student, target in zip(
                logits.split(_CHUNK_TOKENS), teacher.split(_CHUNK_TOKENS), strict=True
            )
        ]
    )


def target_logits(
    frozen: FrozenModel, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the target tokens only: the vocabulary is a large part of a small model's work.

    Args:
        frozen, prompts, targets: As in `token_log_probs`.

    Returns:
        Logits `(num_targets, vocab_size)` row by row, in the model's dtype; the target ids
        `(num_targets,)`; and a mask of the targets `(num_rows, longest_target)`.
    """
    if frozen.is_encoder_decoder:
        inputs, target_ids, mask, positions = _encoder_decoder_inputs(frozen, prompts, targets)
    else:
        inputs, target_ids, mask = _decoder_only_inputs(frozen, prompts, targets)
        positions = pad(mask, (0, 1))  # the logits of a token are those at the token before it
    with frozen.exclusive(), _logits_only_at(frozen.model, positions):
        logits = frozen.model(**inputs, use_cache=False).logits
    if logits.shape[:2] != (1, int(positions.sum())):  # the model has no output layer to hook
        logits = logits[:, -positions.shape[1] :][positions]
    return logits.flatten(0, -2), target_ids[mask], mask


def target_losses(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Negative log-probabilities (nats) `(num_targets,)`, float32."""
    return cross_entropy(logits.float(), target_ids, reduction="none")


def _kl_of_chunk(logits: Tensor, teacher: Tensor) -> Tensor:
    divergences = kl_div(
        logits.float().log_softmax(1),
        teacher.float().log_softmax(1),
        reduction="none",
        log_target=True,
    )
    return divergences.sum(1)


@contextlib.contextmanager
def _logits_only_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Compute logits only at some of the last positions of the rows while inside.

    They come as (1, num_positions, vocab_size). The hook is before the output layer, so
    whatever the model does to logits afterwards (soft caps, scales, biases) is still done.
    """
    head = model.get_output_embeddings()
    thread = threading.get_ident()

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:  # another thread's pass through the same model
            return args
        return (args[0][:, -positions.shape[1] :][positions][None], *args[1:])

    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _decoder_only_inputs(
    frozen: FrozenModel, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], Tensor, Tensor]:
    # Left padding puts all targets at the end, as in generation.
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    ids, attention_mask = _padded(frozen, rows, left=True)
    target_ids, mask = _padded(frozen, targets, left=True)
    accepted = inspect.signature(frozen.model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = target_ids.shape[1] + 1
    if images := image_inputs(prompts, [len(row) for row in rows], frozen.model):
        inputs |= images
        if (positions := image_positions(frozen.model, ids, attention_mask, images)) is not None:
            inputs["position_ids"] = positions[0]
    return inputs, target_ids, mask.bool()


def _encoder_decoder_inputs(
    frozen: FrozenModel, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """The model's inputs, the targets, their mask, and where in the decoder they are predicted."""
    ids, attention_mask = _padded(frozen, prompts, left=False)
    target_ids, mask = _padded(frozen, targets, left=False)
    default = frozen.request_tokenizer.decoder_start_ids
    starts = [start_ids_of(prompt, default) for prompt in prompts]
    rows = [[*start, *target[:-1]] for start, target in zip(starts, targets, strict=True)]
    decoder_ids, _ = _padded(frozen, rows, left=False)
    first = torch.tensor([len(start) - 1 for start in starts], device=ids.device)
    columns = torch.arange(decoder_ids.shape[1], device=ids.device) - first[:, None]
    positions = (columns >= 0) & (columns < mask.sum(1, keepdim=True))
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_ids,
    }
    return inputs, target_ids, mask.bool(), positions


def _padded(
    frozen: FrozenModel, rows: Sequence[Sequence[int]], *, left: bool
) -> tuple[Tensor, Tensor]:
    ids, mask = pad_rows(rows, frozen.pad_id, left=left)
    return ids.to(frozen.device), mask.to(frozen.device)


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """A token and its log-probability in nats.

    Attributes:
        token: Its id.
        log_prob: Its log-probability.
        top: The most likely tokens with their log-probabilities, if they were asked for.
    """

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


def token_log_probs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogProbs]:
    """The log-probabilities of tokens.

    Args:
        logits: At each of them, `(num_tokens, vocab_size)`, float32.
        tokens: Their ids.
        top: How many of the most likely ones to add.
    """
    # Without another tensor of that size: it may be large.
    totals = torch.cat([chunk.logsumexp(1) for chunk in logits.split(_CHUNK_TOKENS)])
    values, ids = logits.topk(min(top, logits.shape[1]), dim=1)
    values = values - totals[:, None]
    index = torch.tensor(tokens, device=logits.device)[:, None]
    own = (logits.gather(1, index)[:, 0] - totals).tolist()
    return [
        TokenLogProbs(
            token,
            log_prob,
            tuple(pair for pair in zip(*best, strict=True) if pair[1] > -math.inf),
        )
        for token, log_prob, *best in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]
