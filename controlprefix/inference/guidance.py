"""Guidance: strengths applied to logits, with extra rows of the same batch.

Attention mass cannot fall below 0. So a part at strength `w < 0` gets a row of its own beside
the request's row, and its effect on the logits is added with that weight:

    logits = base + Σ w_i (with_i - base)

where `base` attends to the request's other parts, and `with_i` to those and part i. All rows
of a request continue with the same tokens. With `mixing="logits"` this is done for all labels,
so that they do not compete for attention.

Reference:
    Sanchez et al., "Stay on topic with Classifier-Free Guidance", 2023,
    https://arxiv.org/abs/2306.17806, whose scale is 1 - w with the part as negative prompt;
    Liu et al., "DExperts", 2021, https://arxiv.org/abs/2105.03023.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model import FrozenModel
from controlprefix.model.log_probs import target_logits, target_losses
from controlprefix.prefixes import Part

_MIN_RELATIVE_PROBABILITY = 0.01  # of the base's most likely token


class GuidanceTerm(NamedTuple):
    """A row whose difference from the base row is added with a weight."""

    row: int
    weight: float


class RowPlan(NamedTuple):
    """Which rows of a batch belong to which request.

    Attributes:
        rows: The parts of each row. The first rows are the requests' base rows, in order.
        request_of_row: Index of each row's request.
        terms: Per request, the terms that are added to its base row.
    """

    rows: list[list[Part]]
    request_of_row: list[int]
    terms: list[list[GuidanceTerm]]

    @property
    def has_guidance(self) -> bool:
        """Whether any request has more than its base row."""
        return len(self.rows) > len(self.terms)


def plan_rows(requests: Sequence[ResolvedRequest[Any]]) -> RowPlan:
    """One base row per request, plus one per part that is applied in logit space."""
    rows = [
        [part.part for part in request.parts if not part.in_logit_space] for request in requests
    ]
    request_of_row = list(range(len(rows)))
    terms: list[list[GuidanceTerm]] = []
    for i, request in enumerate(requests):
        terms.append([])
        for part in request.parts:
            if part.in_logit_space:
                terms[i].append(GuidanceTerm(len(rows), part.used.strength))
                rows.append([*rows[i], part.part])
                request_of_row.append(i)
    return RowPlan(rows, request_of_row, terms)


def combined_logits(base: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The logits of one request from those of its rows, in float32.

    Args:
        base: Logits of the base row, any shape.
        rows: Logits of the other rows, of the same shape.
        weights: A weight per row.

    Returns:
        A tensor of that shape; where the base is infinite (a token that the model rules out),
        it stays as it is.
    """
    base = base.float()
    if not rows:
        return base
    combined = base.clone()
    for row, weight in zip(rows, weights, strict=True):
        combined += weight * (row.float() - base)
    return torch.where(base.isfinite(), combined, base)


def without_implausible(base: Tensor, combined: Tensor) -> Tensor:
    """Combined logits for sampling: tokens that the base finds implausible are masked with -inf.

    These have below 1 % of the base's top probability: differences of logits mean little where
    all rows find a token all but impossible.

    Args:
        base: The base row's logits, with what was added to them or ruled out, any shape.
        combined: Those of `combined_logits`, likewise.

    Reference:
        Li et al., "Contrastive Decoding", 2022, https://arxiv.org/abs/2210.15097, with 10 %.
    """
    threshold = base.max(dim=-1, keepdim=True).values + math.log(_MIN_RELATIVE_PROBABILITY)
    return torch.where((base >= threshold) & ~base.isneginf(), combined, -math.inf)


def guided_log_probs(
    frozen: FrozenModel,
    plan: RowPlan,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Log-probabilities (nats) of target tokens, of requests that may have guidance.

    Args:
        frozen, plan, prompts, targets: As in `guided_target_logits`.

    Returns:
        Per request `(num_targets,)`, float32.
    """
    rows = guided_target_logits(frozen, plan, prompts, targets)
    return [
        -target_losses(logits, torch.tensor(ids, device=logits.device))
        for logits, ids in zip(rows, targets, strict=True)
    ]


def guided_target_logits(
    frozen: FrozenModel,
    plan: RowPlan,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Logits at target tokens, of requests that may have guidance.

    Args:
        frozen: The model, with the prefix batch of `plan.rows` attached.
        plan: The rows of the requests.
        prompts: Token ids per request, at least one each.
        targets: Token ids per request that follow the prompt.

    Returns:
        Per request `(num_targets, vocab_size)`, float32.
    """
    row_targets = [targets[i] for i in plan.request_of_row]
    row_prompts = [prompts[i] for i in plan.request_of_row]
    logits, *_ = target_logits(frozen, row_prompts, row_targets)
    rows = logits.split([len(target) for target in row_targets])
    return [
        combined_logits(
            rows[i], [rows[term.row] for term in terms], [term.weight for term in terms]
        )
        for i, terms in enumerate(plan.terms)
    ]
