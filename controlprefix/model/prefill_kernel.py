"""Attention of long prompts: queries in chunks, so that memory grows with their number.

A mask of all queries and keys would be quadratic, where a model without slots needs none.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from controlprefix.model.masks import expand_rows, joined_keys_and_values, to_additive
from controlprefix.prefixes import SlotBlock

PREFILL_CHUNK = 256  # queries whose mask is in memory at a time


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    layer: int,
    causal: bool,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attend with many queries to slots and tokens.

    Args:
        query: `(batch, num_heads, num_queries, key_dim)`.
        key, value: `(batch, num_kv_heads, num_keys, head_dim)`.
        mask: `(1 or batch, 1 or num_heads, num_queries, num_keys or more)`, boolean or additive.
        blocks: Slots.
        layer: Index of the layer at its site.
        causal: Query i sees the keys up to i; there are as many keys as queries, and no mask.
        scaling: Factor of the logits; None is `key_dim ** -0.5`.
        dropout: Probability that an attention weight is dropped.

    Returns:
        `(batch, num_queries, num_heads, value_dim)`.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    num_groups = num_heads // key.shape[1]
    keys, values = (
        tensor.repeat_interleave(num_groups, 1) if num_groups > 1 else tensor
        for tensor in joined_keys_and_values(blocks, layer, key, value)
    )
    num_slots = keys.shape[2] - num_keys
    bias = None
    if not all(block.unweighted for block in blocks):
        strengths = [expand_rows(block.log_strengths, batch) for block in blocks]
        bias = torch.cat(strengths, dim=1)[:, None, None].to(query.dtype)  # (batch, 1, 1, slots)
    triangle = query.new_ones(PREFILL_CHUNK, PREFILL_CHUNK, dtype=torch.bool).tril()
    outputs = []
    for start in range(0, num_queries, PREFILL_CHUNK):
        end = min(num_queries, start + PREFILL_CHUNK)
        last_key = end if causal else num_keys
        if mask is not None:
            rows = slice(start, end) if mask.shape[2] > 1 else slice(None)
            tokens = mask[:, :, rows, :last_key]
        elif causal:
            tokens = query.new_ones(end - start, last_key, dtype=torch.bool)
            tokens[:, start:] = triangle[: end - start, : end - start]
            tokens = tokens[None, None]
        else:
            tokens = None
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                keys[:, :, : num_slots + last_key],
                values[:, :, : num_slots + last_key],
                _in_front(tokens, bias, num_slots, end - start, last_key, query.dtype),
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _in_front(
    tokens: Tensor | None,
    bias: Tensor | None,
    num_slots: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask of a chunk, with the slots in front of the tokens."""
    if bias is None:
        if tokens is None:
            return None
        if tokens.dtype == torch.bool:
            visible = tokens.new_ones(*tokens.shape[:3], num_slots)
            return torch.cat([visible, tokens], dim=3)
        return torch.cat([tokens.new_zeros(*tokens.shape[:3], num_slots), tokens], dim=3)
    if tokens is None:
        tokens = bias.new_zeros(1, 1, num_queries, num_keys)
    tokens = to_additive(tokens, dtype)
    return torch.cat(
        [
            bias.expand(-1, tokens.shape[1], num_queries, -1),
            tokens.expand(len(bias), -1, num_queries, -1),
        ],
        dim=3,
    )
