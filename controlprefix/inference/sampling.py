"""Sampling: the next token of each row of a batch, by that row's own settings and seed.

All rows are processed together. A row draws with one uniform number per token from its own
generator, by inverse transform sampling: the token at which the cumulative probability of the
tokens that its settings keep exceeds that number. So its choice does not depend on other rows.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from controlprefix.inference.drawing import DrawSettings, column, device_for, draw
from controlprefix.inference.guidance import GuidanceTerm, combined_logits, without_implausible
from controlprefix.request import Request

Processor = Callable[[Any, Any], Tensor]  # of ids and logits of one row, as in transformers


@dataclass(slots=True)
class SampledRow:
    """The sampling of one request, which moves with it from batch to batch.

    Attributes:
        request: Its sampling settings and seed.
        prompt: Token ids that a repetition penalty counts beside the generated ones.
        new: Ids generated so far; kept up to date by the caller.
        processors: What the model's generation config does to the logits of each of its rows.
        constraint: What rules out tokens, to keep to a JSON schema.
        forced_end: The last token that the request's limit allows, whatever is likely there.
        generator: Its random generator.
    """

    request: Request
    prompt: Sequence[int] = ()
    new: Sequence[int] = ()
    processors: Sequence[Processor] = ()
    constraint: Processor | None = None
    forced_end: int | None = None
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.request.seed)


class BatchSampler:
    """Chooses the next token of each row of a batch.

    Settings apply in this order: processors, the constraint, `logit_bias`, guidance, penalties,
    `temperature`, `top_k`, `top_p`, `min_p`. Tokens that are exactly as likely as the last one
    kept are kept too.

    Args:
        rows: Per row of the batch its sampling; None chooses the most likely token.
        device: Device of the logits.
        guidance: By row, the rows whose differences are added to its logits.

    Attributes:
        errors: By row, what its processors raised; it gets some token.
        is_impossible: Per row, whether no token can be chosen, since all are ruled out; it gets
            some token.

    Reference:
        Inverse transform sampling: Devroye, "Non-Uniform Random Variate Generation", 1986.
        `top_k`: Fan et al., 2018, https://arxiv.org/abs/1805.04833; `top_p`: Holtzman et al.,
        2019, https://arxiv.org/abs/1904.09751; `min_p`: Nguyen et al., 2024,
        https://arxiv.org/abs/2407.01082; `repetition_penalty`: Keskar et al., 2019,
        https://arxiv.org/abs/1909.05858; the other penalties are those of OpenAI's API.
    """

    def __init__(
        self,
        rows: Sequence[SampledRow | None],
        device: torch.device,
        guidance: Mapping[int, Sequence[GuidanceTerm]] | None = None,
    ) -> None:
        self._rows = rows
        self._device = device
        self._guidance = {i: terms for i, terms in (guidance or {}).items() if terms}
        requests = {i: row.request for i, row in enumerate(rows) if row is not None}
        self._processed = [
            (i, row)
            for i, row in enumerate(rows)
            if row is not None and (row.processors or row.constraint is not None)
        ]
        self._forced = [
            (i, row) for i, row in enumerate(rows) if row is not None and row.forced_end is not None
        ]
        self._bias = _biased_logits(requests, device)
        self._penalized = [i for i, request in requests.items() if request.has_penalty]
        self._penalties = self._columns(
            [requests[i] for i in self._penalized],
            lambda r: r.repetition_penalty,
            lambda r: r.presence_penalty,
            lambda r: r.frequency_penalty,
        )
        self._penalized_tokens: _PenalizedTokens | None = None
        self._sampled = [i for i, request in requests.items() if request.do_sample]
        sampled = [requests[i] for i in self._sampled]
        self._draw_device = device_for(device)
        self._settings = DrawSettings.of(sampled, self._draw_device)
        self.errors: dict[int, Exception] = {}
        self.is_impossible: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose a token per row.

        Args:
            logits: `(num_rows, vocab_size)`, float32; may be written to.

        Returns:
            `(num_rows,)`, token ids. A row with a NaN among its logits gets some token.
        """
        combined = self._process(logits)
        if self._bias is not None:
            self._add_bias(logits, combined)
        for i, guided in combined.items():
            logits[i] = without_implausible(logits[i], guided)
        if self._penalized:
            self._penalize(logits)
        top, tokens = logits.max(dim=1)
        self.is_impossible = top.isneginf()
        if self._sampled:
            uniform = [self._rows[i].generator.random() for i in self._sampled]  # type: ignore[union-attr]
            is_whole = len(self._sampled) == len(logits)
            of_rows: Any = slice(None) if is_whole else self._sampled
            sampled_tokens = draw(
                logits[of_rows].to(self._draw_device),
                top[of_rows].to(self._draw_device),
                self._settings,
                torch.tensor(uniform, dtype=torch.float64, device=self._draw_device),
            ).to(tokens.device)
            tokens[of_rows] = torch.where(top[of_rows].isfinite(), sampled_tokens, tokens[of_rows])
        for i, row in self._forced:
            if row.forced_end is not None and len(row.new) == row.request.max_new_tokens - 1:
                tokens[i] = row.forced_end
        if self._penalized_tokens is not None:
            self._penalized_tokens.append(tokens[self._penalized])
        return tokens

    def _process(self, logits: Tensor) -> dict[int, Tensor]:
        """Apply processors and constraints; returns the combined logits of guided rows."""
        ids = [
            torch.tensor([[*row.prompt, *row.new]], device=logits.device)
            for _, row in self._processed
        ]
        for (i, row), row_ids in zip(self._processed, ids, strict=True):
            try:
                for process in row.processors:
                    for j in (i, *(term.row for term in self._guidance.get(i, ()))):
                        logits[j : j + 1] = process(row_ids, logits[j : j + 1])
            except Exception as error:  # the other rows go on
                self.errors[i] = error
        combined = {
            i: combined_logits(
                logits[i], [logits[term.row] for term in terms], [term.weight for term in terms]
            )
            for i, terms in self._guidance.items()
        }
        for (i, row), row_ids in zip(self._processed, ids, strict=True):
            if row.constraint is not None and i not in self.errors:
                try:
                    logits[i : i + 1] = row.constraint(row_ids, logits[i : i + 1])
                except Exception as error:
                    self.errors[i] = error
        return combined

    def _add_bias(self, logits: Tensor, combined: Mapping[int, Tensor]) -> None:
        assert self._bias is not None
        rows, tokens, values = (column[self._bias[1] < logits.shape[1]] for column in self._bias)
        logits.index_put_((rows, tokens), values, accumulate=True)
        for i, guided in combined.items():
            guided.index_put_((tokens[rows == i],), values[rows == i], accumulate=True)

    def _penalize(self, logits: Tensor) -> None:
        if self._penalized_tokens is None:
            rows = [row for i in self._penalized if (row := self._rows[i]) is not None]
            self._penalized_tokens = _PenalizedTokens(rows, logits.shape[1], logits.device)
        tokens, counts = self._penalized_tokens.tokens, self._penalized_tokens.counts()
        row_ids = torch.tensor(self._penalized, device=logits.device)[:, None]
        values = logits[row_ids, tokens]
        repetition, presence, frequency = self._penalties
        penalized = torch.where(values < 0, values * repetition, values / repetition)
        penalized -= presence * (counts > 0) + frequency * counts
        logits[row_ids, tokens] = torch.where(self._penalized_tokens.is_empty, values, penalized)

    def _columns(
        self, requests: Sequence[Request], *settings: Callable[[Request], float]
    ) -> list[Tensor]:
        return [column([setting(r) for r in requests], self._device) for setting in settings]


class _PenalizedTokens:
    """The tokens of penalized rows: penalties change the logits of these alone.

    Args:
        rows: Their prompts and what they have generated.
        vocab_size: Number of logits. Some models read tokens, such as those of images, that they
            cannot write.
        device: Device of the logits.

    Attributes:
        tokens: Of prompts and texts, `(num_rows, num_tokens)`; they may repeat.
        is_empty: Rows that have none: theirs are not tokens, `(num_rows, 1)`.
    """

    def __init__(self, rows: Sequence[SampledRow], vocab_size: int, device: torch.device) -> None:
        own = [sorted({t for t in (*row.prompt, *row.new) if t < vocab_size}) for row in rows]
        longest = max(1, *map(len, own))
        padded = [[*tokens, *(tokens or [0])[:1] * (longest - len(tokens))] for tokens in own]
        self.tokens = torch.tensor(padded, device=device)
        self.is_empty = torch.tensor([[not tokens] for tokens in own], device=device)
        self._counts = torch.zeros(len(rows), vocab_size, device=device)
        for i, row in enumerate(rows):
            new = torch.tensor(row.new, dtype=torch.int64, device=device)
            self._counts[i].scatter_add_(0, new, torch.ones_like(new, dtype=torch.float32))

    def counts(self) -> Tensor:
        """How often each of `tokens` was generated, `(num_rows, num_tokens)`."""
        return self._counts.gather(1, self.tokens)

    def append(self, new: Tensor) -> None:
        """Add a generated token per row, `(num_rows,)`."""
        new = new[:, None]
        self._counts.scatter_add_(1, new, torch.ones_like(new, dtype=torch.float32))
        self.tokens = torch.cat([torch.where(self.is_empty, new, self.tokens), new], 1)
        self.is_empty = torch.zeros_like(self.is_empty)


def _biased_logits(
    requests: Mapping[int, Request], device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows, tokens and values of all entries of `logit_bias`."""
    entries: list[tuple[Any, ...]] = [
        (i, token, value)
        for i, request in requests.items()
        for token, value in request.logit_bias.items()
    ]
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    return (
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


class RowSampling(LogitsProcessor):
    """Makes each row's choice inside transformers' greedy `generate`.

    Args:
        rows: The sampling of each of the first rows.
        device: Device of the logits.
        guidance: As of `BatchSampler`; their rows come after the first ones.
        note: Called with the rows for which no token can be chosen, `(num_rows,)`.
    """

    def __init__(
        self,
        rows: Sequence[SampledRow],
        device: torch.device,
        guidance: Mapping[int, Sequence[GuidanceTerm]] | None = None,
        *,
        note: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._rows, self._num_rows = rows, len(rows)
        self._num_before: int | None = None  # ids before the first generated one
        self._sampler = BatchSampler(rows, device, guidance)
        self._note = note

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process `scores` of shape `(num_rows or more, vocab_size)`.

        Returns:
            0 for each row's choice, and -inf elsewhere.
        """
        if self._num_before is None:
            self._num_before = input_ids.shape[1]
        for i, row in enumerate(self._rows):
            if row.constraint is not None:
                row.new = input_ids[i, self._num_before :].tolist()
        tokens = self._sampler(scores.float())[: self._num_rows]
        for error in self._sampler.errors.values():
            raise error
        if self._note is not None and self._sampler.is_impossible is not None:
            self._note(self._sampler.is_impossible[: self._num_rows])
        choices = scores.new_full((self._num_rows, scores.shape[1]), -math.inf)
        choices.scatter_(1, tokens[:, None], 0.0)
        if len(scores) == self._num_rows:
            return choices
        return torch.cat([choices, scores[self._num_rows :]])
