"""Attention over the slots of decoupled prefixes, each with a softmax of its own."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from controlprefix.model.masks import expand_rows
from controlprefix.prefixes import DecoupledBlock


def decoupled_attention(
    query: Tensor, block: DecoupledBlock, layer: int, scaling: float | None
) -> Tensor:
    """What a block of decoupled prefixes adds to the output of attention.

    Every query attends to all slots, whatever its position.

    Args:
        query: `(batch, num_heads, num_queries, key_dim)`.
        block: At most one prefix per row; rows of one request (beams) stand together.
        layer: Index of the layer at its site.
        scaling: Factor of the logits; None is `key_dim ** -0.5`.

    Returns:
        `(batch, num_queries, num_heads, value_dim)`, times the strengths.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    keys, values = (expand_rows(rows[layer], batch) for rows in (block.keys, block.values))
    mask = None if block.is_slot is None else expand_rows(block.is_slot, batch)[:, None, None]
    output = scaled_dot_product_attention(
        query.reshape(batch, keys.shape[1], -1, key_dim), keys, values, mask, scale=scaling
    )
    strengths = expand_rows(block.strengths, batch).to(output.dtype)[:, None, None, None]
    return (strengths * output).view(batch, num_heads, num_queries, -1).transpose(1, 2)
