"""Attention of long prompts, in memory that grows with the number of queries.

A mask of all queries and keys would be quadratic, where a model without slots needs none. Where
nothing is trained, a CPU attends to slots and to tokens apart: a causal pass needs no mask, and the
two are merged by their log-sum-exp. Elsewhere, queries are split into chunks that have masks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from controlprefix.model.masks import expand_rows, joined_keys_and_values, to_additive
from controlprefix.prefixes import SlotBlock

PREFILL_CHUNK = 256  # queries whose mask is in memory at a time
MIN_MERGED_QUERIES = 1024  # from which on two passes are faster than one with a mask
# What `scaled_dot_product_attention` calls, which keeps the log-sum-exp to itself.
_flash_with_logsumexp: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None
)


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
    bias = None
    if not all(block.unweighted for block in blocks):
        strengths = [expand_rows(block.log_strengths, batch) for block in blocks]
        bias = torch.cat(strengths, dim=1)[:, None, None].to(query.dtype)  # (batch, 1, 1, slots)
    if causal and mask is None and not dropout and _can_merge(query, value, blocks, layer):
        slot_keys = torch.cat([expand_rows(b.keys[layer], batch) for b in blocks], dim=2)
        slot_values = torch.cat([expand_rows(b.values[layer], batch) for b in blocks], dim=2)
        return _merged(query, key, value, slot_keys, slot_values, bias, scaling)
    keys, values = (
        _repeated(tensor, num_groups)
        for tensor in joined_keys_and_values(blocks, layer, key, value)
    )
    num_slots = keys.shape[2] - num_keys
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


def _can_merge(query: Tensor, value: Tensor, blocks: tuple[SlotBlock, ...], layer: int) -> bool:
    """Whether attention to slots and to tokens can be computed apart here."""
    is_trained = torch.is_grad_enabled() and (
        query.requires_grad
        or any(b.keys[layer].requires_grad or b.values[layer].requires_grad for b in blocks)
    )
    return (
        _flash_with_logsumexp is not None
        and query.device.type == "cpu"
        and query.shape[2] >= MIN_MERGED_QUERIES
        and query.shape[3] == value.shape[3]
        and not is_trained  # the log-sum-exp has no gradient
        and not torch.compiler.is_compiling()
    )


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_keys: Tensor,
    slot_values: Tensor,
    bias: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Causal attention to tokens, and attention to slots with a bias, in the shares of both.

    Reference:
        The merge of partial results in Dao et al., "FlashAttention", 2022,
        https://arxiv.org/abs/2205.14135.
    """
    num_groups = query.shape[1] // key.shape[1]
    if bias is not None:  # finite, so that the slots of a row that has none give no NaN
        bias = bias.clamp(min=torch.finfo(query.dtype).min)
    (tokens, token_mass), (slots, slot_mass) = (
        _flash_with_logsumexp(
            query,
            _repeated(keys, num_groups),
            _repeated(values, num_groups),
            0.0,
            is_causal,
            attn_mask=own_bias,
            scale=scaling,
        )
        for keys, values, is_causal, own_bias in (
            (key, value, True, None),
            (slot_keys, slot_values, False, bias),
        )
    )
    share = torch.sigmoid(token_mass - slot_mass).unsqueeze(3)
    # The log-sum-exp is float32, or float64 as the model.
    merged = torch.lerp(slots.to(share.dtype), tokens.to(share.dtype), share).to(query.dtype)
    return merged.transpose(1, 2).contiguous()


def _repeated(tensor: Tensor, num_groups: int) -> Tensor:
    """Keys or values for each query head."""
    return tensor.repeat_interleave(num_groups, 1) if num_groups > 1 else tensor


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
