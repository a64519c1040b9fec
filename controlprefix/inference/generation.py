"""Generate for a batch of requests, each row with its own settings, seed and limits.

transformers runs one setting for a whole batch. So it decodes greedily here, and a
logits processor makes each row's choice: adding Gumbel noise to a row's
log-probabilities and taking the largest is exactly a draw from them (Gumbel-max). A
row's text therefore does not depend on the rows beside it.
"""

import copy
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from controlprefix.inference.guidance import Guidance, steered
from controlprefix.model.kv_cache import growing_cache
from controlprefix.model.tokenization import RequestEncoder, pad_rows
from controlprefix.prefixes.assembly import PrefixBatch
from controlprefix.request import Completion, Request


def generate_batch(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    guidance: Guidance,
    batch: PrefixBatch,
    *,
    streamer: Any = None,
    cancelled: threading.Event | None = None,
) -> list[Completion]:
    """Generate for requests that agree on `batch_key`, in one batch.

    Args:
        model: With `batch` attached.
        encoder: Of the model.
        requests: At least one.
        prompts: Their token ids, from `encoder.prompt_ids`.
        guidance: Which rows there are.
        batch: The prefix batch of `guidance.rows`.
        streamer: Of transformers, for a single request.
        cancelled: When set, generation ends at the next token.
    """
    left = not encoder.is_encoder_decoder
    num_requests = len(requests)
    requests = [requests[i] for i in guidance.requests]
    prompts = [prompts[i] for i in guidance.requests]
    ids, mask = pad_rows(prompts, encoder.pad_id, left=left)
    device = model.device
    # What stands before the first new token of a row: its prompt, or a decoder's start token.
    num_before = ids.shape[1] if left else 1
    starts = [num_before - len(prompt) if left else 0 for prompt in prompts]

    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
    beams = requests[0].num_beams > 1
    if not beams and any(r.samples or r.repetition_penalty != 1.0 for r in requests):
        processors.append(_RowChoices(requests[:num_requests], starts, device))
    if not guidance.is_plain:
        processors = LogitsProcessorList([_Guided(guidance, processors)])
        streamer = streamer and _OfTheFirstRow(streamer)
    if batch.is_scheduled:
        batch.move_to(0)
        criteria.append(_Scheduled(batch, num_before))
    if not beams:
        criteria.append(_RowLimits(requests, num_before, encoder))
    if cancelled is not None:
        criteria.append(_Cancelled(cancelled))
    config = _generation_config(model, encoder, requests)
    cache = growing_cache(model, len(requests)) if config.cache_implementation is None else None
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    with torch.no_grad():
        sequences = model.generate(  # type: ignore[operator]  # the stubs say Tensor | Module
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=streamer,
            **options,
        )
    return [
        completion_of(encoder, request, prompt, row[num_before:].tolist())
        for request, prompt, row in [*zip(requests, prompts, sequences, strict=True)][:num_requests]
    ]


def batch_key(request: Request) -> tuple[Any, ...]:
    """Requests with equal keys can share a batch: beam search has one setting for all rows."""
    beams = request.num_beams
    return (1,) if beams == 1 else (beams, request.max_new_tokens, request.repetition_penalty)


def hold_back_stops(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a stream, ending before the first stop text, even one split over pieces.

    Example:
        >>> list(hold_back_stops(iter(["one EN", "D two"]), ["END"]))
        ['one ']
    """
    held = ""
    for piece in pieces:
        held += piece
        cut = first_stop(held, stops)
        if cut is not None:
            if held[:cut]:
                yield held[:cut]
            return
        keep = begun_stop(held, stops)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """How many letters at the end of a text may be the beginning of a stop text.

    Example:
        >>> begun_stop("one EN", ["END"])
        2
    """
    return max(
        (
            n
            for stop in stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )


class Choice:
    """How one request chooses a token: the largest of what this makes of its logits.

    Args:
        request: Its sampling, with its seed.
        device: Of the logits.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self._warpers: list[Any] = []
        if request.repetition_penalty != 1.0:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
        if request.temperature is not None:
            self._warpers.append(TemperatureLogitsWarper(request.temperature))
        if request.top_k is not None:
            self._warpers.append(TopKLogitsWarper(request.top_k))
        if request.top_p is not None and request.top_p < 1:
            self._warpers.append(TopPLogitsWarper(request.top_p))
        if request.min_p is not None:
            self._warpers.append(MinPLogitsWarper(request.min_p))
        self._generator = None
        if request.samples:
            self._generator = torch.Generator(device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    @property
    def is_plain(self) -> bool:
        """Whether logits are left as they are."""
        return not self._warpers and self._generator is None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits to choose the largest of, `(1, vocabulary)`.

        Args:
            ids: Prompt and new tokens, `(1, tokens)`, without padding.
            logits: `(1, vocabulary)`.
        """
        for warper in self._warpers:
            logits = warper(ids, logits)
        if self._generator is not None:
            noise = torch.empty_like(logits).exponential_(generator=self._generator)
            logits = logits - noise.clamp_min(torch.finfo(logits.dtype).tiny).log()
        return logits


class _RowChoices(LogitsProcessor):
    """Each row's own sampling, expressed so that the largest logit is the choice."""

    def __init__(
        self, requests: Sequence[Request], starts: Sequence[int], device: torch.device
    ) -> None:
        choices = [Choice(request, device) for request in requests]
        self._rows = [
            (i, start, choice)
            for i, (choice, start) in enumerate(zip(choices, starts, strict=False))
            if not choice.is_plain
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for i, start, choice in self._rows:
            # The row without its padding: no penalty on the pad token.
            scores[i] = choice(input_ids[i : i + 1, start:], scores[i : i + 1])[0]
        return scores


class _Guided(LogitsProcessor):
    """Puts a request's rows together before its choice, and has them all make it."""

    def __init__(self, guidance: Guidance, choices: LogitsProcessorList) -> None:
        self._guidance = guidance
        self._choices = choices

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for i, terms in enumerate(self._guidance.terms):
            if terms:
                rows = [scores[term.row] for term in terms]
                scores[i] = steered(scores[i], rows, [term.weight for term in terms])
        scores = self._choices(input_ids, scores)  # type: ignore[arg-type]  # a Tensor will do
        return scores[self._guidance.requests]


class _OfTheFirstRow(BaseStreamer):
    """Shows a streamer, which takes one row, the request's own."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        self._streamer.put(value[:1])

    def end(self) -> None:
        self._streamer.end()


class _RowLimits(StoppingCriteria):
    """Ends each row at its own `max_new_tokens`, or at one of its `stop` texts."""

    def __init__(
        self, requests: Sequence[Request], num_before: int, encoder: RequestEncoder
    ) -> None:
        self._requests = requests
        self._num_before = num_before
        self._encoder = encoder
        self._limits = torch.tensor([request.max_new_tokens for request in requests])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._num_before :]
        done = self._limits.to(new.device) <= new.shape[1]
        for i, request in enumerate(self._requests):
            if request.stop and not done[i]:
                # A stop text of n characters lies within the last n tokens and a bit.
                tail = new[i, -(max(map(len, request.stop)) + 8) :].tolist()
                done[i] = first_stop(self._encoder.decode(tail), request.stop) is not None
        return done


class _Scheduled(StoppingCriteria):
    """Stops nothing: after each token, moves strengths on to the next."""

    def __init__(self, batch: PrefixBatch, num_before: int) -> None:
        self._batch = batch
        self._num_before = num_before

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._batch.move_to(input_ids.shape[1] - self._num_before)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Cancelled(StoppingCriteria):
    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._cancelled.is_set(), device=input_ids.device)


def _generation_config(
    model: PreTrainedModel, encoder: RequestEncoder, requests: Sequence[Request]
) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    first = requests[0]
    config.update(
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        num_return_sequences=1,
        num_beams=first.num_beams,
        repetition_penalty=first.repetition_penalty if first.num_beams > 1 else 1.0,
        max_length=None,
        max_new_tokens=max(request.max_new_tokens for request in requests),
        eos_token_id=list(encoder.end_ids) or None,
        pad_token_id=encoder.pad_id,
        return_dict_in_generate=False,
        use_cache=True,
    )
    return config


def completion_of(
    encoder: RequestEncoder, request: Request, prompt: Sequence[int], new: list[int]
) -> Completion:
    """What was generated, from the new tokens: cut at an end token, a stop text or the limit."""
    new = new[: request.max_new_tokens]
    reason: Literal["stop", "length"] = "length"
    end = next((i for i, token in enumerate(new) if token in encoder.end_ids), None)
    if end is not None:
        new, reason = new[:end], "stop"
    text = encoder.decode(new)
    cut = first_stop(text, request.stop)
    if cut is not None:
        text, reason = text[:cut], "stop"
        # What follows is padding while other rows went on.
        new = new[: _num_with_stop(encoder, request, new)]
    return Completion(
        text=text, finish_reason=reason, num_prompt_tokens=len(prompt), num_tokens=len(new)
    )


def _num_with_stop(encoder: RequestEncoder, request: Request, new: Sequence[int]) -> int:
    """How many tokens it took to the first stop text."""

    def has_stop(count: int) -> bool:
        return first_stop(encoder.decode(new[:count]), request.stop) is not None

    return 1 + bisect_left(range(1, len(new) + 1), True, key=has_stop)


def ready_text(encoder: RequestEncoder, request: Request, new: Sequence[int]) -> tuple[str, bool]:
    """What of the text of new tokens will stay whatever follows; and whether nothing follows."""
    is_end = new[-1] in encoder.end_ids
    done = is_end or len(new) >= request.max_new_tokens
    text = encoder.decode(new[:-1] if is_end else new)
    cut = first_stop(text, request.stop)
    if cut is not None:
        return text[:cut], True
    if done:
        return text, True
    # The other bytes of a last character may be still to come, and the rest of a stop text.
    text = text.rstrip("\ufffd")
    return text[: len(text) - begun_stop(text, request.stop)], False


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, if there is one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
