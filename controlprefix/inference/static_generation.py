"""Generation for one static batch, each row with its own settings, seed and limits.

transformers has one generation config per batch. So it decodes greedily here, and a logits
processor makes each row's choice (see `sampling`).
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from controlprefix.completion import Completion
from controlprefix.errors import MissingDependencyError, ModelOutputError
from controlprefix.inference.generation_config import batch_config, own_prompt_processors
from controlprefix.inference.guidance import RowPlan, plan_rows
from controlprefix.inference.json_constraint import JsonConstraint
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.sampling import RowSampling, SampledRow
from controlprefix.inference.stopping import completion_from_tokens, has_stop
from controlprefix.model import FrozenModel
from controlprefix.model.images import image_inputs
from controlprefix.model.kv_cache import cache_argument, growing_cache
from controlprefix.model.languages import start_ids_of
from controlprefix.model.padding import pad_rows
from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.prefixes import PrefixBatch
from controlprefix.request import Request

# Tokens of each request so far -> which requests to end.
OnStep = Callable[[Sequence[Sequence[int]]], Sequence[bool]]


def generate_batch(
    frozen: FrozenModel,
    resolved: Sequence[ResolvedRequest[Any]],
    prompts: Sequence[Sequence[int]],
    *,
    streamer: Any = None,
    cancelled: threading.Event | None = None,
    on_step: OnStep | None = None,
) -> list[Completion | ModelOutputError]:
    """Generate for requests that can share a batch (see `batches_of`).

    A request for which no token can be chosen has an error in its place.

    Args:
        frozen, resolved, prompts, streamer, cancelled, on_step: As in `generate_tokens`.
    """
    rows = generate_tokens(
        frozen, resolved, prompts, streamer=streamer, cancelled=cancelled, on_step=on_step
    )
    tokenizer = frozen.request_tokenizer
    return [
        ModelOutputError()
        if new is None
        else request.report_in(completion_from_tokens(tokenizer, request.request, prompt, new))
        for request, prompt, new in zip(resolved, prompts, rows, strict=True)
    ]


def generate_tokens(
    frozen: FrozenModel,
    resolved: Sequence[ResolvedRequest[Any]],
    prompts: Sequence[Sequence[int]],
    *,
    streamer: Any = None,
    cancelled: threading.Event | None = None,
    on_step: OnStep | None = None,
    config: GenerationConfig | None = None,
) -> list[list[int] | None]:
    """Generate token ids for requests that can share a batch (see `batches_of`).

    Args:
        frozen: The model.
        resolved: At least one.
        prompts: Token ids of each request's prompt.
        streamer: A transformers streamer, for a single request.
        cancelled: Generation ends at the next token when it is set.
        on_step: Called with each request's tokens after each step, and tells which requests to
            end; not for beams.
        config: The config of `generate`; left out, the model's, as the requests mean it.

    Returns:
        The new token ids of each request, with what follows its end; None if no token can be
        chosen for it.
    """
    tokenizer = frozen.request_tokenizer
    plan = plan_rows(resolved)
    batch = frozen.assemble(plan.rows)
    own_requests = [request.request for request in resolved]
    requests = [own_requests[i] for i in plan.request_of_row]
    row_prompts = [prompts[i] for i in plan.request_of_row]
    left = not frozen.is_encoder_decoder
    ids, mask = pad_rows(row_prompts, frozen.pad_id, left=left)
    lengths = [len(prompt) for prompt in row_prompts]
    options: dict[str, Any] = dict(image_inputs(row_prompts, lengths, frozen.model))
    num_before = ids.shape[1]  # columns before the first new token
    if frozen.is_encoder_decoder:
        default = tokenizer.decoder_start_ids
        decoder_starts = [start_ids_of(prompt, default) for prompt in row_prompts]
        decoder_ids = torch.tensor(decoder_starts, device=frozen.device)
        options["decoder_input_ids"], num_before = decoder_ids, decoder_ids.shape[1]
    criteria = StoppingCriteriaList()
    limits = _RowLimits(requests, num_before, tokenizer, frozen.device)
    check = _NanCheck(len(row_prompts), limits)
    processors = LogitsProcessorList([check])
    criteria.append(check.ends_rows)
    config = config or batch_config(frozen, requests)
    paddings = [ids.shape[1] - length if left else 0 for length in lengths]
    processors.extend(own_prompt_processors(frozen, config, row_prompts, paddings, num_before))
    has_beams = requests[0].num_beams > 1
    if plan.has_guidance or (
        not has_beams and any(request.changes_logits for request in own_requests)
    ):
        starts = decoder_starts if frozen.is_encoder_decoder else prompts
        rows = [
            SampledRow(
                request,
                start,
                constraint=None
                if request.json_schema is None
                else JsonConstraint(frozen, request.json_schema, len(start)),
            )
            for request, start in zip(own_requests, starts, strict=False)  # without guidance rows
        ]
        guidance = dict(enumerate(plan.terms))
        processors.append(RowSampling(rows, frozen.device, guidance, note=check.note))
    if plan.has_guidance:
        processors.append(_SameChoice(plan.request_of_row))
        streamer = streamer and _FirstRowStreamer(streamer)
    if batch.is_scheduled:
        batch.set_token(0)
        criteria.append(_ScheduleUpdate(batch, num_before))
    if not has_beams:
        criteria.append(limits)
        if config.forced_eos_token_id is not None:  # at each row's own limit, not the batch's
            processors.append(_ForcedEnds(requests, num_before, config.forced_eos_token_id))
            config.update(forced_eos_token_id=None)
    steps = None if on_step is None else _EachStep(on_step, plan, num_before)
    if steps is not None:
        criteria.append(steps)
    if cancelled is not None:
        criteria.append(_Cancelled(cancelled))
    if config.cache_implementation is None:
        cache = growing_cache(frozen.model, len(requests), batch.num_slots)
        options |= {} if cache is None else {cache_argument(frozen.model): cache}
    with torch.no_grad(), frozen.exclusive(), frozen.attached(batch):
        try:
            sequences = frozen.model.generate(  # type: ignore[operator]  # stubs: Tensor | Module
                input_ids=ids.to(frozen.device),
                attention_mask=mask.to(frozen.device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
                streamer=streamer,
                **options,
            )
        except ImportError as error:  # such as of a quantized cache
            raise MissingDependencyError(
                f"the model's generation config needs a package: {error}"
            ) from error
    invalid = {plan.request_of_row[i] for i in check.invalid.nonzero().flatten().tolist()}
    ends = {} if steps is None else steps.lengths
    return [
        None if i in invalid else row[num_before:].tolist()[: ends.get(i)]
        for i, row in enumerate(sequences[: len(resolved)])
    ]


def batches_of(
    frozen: FrozenModel,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    size: int,
) -> Iterator[list[int]]:
    """Indices of requests that share a batch, at most `size` each."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(_batch_key(request), []).append(i)
    for group in groups.values():
        lengths = [len(prompts[i]) + requests[i].max_new_tokens for i in group]
        for batch in frozen.batches(lengths, size):
            yield [group[i] for i in batch]


def _batch_key(request: Request) -> tuple[Any, ...]:
    """Requests with equal keys can share a batch.

    Beam search has one setting for all rows, and a decoder starts from as many tokens in each.
    """
    beams, is_targeted = request.num_beams, request.target_language is not None
    if beams == 1:
        return (1, is_targeted)
    return (beams, is_targeted, request.max_new_tokens, request.repetition_penalty)


class _NanCheck(LogitsProcessor):
    """Notes the rows whose logits are NaN, and ends them; the other rows go on.

    Attributes:
        invalid: Per row, whether it was.
    """

    def __init__(self, num_rows: int, limits: "_RowLimits") -> None:
        self._limits = limits
        self.invalid = torch.zeros(num_rows, dtype=torch.bool, device=limits.ended.device)

    def note(self, invalid: Tensor) -> None:
        """Note that some of the first rows are invalid, unless they have ended before.

        Args:
            invalid: `(num_rows or fewer,)`.
        """
        first = slice(len(invalid))
        self.invalid[first] |= invalid & ~self._limits.ended[first]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        invalid = scores.amax(1).isnan()
        if len(invalid) == len(self.invalid):
            self.note(invalid)
            return scores  # of no effect: such a row ends
        # Beams stand together, and are sorted by scores that must be numbers.
        self.invalid |= invalid.view(len(self.invalid), -1).any(1)
        return scores.masked_fill(invalid[:, None], 0.0)

    def ends_rows(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion."""
        return self.invalid.repeat_interleave(len(input_ids) // len(self.invalid))


class _SameChoice(LogitsProcessor):
    """Gives all rows of a request the choice of its first row."""

    def __init__(self, request_of_row: Sequence[int]) -> None:
        self._request_of_row = list(request_of_row)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[self._request_of_row]


class _FirstRowStreamer(BaseStreamer):
    """Gives a streamer, which takes one row, the request's base row."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        self._streamer.put(value[:1])

    def end(self) -> None:
        self._streamer.end()


class _RowLimits(StoppingCriteria):
    """Ends each row at its own `max_new_tokens`, or at one of its `stop` texts.

    Attributes:
        ended: Per row, whether it has ended, also by an end token.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        num_before: int,
        tokenizer: RequestTokenizer,
        device: torch.device,
    ) -> None:
        self.ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._end_ids = torch.tensor(sorted(tokenizer.end_ids), dtype=torch.long, device=device)
        self._requests = requests
        self._num_before = num_before
        self._tokenizer = tokenizer
        self._limits = torch.tensor([request.max_new_tokens for request in requests])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._num_before :]
        finished = self._limits.to(new.device) <= new.shape[1]
        for i, request in enumerate(self._requests):
            if request.stop and not finished[i]:
                finished[i] = has_stop(self._tokenizer, request, new[i].tolist())
        self.ended |= finished | torch.isin(new[:, -1], self._end_ids)
        return finished


class _ForcedEnds(LogitsProcessor):
    """Makes the last token of each row's limit an end token, as a model's config may say."""

    def __init__(
        self, requests: Sequence[Request], num_before: int, end_ids: int | Sequence[int]
    ) -> None:
        self._last = torch.tensor([num_before + r.max_new_tokens - 1 for r in requests])
        self._end_ids = [end_ids] if isinstance(end_ids, int) else list(end_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = (self._last == input_ids.shape[1]).to(scores.device)
        ends = torch.full_like(scores[:1], -math.inf)
        ends[:, self._end_ids] = 0
        return torch.where(rows[:, None], ends, scores)


class _ScheduleUpdate(StoppingCriteria):
    """Stops nothing: sets scheduled strengths to their values at the next token."""

    def __init__(self, batch: PrefixBatch, num_before: int) -> None:
        self._batch = batch
        self._num_before = num_before

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._batch.set_token(input_ids.shape[1] - self._num_before)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _EachStep(StoppingCriteria):
    """Shows each request's tokens to a function, and ends the requests that it names.

    Attributes:
        lengths: How many tokens those requests had then; padding follows.
    """

    def __init__(self, on_step: OnStep, plan: RowPlan, num_before: int) -> None:
        self._on_step, self._plan, self._num_before = on_step, plan, num_before
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        num_requests = len(self._plan.terms)
        new = input_ids[:num_requests, self._num_before :].tolist()
        ended = self._on_step(new)
        for i in range(num_requests):
            if ended[i]:
                self.lengths.setdefault(i, len(new[i]))
        rows = [ended[i] for i in self._plan.request_of_row]
        return torch.tensor(rows, dtype=torch.bool, device=input_ids.device)


class _Cancelled(StoppingCriteria):
    """Ends all rows when an event is set."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._cancelled.is_set(), device=input_ids.device)
