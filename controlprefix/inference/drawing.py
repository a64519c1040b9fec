"""Drawing: a token per row, among those that the row's settings keep.

By inverse transform sampling with one uniform number per row: the token at which the cumulative
probability of the kept tokens exceeds that number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from controlprefix.request import Request

# `top_k`, `top_p` and `min_p` are applied to this many most likely tokens of a row; rows that
# keep more are cut at the smallest logit that is kept, sought among more and then among all.
_NUM_CANDIDATES = 128
_MORE_CANDIDATES = 2048
_BLOCK_SIZE = 256  # tokens whose probabilities are summed before a block is searched


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """Settings of rows that are sampled, as columns `(num_rows, 1)`."""

    temperature: Tensor
    top_k: Tensor  # int64; the largest number if there is no limit
    top_p: Tensor  # infinite if there is no limit
    min_p: Tensor
    truncated: list[int]  # rows with any limit
    num_without_top_k: int  # among the truncated rows, those with `top_p` and without `top_k`

    @staticmethod
    def of(requests: Sequence[Request], device: torch.device) -> "DrawSettings":
        """The settings of requests, a row each, on the device where tokens are drawn."""
        largest = torch.iinfo(torch.int64).max
        top_p = [r.top_p if r.top_p is not None and r.top_p < 1 else math.inf for r in requests]
        return DrawSettings(
            temperature=column([r.temperature or 1.0 for r in requests], device),
            top_k=column([r.top_k or largest for r in requests], device, torch.int64),
            top_p=column(top_p, device, torch.float64),
            min_p=column([r.min_p or 0.0 for r in requests], device),
            truncated=[
                i
                for i, request in enumerate(requests)
                if request.top_k is not None or request.min_p or top_p[i] < math.inf
            ],
            num_without_top_k=sum(
                request.top_k is None and p < math.inf
                for request, p in zip(requests, top_p, strict=True)
            ),
        )

    def rows(self, index: Tensor) -> "DrawSettings":
        """The settings of the rows in `index`."""
        return DrawSettings(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            truncated=[],
            num_without_top_k=self.num_without_top_k,
        )


def device_for(device: torch.device) -> torch.device:
    """Where to draw from logits on a device: itself, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def draw(logits: Tensor, top: Tensor, settings: DrawSettings, uniform: Tensor) -> Tensor:
    """A token per row, `(num_rows,)`.

    Args:
        logits: `(num_rows, vocab_size)`, float32.
        top: Their maxima, `(num_rows,)`.
        settings: The rows' settings.
        uniform: A number from [0, 1) per row, `(num_rows,)`, float64.
    """
    if not settings.truncated:
        return _draw_from_all(logits, top, settings.temperature, uniform)
    if len(settings.truncated) == len(logits):
        return _draw_truncated(logits, top, settings, uniform)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    is_truncated = torch.zeros(len(logits), dtype=torch.bool)
    is_truncated[settings.truncated] = True
    truncated = is_truncated.nonzero()[:, 0].to(logits.device)
    others = (~is_truncated).nonzero()[:, 0].to(logits.device)
    tokens[truncated] = _draw_truncated(
        logits[truncated], top[truncated], settings.rows(truncated), uniform[truncated]
    )
    tokens[others] = _draw_from_all(
        logits[others], top[others], settings.temperature[others], uniform[others]
    )
    return tokens


def _draw_from_all(logits: Tensor, top: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    return _draw_by_blocks(_weights(logits, top, temperature), uniform)


def _draw_by_blocks(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw by weights of all tokens: first a block of them, then a token of the block."""
    num_rows, vocab_size = weights.shape
    whole = vocab_size // _BLOCK_SIZE * _BLOCK_SIZE
    sums = weights[:, :whole].view(num_rows, -1, _BLOCK_SIZE).sum(2)
    if whole < vocab_size:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)
    cumulative = sums.double().cumsum(1)
    target = uniform[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    tokens = block * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocab_size - 1)).double()
    inside = torch.where(tokens < vocab_size, inside, 0.0).cumsum(1)
    result = tokens.gather(1, _first_above(inside, target - before))[:, 0]
    return result.clamp(max=vocab_size - 1)


def _draw_truncated(logits: Tensor, top: Tensor, settings: DrawSettings, uniform: Tensor) -> Tensor:
    """Draw from the tokens that `top_k`, `top_p` and `min_p` keep."""
    totals = None
    if settings.num_without_top_k:
        totals = _weights(logits, top, settings.temperature).sum(1, dtype=torch.float64)
    vocab_size = logits.shape[1]
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    tokens, is_complete = _draw_from_most_likely(
        logits, top, settings, uniform, totals, num_candidates
    )
    if num_candidates < vocab_size and not is_complete.all():
        rest = (~is_complete).nonzero()[:, 0]
        logits, top, settings = logits[rest], top[rest], settings.rows(rest)
        totals = None if totals is None else totals[rest]
        # A GPU sorts in less time than it is waited for.
        is_cpu = logits.device.type == "cpu"
        count = min(_MORE_CANDIDATES, vocab_size) if is_cpu else vocab_size
        smallest, is_complete = _smallest_kept(_largest(logits, count), top, settings, totals)
        if count < vocab_size and not is_complete.all():
            own = (~is_complete).nonzero()[:, 0]
            smallest[own], _ = _smallest_kept(
                _largest(logits[own], vocab_size),
                top[own],
                settings.rows(own),
                None if totals is None else totals[own],
            )
        weights = _weights(logits, top, settings.temperature)
        tokens[rest] = _draw_by_blocks(weights.masked_fill_(logits < smallest, 0.0), uniform[rest])
    return tokens


def _draw_from_most_likely(
    logits: Tensor,
    top: Tensor,
    settings: DrawSettings,
    uniform: Tensor,
    totals: Tensor | None,
    num_candidates: int,
) -> tuple[Tensor, Tensor]:
    """Draw among the most likely tokens of each row.

    Args:
        totals: The weights of all tokens together, `(num_rows,)`; needed for `top_p` without
            `top_k`.

    Returns:
        A token per row, and whether all tokens that its settings keep were candidates.
    """
    logits, tokens = logits.topk(num_candidates, dim=1)  # the most likely first
    smallest, is_complete = _smallest_kept(logits, top, settings, totals)
    tokens, order = tokens.sort(1)  # ties may come in any order
    weights = _weights(logits, top, settings.temperature).double()
    weights = torch.where(logits >= smallest, weights, 0.0).gather(1, order)
    cumulative = weights.cumsum(1)
    index = _first_above(cumulative, uniform[:, None] * cumulative[:, -1:])
    return tokens.gather(1, index)[:, 0], is_complete


def _smallest_kept(
    logits: Tensor, top: Tensor, settings: DrawSettings, totals: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The smallest logit that the settings keep.

    Args:
        logits: The largest of each row, in descending order, `(num_rows, num_candidates)`.
        top, settings, totals: As of `_draw_from_most_likely`.

    Returns:
        A logit per row, `(num_rows, 1)`, and whether no smaller one than those can be kept.
    """
    num_candidates = logits.shape[1]
    cumulative = _weights(logits, top, settings.temperature).double().cumsum(1)
    kth = logits.gather(1, settings.top_k.clamp(max=num_candidates) - 1)
    num_kept = (logits >= kth).sum(1, keepdim=True).clamp(min=1)  # by top_k; 0 if all are NaN
    last = num_kept - 1
    has_top_k = settings.top_k < torch.iinfo(torch.int64).max
    total = cumulative.gather(1, last)
    if totals is not None:
        total = torch.where(has_top_k, total, totals[:, None])
    # The first one with which the others have the share top_p.
    last = torch.minimum(last, torch.searchsorted(cumulative, settings.top_p * total))
    smallest = logits.gather(1, last)
    least = top[:, None] + settings.temperature * settings.min_p.log()
    smallest = torch.maximum(smallest, least)
    is_complete = logits[:, -1] < smallest[:, 0]
    is_complete &= ~has_top_k[:, 0] | (settings.top_k[:, 0] <= num_candidates)
    return smallest, is_complete


def _largest(logits: Tensor, count: int) -> Tensor:
    """The largest logits of each row in descending order, `(num_rows, count)`."""
    if logits.device.type != "cpu":
        return logits.topk(count, dim=1).values
    # numpy sorts with vector instructions: on a CPU, in a tenth of torch's time.
    values = logits.numpy()
    if count < values.shape[1]:
        values = numpy.partition(values, -count, axis=1)[:, -count:]
    return torch.from_numpy(numpy.sort(values, axis=1)).flip(1)


def _weights(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, at the temperature."""
    return (logits - top[:, None]).div_(temperature).exp_()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first cumulative weight above the target, `(num_rows, 1)`.

    A target that rounding put beyond the last one counts as just below it.
    """
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(cumulative, torch.minimum(target, below), right=True).clamp(
        max=cumulative.shape[1] - 1
    )


def column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values as a column, `(num_rows, 1)`."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
