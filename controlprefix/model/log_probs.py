"""How likely the model finds completions; used for scores and as the training loss."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from controlprefix.inference.guidance import Guidance, combined
from controlprefix.model.tokenization import pad_rows


def token_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats) of target tokens after their prompts.

    Logits are computed only for target tokens: the vocabulary is a large part of
    a small model's work.

    Args:
        model: With whatever is attached to it.
        prompts: Token ids, at least one a row.
        targets: Token ids that follow.
        pad_id: Any id; it is masked.

    Returns:
        Log-probabilities `(rows, longest target)`, float32, zero at padding, and
        a mask of the same shape.
    """
    logits, wanted, live = target_logits(model, prompts, targets, pad_id=pad_id)
    losses = torch.cat(
        [
            checkpoint(_losses, some, of, use_reentrant=False)
            for some, of in zip(logits.split(_CHUNK), wanted.split(_CHUNK), strict=True)
        ]
    )
    return losses.new_zeros(live.shape).masked_scatter(live, -losses), live


def guided_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    guidance: Guidance,
    *,
    pad_id: int,
) -> list[Tensor]:
    """The same for requests, some of which have rows that lead away from parts.

    Args:
        model: With the prefix batch of `guidance.rows` attached.
        prompts, targets, pad_id: Of the requests, as in `token_log_probs`.
        guidance: Which rows there are.

    Returns:
        For each request, the log-probabilities of its targets, float32.
    """
    chosen = [targets[i] for i in guidance.requests]
    logits, wanted, _ = target_logits(
        model, [prompts[i] for i in guidance.requests], chosen, pad_id=pad_id
    )
    lengths = [len(target) for target in chosen]
    rows, tokens = logits.split(lengths), wanted.split(lengths)
    return [
        -_losses(
            combined(rows[i], [rows[term.row] for term in terms], [term.weight for term in terms]),
            tokens[i],
        )
        for i, terms in enumerate(guidance.terms)
    ]


def divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model) in nats at each position, `(positions,)`, float32.

    Args:
        logits, teacher: `(positions, vocabulary)`; gradients flow through `logits`.
    """
    return torch.cat(
        [
            checkpoint(_divergences, some, of, use_reentrant=False)
            for some, of in zip(logits.split(_CHUNK), teacher.split(_CHUNK), strict=True)
        ]
    )


def target_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model expects where the target tokens stand, and only there.

    Args:
        model, prompts, targets, pad_id: As in `token_log_probs`.

    Returns:
        Logits `(target tokens in all, vocabulary)` row by row, in the model's dtype; the
        tokens themselves, `(target tokens in all,)`; and a mask `(rows, longest target)`
        of where they stand.
    """
    device = model.device
    if model.config.is_encoder_decoder:
        inputs, wanted, live = _encoder_decoder(model, prompts, targets, pad_id, device)
        positions = live
    else:
        inputs, wanted, live = _decoder_only(model, prompts, targets, pad_id, device)
        positions = pad(live, (0, 1))  # a token's logits stand at the one before it
    with _logits_only_at(model, positions):
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] != (1, int(positions.sum())):  # the model has no output layer to look into
        logits = logits[:, -positions.shape[1] :][positions]
    return logits.flatten(0, -2), wanted[live], live


_CHUNK = 64  # tokens whose float32 logits are held at a time, going forth and back


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(logits.float(), wanted, reduction="none")


def _divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    found = kl_div(
        logits.float().log_softmax(1),
        teacher.float().log_softmax(1),
        reduction="none",
        log_target=True,
    )
    return found.sum(1)


@contextlib.contextmanager
def _logits_only_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """While inside, logits are computed at some of the last positions of the rows alone.

    They come as (1, positions in all, vocabulary): nothing is spent on padding, and what
    the model does to logits afterwards (soft caps, scales, biases) is still done.
    """
    head = model.get_output_embeddings()
    thread = threading.get_ident()

    def chosen(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:  # another thread's pass through the same model
            return args
        return (args[0][:, -positions.shape[1] :][positions][None], *args[1:])

    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()


def _decoder_only(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    # Left padding puts all targets at the end, as in generation.
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    ids, attention_mask = (t.to(device) for t in pad_rows(rows, pad_id, left=True))
    wanted, live = (t.to(device) for t in pad_rows(targets, pad_id, left=True))
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = wanted.shape[1] + 1
    return inputs, wanted, live.bool()


def _encoder_decoder(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    ids, attention_mask = (t.to(device) for t in pad_rows(prompts, pad_id, left=False))
    wanted, live = (t.to(device) for t in pad_rows(targets, pad_id, left=False))
    start = torch.full_like(wanted[:, :1], model.config.decoder_start_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": torch.cat([start, wanted[:, :-1]], dim=1),
    }
    return inputs, wanted, live.bool()
