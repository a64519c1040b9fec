"""Attention of one new token per row: slots and tokens joined, or in segments."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from controlprefix.model.masks import joined_keys_and_values, mask_with_slots, token_bias
from controlprefix.prefixes import SlotBlock

# From this many elements of keys in a one-token call, attending in segments is faster
# than one call of torch's fused attention. Measured on CPUs and on an H200.
_MIN_SEGMENTED_ELEMENTS = {"cpu": 1 << 20}
_MIN_ELEMENTS_ELSEWHERE = 1 << 26
# Without cuDNN's, which is compiled anew for each number of keys: 45 ms a token on an H200.
_FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Segment(NamedTuple):
    """Some of the keys and values that the queries of a call attend to.

    It has as many rows as the call, or fewer: one row that all share, or one per request
    whose beams stand together.
    """

    keys: Tensor  # (num_rows, num_kv_heads, n, key_dim)
    values: Tensor  # (num_rows, num_kv_heads, n, value_dim)
    bias: Tensor | None  # (num_rows, n), added to the logits


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: tuple[SlotBlock, ...],
    layer: int,
    scaling: float | None,
) -> Tensor:
    """Attend with one query per row to slots and tokens.

    Args:
        query: `(batch, num_heads, 1, key_dim)`.
        key, value: `(batch, num_kv_heads, num_keys, head_dim)`.
        mask: `(1 or batch, 1, 1, num_keys or more)`, boolean or additive.
        blocks: Slots.
        layer: Index of the layer at its site.
        scaling: Factor of the logits; None is `key_dim ** -0.5`.

    Returns:
        `(batch, 1, num_heads, value_dim)`.
    """
    batch, num_heads, _, key_dim = query.shape
    _, num_kv_heads, num_keys, _ = key.shape
    num_slots = sum(block.keys[layer].shape[2] for block in blocks)
    num_key_elements = batch * num_kv_heads * (num_slots + num_keys) * key_dim
    threshold = _MIN_SEGMENTED_ELEMENTS.get(key.device.type, _MIN_ELEMENTS_ELSEWHERE)
    if num_key_elements >= threshold:
        bias = None if mask is None else token_bias(mask, blocks, batch, key)
        segments = [Segment(key, value, bias)]
        for block in blocks:
            bias = None if block.unweighted else block.log_strengths.to(key.dtype)
            segments.append(Segment(block.keys[layer], block.values[layer], bias))
        return segmented_attention(query, segments, scaling)
    keys, values = joined_keys_and_values(blocks, layer, key, value)
    # cuDNN's does not take a part of a larger tensor.
    may_be_cudnn = keys.is_cuda and keys.is_contiguous()
    with sdpa_kernel(_FUSED_KERNELS) if may_be_cudnn else contextlib.nullcontext():
        output = scaled_dot_product_attention(
            query.reshape(batch, num_kv_heads, -1, key_dim),
            keys,
            values,
            mask_with_slots(mask, blocks, key, 1, False),
            scale=scaling,
        )  # (batch, num_kv_heads, group, value_dim)
    return output.reshape(batch, 1, num_heads, -1)


def segmented_attention(
    query: Tensor, segments: Sequence[Segment], scaling: float | None
) -> Tensor:
    """One softmax over several segments whose keys are never copied together.

    Args:
        query: `(batch, num_heads, 1, key_dim)`.
        segments: Keys `(num_rows, num_kv_heads, num_keys, key_dim)`, values, and biases or None;
            a segment of one row is that of all rows.
        scaling: Multiplier of the attention logits; None for `key_dim ** -0.5`.

    Returns:
        `(batch, 1, num_heads, value_dim)`.
    """
    batch, num_heads, _, key_dim = query.shape
    num_kv_heads = segments[0].keys.shape[1]
    query = query.reshape(batch * num_kv_heads, -1, key_dim)  # (batch * kv heads, group, key_dim)
    scale = key_dim**-0.5 if scaling is None else scaling
    scores = []
    for keys, _, bias in segments:
        # Keys come first in the product: those of a growing cache are not contiguous, and in
        # the other order torch would copy them on CPU.
        keys, folded = keys.flatten(0, 1), _fold(query, batch, len(keys)).transpose(1, 2)
        if bias is None:
            logits = torch.baddbmm(query.new_empty(1), keys, folded, beta=0, alpha=scale)
        else:
            per_head = bias[:, None].expand(-1, num_kv_heads, -1).flatten(0, 1)[:, :, None]
            logits = torch.baddbmm(per_head, keys, folded, alpha=scale)
        logits = logits.transpose(1, 2)
        scores.append(_unfold(logits, batch, len(logits) // num_kv_heads))  # (.., group, n)
    weights = torch.cat(scores, 2) if len(scores) > 1 else scores[0]
    per_segment = weights.softmax(2).split([score.shape[2] for score in scores], 2)
    outputs = []
    for segment_weights, (_, values, _) in zip(per_segment, segments, strict=True):
        num_rows = len(values)
        product = torch.bmm(_fold(segment_weights, batch, num_rows), values.flatten(0, 1))
        outputs.append(_unfold(product, batch, num_rows))  # (batch * kv heads, group, value_dim)
    return sum(outputs[1:], outputs[0]).view(batch, 1, num_heads, -1)


def _fold(per_row: Tensor, batch: int, num_rows: int) -> Tensor:
    """(batch * kv heads, group, n) -> (num_rows * kv heads, batch / num_rows * group, n)"""
    if num_rows == batch:
        return per_row
    heads, group, size = per_row.shape
    folded = per_row.view(num_rows, batch // num_rows, heads // batch, group, size).transpose(1, 2)
    return folded.reshape(num_rows * (heads // batch), -1, size)


def _unfold(folded: Tensor, batch: int, num_rows: int) -> Tensor:
    """Undo `_fold`."""
    if num_rows == batch:
        return folded
    heads, _, size = folded.shape
    split = folded.view(num_rows, heads // num_rows, batch // num_rows, -1, size).transpose(1, 2)
    return split.flatten(0, 2)
