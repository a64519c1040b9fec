"""Continuous batching: rows join and leave a running batch between its steps.

One thread runs the model. Each turn it reads a piece of the prompts that have come, in a
batch of their own with a cache of their own; rows that are read move into the running
batch, which then takes a step. All rows end at the same place (as transformers pads for
generation), so any attention mask a model makes of that holds; each has its own prefix,
position, sampling, stop texts and end. What a row writes does not depend on the others.

Where a model's cache is more than the keys and values of all tokens (encoder-decoders, sliding or
recurrent layers), rows cannot join: `StaticBatcher` takes who waits together, a batch at a time.
"""

import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from controlprefix.errors import (
    ControlPrefixError,
    OverloadedError,
    RequestError,
)
from controlprefix.inference.generation import (
    Choice,
    batch_key,
    completion_of,
    generate_batch,
    ready_text,
)
from controlprefix.inference.guidance import Guidance, joined, steered
from controlprefix.model.kv_cache import Source, lay_out, new_cache, overwrite
from controlprefix.model.steering import Steering
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.assembly import Part, PrefixBatch
from controlprefix.request import Completion, PartUsed, Request, StandIn

_log = logging.getLogger(__name__)

_MOST_HOLES = 0.25  # of the rows; beyond, the others close up
_MOST_PADDING = 256  # columns that no row needs any more, before they are cut off


@dataclass(frozen=True, slots=True)
class TokenChosen:
    """A token, and how likely it was, in nats; the likeliest others where they were asked for."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


Event = str | Completion | BaseException  # a piece of text; at last the whole, or why not


class Prepared(NamedTuple):
    """What a request needs to be run.

    Attributes:
        guidance: Its rows: of this request alone.
        tenant: Whose it is.
        parts, stand_ins: As its completion will name them.
    """

    guidance: Guidance
    tenant: str
    parts: tuple[PartUsed, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()

    def named(self, done: Completion) -> Completion:
        """The completion, with what it was steered by."""
        return done.model_copy(update={"parts": self.parts, "stand_ins": self.stand_ins})


Prepare = Callable[[Request], Prepared]


class Runner(Protocol):
    """What runs requests as they come: a batch in this process, or another engine."""

    def submit(
        self,
        request: Request,
        *,
        top_log_probs: int | None = None,
        prepare: Prepare | None = None,
        deliver: Callable[[Event], object] | None = None,
    ) -> "Ticket":
        """See `Batcher.submit`."""

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and those that wait."""

    def check(self) -> None:
        """Raise OverloadedError where requests cannot be run now."""

    def close(self, *, wait: float | None = None) -> bool:
        """See `Batcher.close`."""


def shutting_down() -> OverloadedError:
    """Why a runner that is closing takes nothing."""
    return OverloadedError("no more requests are taken: this process is shutting down")


class Ticket:
    """What a submitted request comes to. Iterating gives its text piece by piece.

    Args:
        deliver: Given each event in place of that, in the thread that runs the model: it
            must not wait for anything.

    Attributes:
        tokens: Chosen so far, where log-probabilities were asked for.
    """

    def __init__(self, deliver: Callable[[Event], object] | None = None) -> None:
        self.tokens: list[TokenChosen] = []
        self._pieces: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver
        self._end: Completion | BaseException | None = None
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        if self._deliver is not None:
            raise RequestError("this ticket's events are delivered elsewhere")
        while self._end is None:
            found = self._pieces.get()
            if isinstance(found, str):
                yield found
            else:
                self._end = found
                self._pieces.put(found)  # for others who wait
        if isinstance(self._end, BaseException):
            raise self._end

    def result(self) -> Completion:
        """Wait for the end.

        Raises:
            ControlPrefixError: If it could not be carried out, or was cancelled.
        """
        for _ in self:
            pass
        assert isinstance(self._end, Completion)
        return self._end

    def cancel(self) -> None:
        """Leave the batch at the next step."""
        self._cancelled.set()

    def _put(self, event: Event) -> None:
        try:
            (self._deliver or self._pieces.put)(event)
        except Exception:  # whoever listens has failed: the others must not
            _log.exception("a ticket's listener failed; its request is cancelled")
            self.cancel()


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request on its way.

    Attributes:
        parts: Of each of its rows: its own, then those that lead away from a part.
        weights: Of the rows after the first.
        new: Tokens chosen so far.
        shown: Letters given to the ticket so far.
    """

    request: Request
    ticket: Ticket
    prompt: tuple[int, ...]
    prepared: Prepared
    parts: list[list[Part]]
    weights: list[float]
    choice: Choice
    top: int | None
    new: list[int] = field(default_factory=list)
    shown: int = 0

    @property
    def num_tokens(self) -> int:
        """In the cache, before the last chosen one is read."""
        return len(self.prompt) + max(0, len(self.new) - 1)


@dataclass(slots=True)
class _Reading:
    """Prompts that are being read, as a batch of their own, padded on the left."""

    sequences: list[_Sequence]
    ids: Tensor
    mask: Tensor
    cache: DynamicCache
    batch: PrefixBatch
    done: int = 0


class Batcher:
    """Runs requests on one frozen model, as they come.

    Args:
        model, encoder: A model whose cache `can_be_laid_out`, and what encodes for it.
        prepare: Finds a request's parts; called in the thread that submits it.
        max_rows: In the running batch.
        max_waiting: Requests that wait for a row; more are refused.
        read_tokens: Of prompts, read between two steps at most: the longer, the sooner a
            prompt is read, and the longer all others wait for their next token.
    """

    _gives_log_probs = True

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: RequestEncoder,
        prepare: Prepare,
        *,
        max_rows: int = 32,
        max_waiting: int = 1024,
        read_tokens: int = 512,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._prepare = prepare
        self._steering = Steering.of(model)
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._read_tokens = read_tokens
        self._waiting: deque[_Sequence] = deque()
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        # For each row its sequence, or None where one has left; a sequence's rows stand together.
        self._rows: list[_Sequence | None] = []
        self._firsts: dict[int, int] = {}  # id of a sequence -> its first row
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._cache = DynamicCache()
        self._batch: PrefixBatch | None = None
        self._reading: _Reading | None = None
        self._thread = threading.Thread(target=self._run, name="controlprefix-batch", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        top_log_probs: int | None = None,
        prepare: Prepare | None = None,
        deliver: Callable[[Event], object] | None = None,
    ) -> Ticket:
        """Have a request written.

        Args:
            request: Without beams.
            top_log_probs: Note each token's log-probability, and those of so many others.
            prepare: For this request, such as another tenant's.
            deliver: See `Ticket`.

        Raises:
            RequestError: If it cannot be carried out as written.
            UnknownNameError: If it names a task, label or user that does not exist.
            OverloadedError: If too many wait, or the batch is closing.
        """
        if request.num_beams > 1:
            raise RequestError("beam search cannot join a running batch; use generate")
        if top_log_probs is not None and not self._gives_log_probs:
            raise RequestError(
                f"log-probabilities cannot be had of {type(self._model).__name__} here; leave "
                "them out"
            )
        if len(self._waiting) >= self._max_waiting:  # before the store is asked
            raise self._overloaded()
        prepared = (prepare or self._prepare)(request)
        num_rows = len(prepared.guidance.rows)
        if num_rows > self._max_rows:
            raise RequestError(
                f"the request needs {num_rows} rows, one for each strength below 0 and, with "
                f"mixing='logits', for each label, beside its own; the batch has {self._max_rows}"
            )
        sequence = _Sequence(
            request=request,
            ticket=Ticket(deliver),
            prompt=self._encoder.prompt_ids(request),
            prepared=prepared,
            parts=prepared.guidance.rows,
            weights=[term.weight for term in prepared.guidance.terms[0]],
            choice=Choice(request, self._model.device),
            top=top_log_probs,
        )
        with self._wake:
            if self._closing:
                raise shutting_down()
            if len(self._waiting) >= self._max_waiting:
                raise self._overloaded()
            self._waiting.append(sequence)
            self._wake.notify()
        return sequence.ticket

    @property
    def load(self) -> tuple[int, int]:
        """Rows in the batch, and requests that wait."""
        return sum(row is not None for row in self._rows), len(self._waiting)

    def check(self) -> None:
        """It runs in this process: nothing to ask."""

    def close(self, *, wait: float | None = None) -> bool:
        """Take no more requests, and finish those there are.

        Args:
            wait: Seconds at most; then what is left is cancelled. None: as long as it takes.

        Returns:
            Whether all were finished.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(wait)
        finished = not self._thread.is_alive()
        self._abandoned = True
        self._thread.join()
        return finished

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(f"{self._max_waiting} requests wait already; try again later")

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except BaseException as error:  # nothing that is running can go on
                self._fail(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._firsts or self._reading):
                if self._closing:
                    return False
                self._wake.wait()
            return True

    @torch.no_grad()
    def _turn(self) -> None:
        self._drop_cancelled()
        if self._reading is None:
            self._begin_reading()
        if self._reading is not None:
            self._read_on(self._reading)
        if self._firsts:
            self._step()

    def _fail(self, error: BaseException) -> None:
        running = {id(s): s for s in self._rows if s is not None}
        for sequence in self._reading.sequences if self._reading else []:
            running[id(sequence)] = sequence
        self._rows, self._firsts, self._reading, self._batch = [], {}, None, None
        self._cache = DynamicCache()
        told = error if isinstance(error, ControlPrefixError) else RuntimeError(str(error))
        for sequence in running.values():
            sequence.ticket._put(told)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [s for s in self._waiting if self._is_gone(s)]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            self._end(sequence)
        for sequence in self._active():
            if self._is_gone(sequence):
                self._end(sequence)
                self._leave(sequence)

    def _is_gone(self, sequence: _Sequence) -> bool:
        return self._abandoned or sequence.ticket._cancelled.is_set()

    def _active(self) -> list[_Sequence]:
        return [self._rows[first] for first in self._firsts.values()]  # type: ignore[misc]

    def _begin_reading(self) -> None:
        free = self._max_rows - sum(row is not None for row in self._rows)
        chosen: list[_Sequence] = []
        with self._wake:
            while self._waiting and len(self._waiting[0].parts) <= free:
                chosen.append(self._waiting.popleft())
                free -= len(chosen[-1].parts)
        if not chosen:
            return
        try:
            self._reading = self._reading_of(chosen)
        except Exception as error:  # theirs alone: a prefix that does not fit, no memory
            for sequence in chosen:
                sequence.ticket._put(error)

    def _reading_of(self, chosen: list[_Sequence]) -> _Reading:
        batch = self._steering.assemble([parts for one in chosen for parts in one.parts])
        batch.move_to(0)
        prompts = [sequence.prompt for sequence in chosen for _ in sequence.parts]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._encoder.pad_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        device = self._model.device
        return _Reading(chosen, ids.to(device), mask.to(device), new_cache(self._model), batch)

    def _read_on(self, reading: _Reading) -> None:
        num_rows, longest = reading.ids.shape
        count = max(1, self._read_tokens // num_rows)
        end = min(longest, reading.done + count)
        try:
            logits = self._forward(
                reading.ids[:, reading.done : end],
                reading.mask[:, :end],
                (reading.mask.cumsum(1) - 1).clamp(min=0)[:, reading.done : end],
                reading.cache,
                reading.batch,
            )
        except Exception as error:  # theirs alone: the running batch goes on
            self._reading = None
            for sequence in reading.sequences:
                sequence.ticket._put(error)
            return
        reading.done = end
        if end == longest:
            self._join(reading)
            self._reading = None
            self._choose(reading.sequences, logits)

    def _join(self, reading: _Reading) -> None:
        """Move rows that are read into the running batch."""
        sources: dict[int, list[Source]] = {}
        row = 0
        for sequence in reading.sequences:
            sources[id(sequence)] = [
                Source(reading.cache, row + i, len(sequence.prompt))
                for i in range(len(sequence.parts))
            ]
            row += len(sequence.parts)
        length = self._mask.shape[1]
        fits = self._firsts and all(len(s.prompt) <= length for s in reading.sequences)
        holes = [i for i, one in enumerate(self._rows) if one is None]
        if fits and len(holes) == row and all(len(s.parts) == 1 for s in reading.sequences):
            for hole, sequence in zip(holes, reading.sequences, strict=True):
                overwrite(self._cache, hole, sources[id(sequence)][0])
                self._mask[hole] = 0
                self._mask[hole, length - len(sequence.prompt) :] = 1
                self._rows[hole] = sequence
                self._firsts[id(sequence)] = hole
            self._batch = None  # assembled anew at the next step
            return
        self._arrange([*self._active(), *reading.sequences], sources)

    def _arrange(
        self, sequences: Sequence[_Sequence], coming: dict[int, list[Source]] | None = None
    ) -> None:
        """Lay all rows out anew, beside each other and without columns that nobody needs."""
        sources: list[Source] = []
        rows: list[_Sequence] = []
        firsts: dict[int, int] = {}
        for sequence in sequences:
            first = self._firsts.get(id(sequence))
            firsts[id(sequence)] = len(rows)
            rows += [sequence] * len(sequence.parts)
            if first is None:
                sources += (coming or {})[id(sequence)]
            else:
                sources += [
                    Source(self._cache, first + i, sequence.num_tokens)
                    for i in range(len(sequence.parts))
                ]
        self._rows, self._firsts = list(rows), firsts
        if not sources:
            self._cache, self._batch = DynamicCache(), None
            self._mask = self._mask.new_zeros(0, 0)
            return
        length = max(source.num_tokens for source in sources)
        lay_out(self._cache, sources, length)
        self._mask = torch.zeros(len(sources), length, dtype=torch.long, device=self._model.device)
        for i, source in enumerate(sources):
            self._mask[i, length - source.num_tokens :] = 1
        self._batch = None  # assembled anew at the next step

    def _step(self) -> None:
        """The running batch reads the last tokens, and each sequence chooses another."""
        device = self._model.device
        needed = int(self._mask.any(0).long().argmax()) if self._mask.numel() else 0
        holes = sum(row is None for row in self._rows)
        if holes > _MOST_HOLES * len(self._rows) or needed > _MOST_PADDING:
            self._arrange(self._active())
        if self._batch is None:
            self._batch = self._steering.assemble(
                [self._parts_of(i) for i in range(len(self._rows))]
            )
        if self._batch.is_scheduled:
            self._batch.move_to([0 if row is None else len(row.new) for row in self._rows])
        last = [self._encoder.pad_id if row is None else row.new[-1] for row in self._rows]
        positions = [0 if row is None else row.num_tokens for row in self._rows]
        live = torch.ones(len(self._rows), 1, dtype=torch.long, device=device)
        self._mask = torch.cat([self._mask, live], dim=1)  # a hole attends to its last token
        logits = self._forward(
            torch.tensor(last, device=device)[:, None],
            self._mask,
            torch.tensor(positions, device=device)[:, None],
            self._cache,
            self._batch,
        )
        active = self._active()
        order = [
            self._firsts[id(sequence)] + i
            for sequence in active
            for i in range(len(sequence.parts))
        ]
        self._choose(active, logits[order])

    def _parts_of(self, row: int) -> list[Part]:
        sequence = self._rows[row]
        return [] if sequence is None else sequence.parts[row - self._firsts[id(sequence)]]

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, batch: PrefixBatch
    ) -> Tensor:
        """Logits of the last position of each row, `(rows, vocabulary)`."""
        with self._steering.attached(batch):
            found = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _choose(self, sequences: Sequence[_Sequence], logits: Tensor) -> None:
        """A token for each sequence, whose rows' logits stand together, in order."""
        row, chosen = 0, []
        for sequence in sequences:
            count = len(sequence.parts)
            own = logits[row]
            if sequence.weights:
                own = steered(own, list(logits[row + 1 : row + count]), sequence.weights)
            row += count
            seen = torch.tensor([[*sequence.prompt, *sequence.new]], device=logits.device)
            choice = sequence.choice(seen, own[None]) if not sequence.choice.is_plain else own[None]
            chosen.append(choice[0].argmax())
            if sequence.top is not None:
                log_probs = own.float().log_softmax(-1)
                values, tokens = log_probs.topk(min(sequence.top, len(log_probs)))
                ranked = zip(tokens.tolist(), values.tolist(), strict=True)
                top = tuple((t, p) for t, p in ranked if p > -math.inf)
                token = int(chosen[-1])
                sequence.ticket.tokens.append(TokenChosen(token, float(log_probs[token]), top))
        for sequence, token in zip(sequences, torch.stack(chosen).tolist(), strict=True):
            sequence.new.append(token)
            if self._show(sequence):
                self._end(sequence)
                self._leave(sequence)

    def _show(self, sequence: _Sequence) -> bool:
        """Give the ticket what is new; whether the sequence is done."""
        text, done = ready_text(self._encoder, sequence.request, sequence.new)
        if len(text) > sequence.shown:
            sequence.ticket._put(text[sequence.shown :])
            sequence.shown = len(text)
        return done

    def _end(self, sequence: _Sequence) -> None:
        done = completion_of(self._encoder, sequence.request, sequence.prompt, sequence.new)
        self._finish(sequence, done)

    @staticmethod
    def _finish(sequence: _Sequence, done: Completion) -> None:
        sequence.ticket._put(sequence.prepared.named(done))

    def _leave(self, sequence: _Sequence) -> None:
        first = self._firsts.pop(id(sequence))
        for row in range(first, first + len(sequence.parts)):
            self._rows[row] = None
        if not self._firsts:
            self._arrange([])


class StaticBatcher(Batcher):
    """The same for any model, a batch at a time: who comes meanwhile waits for its end.

    Texts come whole, and no log-probabilities.
    """

    _gives_log_probs = False

    @torch.no_grad()
    def _turn(self) -> None:
        self._drop_cancelled()
        chosen: list[_Sequence] = []
        free = self._max_rows
        with self._wake:
            while self._waiting and len(self._waiting[0].parts) <= free:
                chosen.append(self._waiting.popleft())
                free -= len(chosen[-1].parts)
        self._rows = [sequence for sequence in chosen for _ in sequence.parts]
        groups: dict[object, list[_Sequence]] = {}
        for sequence in chosen:
            groups.setdefault(batch_key(sequence.request), []).append(sequence)
        for group in groups.values():
            try:
                self._write(group)
            except Exception as error:
                for sequence in group:
                    sequence.ticket._put(error)
        self._rows = []

    def _write(self, group: Sequence[_Sequence]) -> None:
        guidance = joined([sequence.prepared.guidance for sequence in group])
        batch = self._steering.assemble(guidance.rows)
        with self._steering.attached(batch):
            done = generate_batch(
                self._model,
                self._encoder,
                [sequence.request for sequence in group],
                [sequence.prompt for sequence in group],
                guidance,
                batch,
            )
        for sequence, completion in zip(group, done, strict=True):
            if completion.text:
                sequence.ticket._put(completion.text)
            self._finish(sequence, completion)
