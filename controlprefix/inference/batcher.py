"""Batcher: the thread and the waiting queue that both kinds of batching share."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypedDict, Unpack

import torch

from controlprefix.completion import Completion
from controlprefix.errors import ControlPrefixError, OverloadedError, RequestError
from controlprefix.inference.guidance import RowPlan, plan_rows
from controlprefix.inference.json_constraint import JsonConstraint
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Deliver, Ticket, closing_error
from controlprefix.inference.sampling import SampledRow
from controlprefix.inference.stopping import IncrementalDetokenizer, completion_from_tokens
from controlprefix.inference.waiting_queue import WaitingQueue
from controlprefix.model import FrozenModel
from controlprefix.model.images import ImagePrompt
from controlprefix.model.languages import start_ids_of
from controlprefix.prefixes import Part, PrefixBatch, PrefixKey
from controlprefix.request import Request

_log = logging.getLogger("controlprefix")

_GATHERING_S = 0.003  # without a further request, after which an idle batch begins
_MAX_GATHERING_S = 0.05
_ACTIVE_S = 60.0  # how long a tenant counts as active after a request


class BatchLimits(TypedDict, total=False):
    """What a `Batcher` takes at a time.

    Attributes:
        max_sequences: Rows decoded concurrently, 32 if left out. A request has a row, and more
            with strengths below 0 or `mixing="logits"`.
        max_waiting: Requests that may wait for a row, 1024 if left out; more are refused.
        max_sequences_per_tenant: Rows that one tenant may have at a time, so that others find
            some free; left out, all of them.
        max_sequences_beside_others: Rows that one tenant may have while another has submitted
            a request within the last minute, since a step may take longer the more rows it has;
            left out, as many as otherwise. A request that needs more begins when its tenant has
            no others.
    """

    max_sequences: int
    max_waiting: int
    max_sequences_per_tenant: int | None
    max_sequences_beside_others: int | None


@dataclass(slots=True, eq=False)
class BatchedRequest:
    """One accepted request, in the waiting queue or in a batch.

    Attributes:
        resolved: The request with its prefixes.
        ticket: Where its text goes.
        prompt: Token ids of the prompt.
        start: Token ids in front of the new ones: the prompt, or what an encoder-decoder's decoder
            starts with.
        plan: Its rows: the base row, then one per part applied in logit space.
        top_log_probs: How many log-probabilities to record per token; None for none.
        new: Tokens generated so far.
        text: Gives out its text while tokens are generated.
        sampling: Its sampling settings and random generator.
        position_offset: By how much its positions differ from counting tokens, as behind images.
        row_keys: Per row, what it reads: the prompt and the parts; equal for choices of a prompt.
    """

    resolved: ResolvedRequest[Any]
    ticket: Ticket
    prompt: tuple[int, ...]
    start: tuple[int, ...]
    plan: RowPlan
    top_log_probs: int | None
    text: IncrementalDetokenizer
    new: list[int] = field(default_factory=list)
    sampling: SampledRow = field(init=False)
    position_offset: int = 0
    row_keys: list[Hashable] = field(init=False)

    def __post_init__(self) -> None:
        self.sampling = SampledRow(self.request, self.start, self.new)
        # Bytes keep their hash.
        has_images = isinstance(self.prompt, ImagePrompt)
        prompt = id(self) if has_images else array("q", self.prompt).tobytes()
        start = array("q", self.start).tobytes() if self.start is not self.prompt else b""
        self.row_keys = [
            (prompt, start, tuple((id(p.prefix), p.strength, p.schedule) for p in parts))
            for parts in self.rows
        ]

    @property
    def request(self) -> Request:
        """The request."""
        request: Request = self.resolved.request
        return request

    @property
    def rows(self) -> list[list[Part]]:
        """The parts of each of its rows."""
        return self.plan.rows

    @property
    def weights(self) -> list[float]:
        """The guidance weights of the rows after the first."""
        return [term.weight for term in self.plan.terms[0]]

    @property
    def num_tokens(self) -> int:
        """Tokens that its rows may take in all."""
        return (len(self.prompt) + self.request.max_new_tokens) * len(self.rows)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the cache: the newest one is not there yet."""
        return len(self.start) + max(0, len(self.new) - 1)

    def finish(self, completion: Completion) -> None:
        """Give the ticket the completion, and of its text what was held back."""
        if rest := self.text.rest(completion.text):
            self.ticket.put(rest)
        self.ticket.put(self.resolved.report_in(completion))


class Batcher(ABC):
    """Runs submitted requests on one frozen model, in a thread of its own.

    Args:
        frozen: The model.
        limits: How much at a time.
    """

    supports_log_probs: bool

    def __init__(self, frozen: FrozenModel, **limits: Unpack[BatchLimits]) -> None:
        max_sequences = limits.get("max_sequences", 32)
        max_waiting = limits.get("max_waiting", 1024)
        if max_sequences < 1 or max_waiting < 0:
            raise RequestError(
                f"max_sequences is {max_sequences} and max_waiting {max_waiting}; they must be at "
                "least 1 and 0"
            )
        self._frozen = frozen
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        per_tenant = limits.get("max_sequences_per_tenant") or max_sequences
        self._max_per_tenant = min(per_tenant, max_sequences)
        self._max_beside_others = limits.get("max_sequences_beside_others") or self._max_per_tenant
        self._submitted_at: dict[str, float] = {}  # by tenant; the others' limit depends on it
        self._waiting: WaitingQueue[BatchedRequest] = WaitingQueue(
            lambda sequence: len(sequence.rows), lambda sequence: sequence.num_tokens
        )
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="controlprefix-batch", daemon=True)
        self._thread.start()

    @abstractmethod
    def _step(self) -> None:
        """Run one step of the active sequences, and admit waiting ones."""

    @abstractmethod
    def _running(self) -> list[BatchedRequest]:
        """The accepted sequences that no longer wait."""

    @abstractmethod
    def _reset(self) -> None:
        """Drop everything that runs, after an error."""

    @property
    @abstractmethod
    def _num_rows(self) -> int:
        """Rows that are occupied."""

    def submit(
        self,
        resolved: ResolvedRequest[Any],
        *,
        top_log_probs: int | None = None,
        deliver: Deliver | None = None,
    ) -> Ticket:
        """Start a request: see `Runner.submit`.

        Raises:
            RequestError: If it has beams, or needs more rows than the batch has.
            OverloadedError: If too many requests are waiting, or the batcher is closing.
        """
        request = resolved.request
        if request.num_beams > 1:
            raise RequestError("beam search cannot join a running batch; use generate")
        if top_log_probs is not None and not self.supports_log_probs:
            raise RequestError(
                f"log-probabilities are not supported for {type(self._frozen.model).__name__} "
                "here; leave them out"
            )
        self.require_capacity()
        if resolved.num_rows > self._max_per_tenant:
            raise RequestError(
                f"the request needs {resolved.num_rows} rows of the batch (its own, one per "
                "strength below 0, and one per label with mixing='logits'), but may use "
                f"{self._max_per_tenant}; name fewer such labels, or raise max_sequences"
            )
        tokenizer = self._frozen.request_tokenizer
        resolved, prompt = resolved.fitted(tokenizer)
        start = prompt
        if self._frozen.is_encoder_decoder:
            start = start_ids_of(prompt, tokenizer.decoder_start_ids)
        sequence = BatchedRequest(
            resolved,
            Ticket(deliver),
            prompt,
            start,
            plan_rows([resolved]),
            top_log_probs,
            IncrementalDetokenizer(tokenizer, resolved.request),
        )
        sequence.ticket.num_prompt_tokens = len(prompt)
        if request.json_schema is not None:
            sequence.sampling.constraint = JsonConstraint(
                self._frozen, request.json_schema, len(start)
            )
        with self._wake:
            self.require_capacity()
            is_shared = self._max_per_tenant < self._max_sequences
            own_limit = self._max_waiting - self._max_waiting // 8
            if is_shared and self._waiting.num_waiting(resolved.tenant) >= own_limit:
                raise OverloadedError(
                    f"{own_limit} requests of this tenant are waiting already; try again later"
                )
            self._waiting.add(resolved.tenant, sequence)
            self._submitted_at[resolved.tenant] = time.monotonic()
            self._wake.notify()
        return sequence.ticket

    @property
    def load(self) -> tuple[int, int]:
        """Number of rows in the batch, and of requests that wait."""
        return self._num_rows, len(self._waiting)

    def require_capacity(self) -> None:
        """Check that a request could be submitted now: see `Runner.require_capacity`.

        Raises:
            OverloadedError: If too many requests are waiting, or the batcher is closing.
        """
        if self._closing:
            raise closing_error()
        if len(self._waiting) >= self._max_waiting:
            raise OverloadedError(
                f"{self._max_waiting} requests are waiting already; try again later"
            )

    def check_health(self) -> None:  # noqa: B027 (nothing to check: the engine is this process)
        """Does nothing: the engine is this process."""

    def forget(  # noqa: B027 (nothing is kept)
        self, tenant: str, key: PrefixKey, *, removed_at: datetime | None = None
    ) -> None:
        """Does nothing: only the requests that run have prefixes here."""

    def remove_expired(self) -> None:  # noqa: B027 (nothing is kept)
        """Does nothing: only the requests that run have prefixes here."""

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Accept no more requests, and finish the accepted ones: see `Runner.close`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        finished = not self._thread.is_alive()
        self._abandoned = True
        self._thread.join()
        return finished

    # --- in the batcher's thread -------------------------------------------------------------

    def _run(self) -> None:
        # While there is work, the model stays prepared for slots: it costs little per step.
        ready = PrefixBatch(num_rows=1, blocks={})
        while self._wait_for_work():
            try:
                with torch.no_grad(), self._frozen.attached(ready):
                    while self._has_work():
                        self._step()
            except BaseException as error:  # running sequences cannot continue
                running = self._running()
                if not running:  # else the next step would fail in the same way
                    with self._wake:
                        running = self._waiting.remove(lambda _: True)
                self._reset()
                event: Exception
                if isinstance(error, ControlPrefixError):
                    event = error
                else:
                    _log.exception("the batch failed")
                    event = RuntimeError(f"{type(error).__name__}: {error}")
                    event.__cause__ = error
                for sequence in running:
                    sequence.ticket.put(event)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._has_work():
                if self._closing:
                    return False
                self._wake.wait()
            if not self._running():
                self._wait_for_more()
            return True

    def _wait_for_more(self) -> None:
        """Wait as long as requests come one after another: prompts are cheaper together."""
        latest = time.monotonic() + _MAX_GATHERING_S
        while not self._closing and self._waiting.num_rows < self._max_sequences:
            num_waiting = len(self._waiting)
            left = latest - time.monotonic()
            if left <= 0 or not self._wake.wait(min(left, _GATHERING_S)):
                return
            if len(self._waiting) == num_waiting:  # woken by something else
                return

    def _has_work(self) -> bool:
        return bool(len(self._waiting) or self._running())

    def _take_waiting(self) -> list[BatchedRequest]:
        """Remove the next sequences from the waiting queue that fit into the free rows."""
        taken: list[BatchedRequest] = []
        held = Counter[str]()
        for running in self._running():
            held[running.resolved.tenant] += len(running.rows)
        with self._wake:
            while True:
                free_rows = self._max_sequences - held.total()
                sequence = self._waiting.take(free_rows, self._quotas(held))
                if sequence is None:
                    return taken
                taken.append(sequence)
                held[sequence.resolved.tenant] += len(sequence.rows)

    def _quotas(self, held: Mapping[str, int]) -> Mapping[str, int]:
        """Per tenant that waits, the rows that it may take beside those that it holds."""
        earliest = time.monotonic() - _ACTIVE_S
        self._submitted_at = {t: at for t, at in self._submitted_at.items() if at >= earliest}
        result = {}
        for tenant in self._waiting.tenants:
            own = held.get(tenant, 0)
            has_others = bool(self._submitted_at.keys() - {tenant})
            limit = self._max_beside_others if has_others and own else self._max_per_tenant
            result[tenant] = limit - own
        return result

    def _drop_cancelled_waiting(self) -> None:
        with self._wake:
            cancelled = self._waiting.remove(self._is_cancelled)
        for sequence in cancelled:
            sequence.finish(self._completion(sequence))

    def _is_cancelled(self, sequence: BatchedRequest) -> bool:
        return self._abandoned or sequence.ticket.is_cancelled

    def _completion(self, sequence: BatchedRequest) -> Completion:
        tokenizer = self._frozen.request_tokenizer
        return completion_from_tokens(tokenizer, sequence.request, sequence.prompt, sequence.new)
