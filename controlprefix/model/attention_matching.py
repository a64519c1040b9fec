"""Attention Matching: few slots that do in attention what many slots do.

Per layer and kv head, the slots that the queries of some texts attend to most keep their keys. Each
key then moves so that the kept slots together receive the attention that all slots received, and
the values are fitted so that they give the output that all slots gave.

Reference:
    Zweiger et al., "Fast KV Compaction via Attention Matching", 2026,
    https://arxiv.org/abs/2602.16284. There each slot has a log-mass of its own, added to its
    attention logits. Here the log-mass is folded into the key, by least squares over the
    queries, so that the result is an ordinary prefix for every engine; what that costs is in
    docs/decisions.md.
"""

import torch
from torch import Tensor

from controlprefix.model.slot_attention import LayerAttention, SlotAttention
from controlprefix.prefixes import LayerSlots, Prefix

_MIN_MASS = 0.02  # of a slot relative to its own, so that its logarithm is finite
_KEY_PENALTY = 1e-2  # ridge penalties, relative to the mean of the diagonal
_VALUE_PENALTY = 1e-3
_NUM_ITERATIONS = 300


def matched(prefix: Prefix, attention: SlotAttention, num_slots: int) -> Prefix:
    """A shorter prefix that stands for the whole in attention.

    Args:
        prefix: The whole prefix.
        attention: How query texts attend to it.
        num_slots: Slots of the result; a prefix that has no more is returned as it is.
    """
    if prefix.num_slots <= num_slots:
        return prefix
    layers: dict[str, list[LayerSlots]] = {}
    for site in prefix.geometry.sites:
        layers[site] = []
        for i, observed in enumerate(attention[site]):
            keys, values = prefix.layer(site, i)
            if keys.shape[1] > num_slots:
                fitted = _match_layer(
                    keys.cpu().double(), values.cpu().double(), observed, num_slots
                )
                keys, values = (part.to(keys) for part in fitted)
            layers[site].append((keys, values))
    return Prefix.from_layers(prefix.geometry, **layers)


def _match_layer(
    keys: Tensor, values: Tensor, observed: LayerAttention, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of fewer slots, `(num_kv_heads, num_slots, head_dim)` each."""
    weights, queries = observed.weights.double(), observed.queries
    total = weights.sum(dim=2)  # (heads, queries): what all slots receive
    output = weights @ values
    selected = weights.square().sum(dim=1).topk(num_slots).indices.sort().values
    own = weights.take_along_dim(selected[:, None], dim=2)
    keys, values = (part.take_along_dim(selected[..., None], dim=1) for part in (keys, values))
    masses = nonnegative_least_squares(own, total).clamp(min=_MIN_MASS)
    shift = key_shift(queries, own * masses[:, None], masses.log())
    own = own * (queries @ shift.transpose(1, 2)).exp()
    # With other slots, what is left of each query's attention for tokens changes too.
    own = own / (1 - total + own.sum(dim=2))[..., None]
    change = _ridge(own, output - own @ values, _VALUE_PENALTY)
    return keys + shift, values + change


def key_shift(queries: Tensor, weights: Tensor, log_masses: Tensor) -> Tensor:
    """Changes of keys whose products with the queries are the slots' log-masses.

    A least-squares fit per slot over the queries, which count as much as they attend to it.

    Args:
        queries: `(heads, num_queries, key_dim)`.
        weights: `(heads, num_queries, num_slots)`.
        log_masses: `(heads, num_slots)`.

    Returns:
        `(heads, num_slots, key_dim)`.
    """
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
    shifts = []
    for own, head_weights, masses in zip(queries, weights, log_masses, strict=True):
        squares = own[:, :, None] * own[:, None]
        gram = (head_weights.T @ squares.flatten(1)).unflatten(1, squares.shape[1:])
        right = head_weights.T @ own * masses[:, None]
        shifts.append(torch.linalg.solve(_penalized(gram, _KEY_PENALTY), right[..., None])[..., 0])
    return torch.stack(shifts)


def _ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    gram = inputs.transpose(1, 2) @ inputs
    return torch.linalg.solve(_penalized(gram, penalty), inputs.transpose(1, 2) @ targets)


def _penalized(gram: Tensor, penalty: float) -> Tensor:
    """A gram matrix with a ridge penalty relative to its own size."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + (penalty * size + 1e-12)[..., None, None] * identity


def nonnegative_least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """Coefficients of 0 or more with which inputs add up to targets best, per head.

    By accelerated projected gradient descent, since scipy's `nnls` takes one problem at a time.

    Args:
        inputs: `(heads, num_queries, num_slots)`.
        targets: `(heads, num_queries)`.

    Returns:
        `(heads, num_slots)`.

    Reference:
        FISTA: Beck & Teboulle, 2009, https://doi.org/10.1137/080716542.
    """
    scale = inputs.norm(dim=1).clamp(min=1e-30)  # columns of one length converge together
    columns = inputs / scale[:, None]
    gram = columns.transpose(1, 2) @ columns
    right = (columns.transpose(1, 2) @ targets[..., None])[..., 0]
    step = 1 / torch.linalg.matrix_norm(gram, ord=2).clamp(min=1e-30)[:, None]
    current = ahead = torch.zeros_like(right)
    momentum = 1.0
    for _ in range(_NUM_ITERATIONS):
        gradient = (gram @ ahead[..., None])[..., 0] - right
        following = (ahead - step * gradient).clamp(min=0)
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / next_momentum * (following - current)
        current, momentum = following, next_momentum
    return current / scale
