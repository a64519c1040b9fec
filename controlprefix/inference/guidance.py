"""Parts whose strengths count in the space of logits, each in a row of its own.

A slot's attention mass cannot fall below nothing. So a part at strength `w < 0` gets a row of
its own beside the request's, and what it changes there is taken away:

    logits = base + Σ w_i (with_i − base)

where `base` attends to the request's other parts, and `with_i` to those and part i. All rows
of a request write the same tokens. With `mixing="logits"` all labels are had so: what each
changes is added up, so that labels do not compete for attention.

Reference:
    Sanchez et al., "Stay on topic with Classifier-Free Guidance", 2023,
    https://arxiv.org/abs/2306.17806, whose scale is 1 − w with the part as the negative prompt;
    Liu et al., "DExperts", 2021, https://arxiv.org/abs/2105.03023: labels for and against.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controlprefix.inference.resolver import ResolvedPart
from controlprefix.prefixes.assembly import Part


class Term(NamedTuple):
    """A row whose difference from another is added to it."""

    row: int
    weight: float


class Guidance(NamedTuple):
    """Which rows of a batch serve which request.

    Attributes:
        rows: The parts of each row.
        requests: For each row, the index of its request. The first rows are the requests' own,
            in order.
        terms: For each request, what is added to its own row.
    """

    rows: list[list[Part]]
    requests: list[int]
    terms: list[list[Term]]

    @property
    def is_plain(self) -> bool:
        """Whether no row is there for another."""
        return len(self.rows) == len(self.terms)


def spread(resolved: Sequence[Sequence[ResolvedPart]]) -> Guidance:
    """The rows that requests need, from their parts."""
    rows = [[one.part for one in parts if not one.apart] for parts in resolved]
    requests = list(range(len(rows)))
    terms: list[list[Term]] = []
    for i, parts in enumerate(resolved):
        terms.append([])
        for one in parts:
            if one.apart:
                terms[i].append(Term(len(rows), one.used.strength))
                rows.append([*rows[i], one.part])
                requests.append(i)
    return Guidance(rows, requests, terms)


def joined(several: Sequence[Guidance]) -> Guidance:
    """Guidances of one request each, as that of all of them."""
    rows = [one.rows[0] for one in several]
    requests = list(range(len(several)))
    terms: list[list[Term]] = []
    for i, one in enumerate(several):
        terms.append([])
        for row, weight in one.terms[0]:
            terms[i].append(Term(len(rows), weight))
            rows.append(one.rows[row])
            requests.append(i)
    return Guidance(rows, requests, terms)


_PLAUSIBLE = 0.01  # of the likeliest token's probability


def steered(base: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The same to choose a token by: what the base finds implausible is ruled out.

    Differences of logits mean little where both rows find a token all but impossible.

    Reference:
        Li et al., "Contrastive Decoding", 2022, https://arxiv.org/abs/2210.15097, whose bound is
        that of a tenth.
    """
    base = base.float()
    plausible = base >= base.max(dim=-1, keepdim=True).values + math.log(_PLAUSIBLE)
    return torch.where(plausible, combined(base, rows, weights), -math.inf)


def combined(base: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Logits of one request from those of its rows, in float32.

    Where the base rules a token out, it stays out.
    """
    base = base.float()
    found = base.clone()
    for row, weight in zip(rows, weights, strict=True):
        found += weight * (row.float() - base)
    return torch.where(base.isfinite(), found, base)
