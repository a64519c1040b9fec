"""Generator: generate, stream, score and assemble resolved requests on one frozen model."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from controlprefix.completion import Completion, Score
from controlprefix.errors import ContextLengthError, RequestError
from controlprefix.example import Example
from controlprefix.inference.batch_cache import can_share_running_batch
from controlprefix.inference.batcher import Batcher, BatchLimits
from controlprefix.inference.continuous_batching import ContinuousBatcher
from controlprefix.inference.guidance import guided_log_probs, guided_target_logits, plan_rows
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.static_batching import StaticBatcher
from controlprefix.inference.static_generation import batches_of, generate_batch
from controlprefix.inference.stopping import IncrementalDetokenizer
from controlprefix.model import FrozenModel
from controlprefix.model.images import ImagePrompt
from controlprefix.model.log_probs import TokenLogProbs, token_log_probs_of
from controlprefix.prefixes import PrefixBatch
from controlprefix.request import Request


class Generator:
    """Carries out resolved requests on one frozen model.

    Args:
        frozen: The model.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen

    def generate(
        self, resolved: Sequence[ResolvedRequest[Request]], *, batch_size: int
    ) -> list[Completion]:
        """Generate for requests, `batch_size` at a time.

        Raises:
            RequestError: If a prompt cannot be tokenized, or does not fit the context.
        """
        tokenizer = self._frozen.request_tokenizer
        fitted = [request.fitted(tokenizer) for request in resolved]
        resolved, prompts = [request for request, _ in fitted], [prompt for _, prompt in fitted]
        completions: dict[int, Completion] = {}
        requests = [request.request for request in resolved]
        for indices in batches_of(self._frozen, requests, prompts, _checked(batch_size)):
            batch = generate_batch(
                self._frozen, [resolved[i] for i in indices], [prompts[i] for i in indices]
            )
            for i, completion in zip(indices, batch, strict=True):
                if isinstance(completion, Exception):
                    raise completion
                completions[i] = completion
        return [completions[i] for i in range(len(resolved))]

    def stream(self, resolved: ResolvedRequest[Request]) -> Iterator[str]:
        """Generate for one request, yielding its text as it is generated.

        Leaving the loop early ends the generation.

        Raises:
            RequestError: If the request has beams, or its prompt does not fit the context.
        """
        request = resolved.request
        if request.num_beams > 1:
            raise RequestError("beam search cannot be streamed; use generate, or num_beams=1")
        resolved, prompt = resolved.fitted(self._frozen.request_tokenizer)
        request = resolved.request
        streamer = _TokenStreamer()
        cancelled = threading.Event()

        def run() -> None:
            try:
                (result,) = generate_batch(
                    self._frozen, [resolved], [prompt], streamer=streamer, cancelled=cancelled
                )
                streamer.tokens.put(result)
            except BaseException as failure:
                streamer.tokens.put(failure)

        thread = threading.Thread(target=run, name="controlprefix-stream", daemon=True)
        thread.start()
        texts, new = IncrementalDetokenizer(self._frozen.request_tokenizer, request), list[int]()
        finished = False
        try:
            while not isinstance(item := streamer.tokens.get(), (Completion, BaseException)):
                if finished:  # what follows may still be an error
                    continue
                new.append(item)
                text, finished = texts.update(new)
                if text:
                    yield text
            if isinstance(item, BaseException):
                raise item
        finally:
            cancelled.set()
            thread.join()

    def score(
        self, resolved: Sequence[ResolvedRequest[Example]], *, batch_size: int
    ) -> list[Score]:
        """Score examples' completions, `batch_size` at a time.

        Raises:
            RequestError: If an example does not fit the context.
        """
        tokenizer = self._frozen.request_tokenizer
        examples = tokenizer.ids_of_examples([request.request for request in resolved])
        by_length = sorted(
            range(len(examples)),
            key=lambda i: len(examples[i].prompt) + len(examples[i].completion),
        )
        scores: dict[int, Score] = {}
        lengths = [len(examples[i].prompt) + len(examples[i].completion) for i in by_length]
        for positions in self._frozen.batches(lengths, _checked(batch_size)):
            indices = [by_length[i] for i in positions]
            plan = plan_rows([resolved[i] for i in indices])
            batch = self._frozen.assemble(plan.rows)
            with torch.no_grad(), self._frozen.attached(batch):
                log_probs = guided_log_probs(
                    self._frozen,
                    plan,
                    [examples[i].prompt for i in indices],
                    [examples[i].completion for i in indices],
                )
            for i, row in zip(indices, log_probs, strict=True):
                scores[i] = Score(
                    log_likelihood=float(row.cpu().double().sum()), num_tokens=len(row)
                )
        return [scores[i] for i in range(len(resolved))]

    def prompt_log_probs(
        self, resolved: Sequence[ResolvedRequest[Request]], *, top: int, batch_size: int
    ) -> list[list[TokenLogProbs | None]]:
        """Log-probabilities of the tokens of prompts; None for each first one.

        Raises:
            RequestError: If the model is an encoder-decoder, which does not predict prompts.
            ContextLengthError: If a prompt does not fit the context.
        """
        tokenizer = self._frozen.request_tokenizer
        if top < 0:
            raise RequestError(f"top is {top}; it must be 0 or more")
        if self._frozen.is_encoder_decoder:
            raise RequestError("an encoder-decoder does not predict its prompt's tokens")
        prompts = []
        for request in resolved:
            prompts.append(tokenizer.prompt_ids(request.request))
            if isinstance(prompts[-1], ImagePrompt):
                raise RequestError("prompt log-probabilities are not computed for images")
            limit = tokenizer.context_length
            if limit is not None and len(prompts[-1]) > limit:
                raise ContextLengthError(
                    f"this model's maximum context length is {limit} tokens, but the prompt has "
                    f"{len(prompts[-1])}; shorten it"
                )
        results: dict[int, list[TokenLogProbs | None]] = {
            i: [None] for i, prompt in enumerate(prompts) if len(prompt) == 1
        }
        rest = [i for i in range(len(prompts)) if i not in results]
        batches = self._frozen.batches([len(prompts[i]) for i in rest], _checked(batch_size))
        for positions in batches if rest else ():
            indices = [rest[i] for i in positions]
            plan = plan_rows([resolved[i] for i in indices])
            batch = self._frozen.assemble(plan.rows)
            targets = [prompts[i][1:] for i in indices]
            with torch.no_grad(), self._frozen.attached(batch):
                rows = guided_target_logits(
                    self._frozen, plan, [prompts[i][:1] for i in indices], targets
                )
            for i, row, ids in zip(indices, rows, targets, strict=True):
                results[i] = [None, *token_log_probs_of(row, ids, top)]
        return [results[i] for i in range(len(prompts))]

    @contextlib.contextmanager
    def assembled(self, resolved: Sequence[ResolvedRequest[Request]]) -> Iterator[PrefixBatch]:
        """Steer any transformers call on the model while inside, row i by request i.

        Raises:
            RequestError: If a request needs logits or new tokens, which only the caller has.
        """
        if any(request.request.schedules for request in resolved):
            raise RequestError("schedules need to know the tokens; use generate or stream")
        plan = plan_rows(resolved)
        if plan.has_guidance:
            raise RequestError(
                "a strength below 0, or mixing='logits', changes logits, not attention; use "
                "generate, stream or score" + "".join(r.note_on_opposites for r in resolved)
            )
        batch = self._frozen.assemble(plan.rows)
        with self._frozen.attached(batch, everywhere=True):
            yield batch

    def batcher(self, *, max_prefill_tokens: int = 512, **limits: Unpack[BatchLimits]) -> Batcher:
        """A batcher for this model: continuous if the rows of its cache can be moved."""
        if can_share_running_batch(self._frozen):
            return ContinuousBatcher(self._frozen, max_prefill_tokens=max_prefill_tokens, **limits)
        return StaticBatcher(self._frozen, **limits)


class _TokenStreamer(BaseStreamer):
    """Puts generated tokens into a queue, without the prompt, which `generate` puts first."""

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | Completion | BaseException] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens.put(token)

    def end(self) -> None:
        """Nothing to do: the completion follows."""


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be 1 or more")
    return batch_size
