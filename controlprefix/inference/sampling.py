"""Sampling: each request chooses its tokens with its own settings and random generator.

Adding Gumbel noise to log-probabilities and taking the largest is exactly a draw from them
(the Gumbel-max trick), so the choice of every row is an argmax and does not depend on the
rows beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from controlprefix.request import Request


class Sampler:
    """Turns one request's logits into values whose argmax is the chosen token.

    Args:
        request: Its sampling settings and seed.
        device: Device of the logits.
        processors: What is done to the logits before.

    Reference:
        Gumbel-max trick: Gumbel, 1954; Maddison et al., "A* Sampling", 2014,
        https://arxiv.org/abs/1411.0030.
    """

    def __init__(
        self, request: Request, device: torch.device, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self._processors: list[Any] = list(processors)
        if request.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
        if request.temperature is not None:
            self._processors.append(TemperatureLogitsWarper(request.temperature))
        if request.top_k is not None:
            self._processors.append(TopKLogitsWarper(request.top_k))
        if request.top_p is not None and request.top_p < 1:
            self._processors.append(TopPLogitsWarper(request.top_p))
        if request.min_p is not None:
            self._processors.append(MinPLogitsWarper(request.min_p))
        self._generator = None
        if request.samples:
            self._generator = torch.Generator(device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether logits are left as they are."""
        return not self._processors and self._generator is None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Process logits.

        Args:
            ids: Prompt and generated tokens without padding, `(1, num_tokens)`.
            logits: `(1, vocab_size)`.

        Returns:
            `(1, vocab_size)`; the largest value is the choice.
        """
        for processor in self._processors:
            logits = processor(ids, logits)
        if self._generator is not None:
            noise = torch.empty_like(logits).exponential_(generator=self._generator)
            logits = logits - noise.clamp_min(torch.finfo(logits.dtype).tiny).log()
        return logits


class RowSampling(LogitsProcessor):
    """Applies each row's own `Sampler` inside transformers' greedy `generate`.

    Args:
        requests: One per row.
        first_columns: Per row, the first column that is not padding.
        device: Device of the logits.
    """

    def __init__(
        self, requests: Sequence[Request], first_columns: Sequence[int], device: torch.device
    ) -> None:
        samplers = [Sampler(request, device) for request in requests]
        self._rows = [
            (i, first, sampler)
            for i, (sampler, first) in enumerate(zip(samplers, first_columns, strict=False))
            if not sampler.is_greedy
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process `scores` of shape `(num_rows, vocab_size)`."""
        scores = scores.clone()
        for i, first, sampler in self._rows:
            # Without padding, so that the pad token gets no repetition penalty.
            scores[i] = sampler(input_ids[i : i + 1, first:], scores[i : i + 1])[0]
        return scores
