"""How likely the model finds completions; used for scores and as the training loss."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from controlprefix.encoding import pad_rows


def token_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats) of target tokens after their prompts.

    Logits are computed only where targets are: the vocabulary is a large part
    of a small model's work.

    Args:
        model: With whatever is attached to it.
        prompts: Token ids, at least one a row.
        targets: Token ids that follow.
        pad_id: Any id; it is masked.

    Returns:
        Log-probabilities `(rows, longest target)`, float32, zero at padding, and
        a mask of the same shape.
    """
    device = model.device
    if model.config.is_encoder_decoder:
        logits, wanted, mask = _encoder_decoder(model, prompts, targets, pad_id, device)
    else:
        logits, wanted, mask = _decoder_only(model, prompts, targets, pad_id, device)
    losses = cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), reduction="none"
    ).view_as(wanted)
    return -losses * mask, mask.bool()


def _decoder_only(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    # Left padding puts all targets at the end, as in generation.
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    ids, attention_mask = (t.to(device) for t in pad_rows(rows, pad_id, left=True))
    wanted, mask = (t.to(device) for t in pad_rows(targets, pad_id, left=True))
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, object] = {}
    if "position_ids" in accepted:
        options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = wanted.shape[1] + 1
    output = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **options)
    return output.logits[:, -wanted.shape[1] - 1 : -1], wanted, mask


def _encoder_decoder(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, attention_mask = (t.to(device) for t in pad_rows(prompts, pad_id, left=False))
    wanted, mask = (t.to(device) for t in pad_rows(targets, pad_id, left=False))
    start = torch.full_like(wanted[:, :1], model.config.decoder_start_token_id)
    output = model(
        input_ids=ids,
        attention_mask=attention_mask,
        decoder_input_ids=torch.cat([start, wanted[:, :-1]], dim=1),
        use_cache=False,
    )
    return output.logits, wanted, mask
