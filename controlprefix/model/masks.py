"""Slots in front of tokens: joined keys and values, and log strengths in front of masks."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from controlprefix.model.kv_cache import behind_slots
from controlprefix.prefixes import SlotBlock


def joined_keys_and_values(
    blocks: tuple[SlotBlock, ...], layer: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Slots in front of tokens, `(batch, num_kv_heads, num_slots + num_keys, head_dim)` each."""
    batch = len(key)
    keys = [expand_rows(block.keys[layer], batch) for block in blocks]
    values = [expand_rows(block.values[layer], batch) for block in blocks]
    joined_keys = behind_slots(key, keys, blocks, layer)
    joined_values = None if joined_keys is None else behind_slots(value, values, blocks, layer)
    if joined_keys is None or joined_values is None:
        return torch.cat((*keys, key), 2), torch.cat((*values, value), 2)
    return joined_keys, joined_values


def mask_with_slots(
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    key: Tensor,
    num_queries: int,
    causal: bool,
) -> Tensor | None:
    """An additive mask with the slots' log strengths in front of the tokens' mask.

    Returns:
        `(batch, 1 or num_heads, num_queries, num_slots + num_keys)`; None if nothing is masked
        or weighted.
    """
    if mask is None and not causal and all(block.unweighted for block in blocks):
        return None
    batch, _, num_keys, _ = key.shape
    dtype = key.dtype

    def make() -> Tensor:
        if mask is None:
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device)
            tokens = to_additive(visible.tril() if causal else visible, dtype)[None, None]
        else:
            tokens = to_additive(mask, dtype)[..., :num_keys]
        bias = torch.cat([expand_rows(block.log_strengths, batch) for block in blocks], dim=1)
        bias = bias[:, None, None].to(dtype).expand(-1, tokens.shape[1], num_queries, -1)
        return torch.cat([bias, tokens.expand(batch, -1, num_queries, -1)], dim=3)

    owner = blocks[0].log_strengths if mask is None else mask
    return _memoized(
        owner, "with slots", blocks, (batch, num_queries, num_keys, dtype, causal), make
    )


def token_bias(mask: Tensor, blocks: tuple[SlotBlock, ...], batch: int, key: Tensor) -> Tensor:
    """The mask of a one-token call as an additive bias `(batch, num_keys)`.

    Args:
        mask: `(1 or batch, 1, 1, num_keys or more)`.
        blocks: The attached slots.
        batch: Rows of the call.
        key: `(batch, num_kv_heads, num_keys, key_dim)`.
    """
    num_keys = key.shape[2]
    return _memoized(
        mask,
        "tokens",
        blocks,
        (batch, num_keys, key.dtype),
        # A copy: kept on the mask, a view of it would keep it in memory.
        lambda: to_additive(mask, key.dtype)[:, 0, 0, :num_keys].expand(batch, -1).clone(),
    )


def expand_rows(per_row: Tensor, batch: int) -> Tensor:
    """Repeat rows for a call with more of them; rows of one request stand together.

    Args:
        per_row: `(num_rows, ...)`; `num_rows` is 1 or divides `batch`.
        batch: Rows of the call.

    Returns:
        `(batch, ...)`.
    """
    num_rows = per_row.shape[0]
    if num_rows in (1, batch):
        return per_row.expand(batch, *per_row.shape[1:])
    return per_row[:, None].expand(-1, batch // num_rows, *per_row.shape[1:]).flatten(0, 1)


def to_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as one to be added to attention logits.

    Args:
        mask: Boolean (True attends) or additive, of any shape.
        dtype: The dtype of the result, which has the mask's shape.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _memoized(
    owner: Tensor,
    name: str,
    blocks: tuple[SlotBlock, ...],
    shape: tuple[Any, ...],
    make: Callable[[], Tensor],
) -> Tensor:
    """A tensor derived from one that all layers of a pass are given, made once per pass.

    It is kept on that tensor, and made again if the tensor or the log strengths were written
    to (their versions changed, as by a schedule), or for other slots or shapes.
    """
    written = (owner, *(block.log_strengths for block in blocks))
    if any(tensor.is_inference() for tensor in written):  # these have no version counter
        return make()
    state = (*(tensor._version for tensor in written), shape)
    memo = owner.__dict__.setdefault("controlprefix_memo", {})
    entry = memo.get(name)
    if entry is None or not _are(entry[0], written) or entry[1] != state:
        # Referred to weakly: the owner may be among them, and a cycle would keep it in memory.
        entry = memo[name] = ([weakref.ref(tensor) for tensor in written], state, make())
    return entry[2]


def _are(references: Sequence[weakref.ref[Tensor]], tensors: Sequence[Tensor]) -> bool:
    """Whether these are the tensors that are referred to."""
    return len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
