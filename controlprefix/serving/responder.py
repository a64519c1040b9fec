"""CompletionResponder: one HTTP completion, from submitted requests to a response or a stream."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from controlprefix.completion import Completion
from controlprefix.errors import (
    ClientDisconnectedError,
    ControlPrefixError,
    InternalServerError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
)
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Event, Ticket
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.request import Request
from controlprefix.serving.bodies import CompletionBody
from controlprefix.serving.errors import error_body
from controlprefix.serving.openai import Echo, Finished, ResponseFormatter, Usage
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client
from controlprefix.serving.work_pools import disconnection

_log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 15  # after which a silent stream gets a comment, so that proxies keep it open


class CompletionResponder:
    """Submits the requests of one body, and turns their events into a response.

    Args:
        server: Runs the requests.
        client: Who sent them.
        http_request: To notice that the client has disconnected.
        formatter: How the response is written.
        body: For the model's name, the number of choices per prompt, and whether to stream.
    """

    def __init__(
        self,
        server: Server,
        client: Client,
        http_request: HttpRequest,
        formatter: ResponseFormatter,
        body: CompletionBody,
    ) -> None:
        self._server, self._client = server, client
        self._http_request, self._formatter = http_request, formatter
        self._body = body
        self._started = time.monotonic()
        self._has_text = False
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._unfinished: dict[int, int] = {}  # choice -> its limit of new tokens
        self._num_finished_tokens = 0
        self._is_counted = False
        self._num_echo_tokens = 0  # of prompts, while only these are computed
        self._echoes: list[Echo | None] = []
        self._common: dict[str, Any] = {
            "id": formatter.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": body.model,
        }

    async def respond(
        self, requests: Sequence[Request], *, echoes: bool = False, generates: bool = True
    ) -> Response:
        """Submit the requests, and answer with a body or a stream.

        Args:
            requests: They differ in prompt and seed alone.
            echoes: Repeat prompts in front of completions.
            generates: Write completions; otherwise they are empty.

        Raises:
            ControlPrefixError: If a request cannot be accepted, or fails before its first text.
        """
        end = self._server.admit(self._client.tenant, len(requests))
        # Also if nobody begins to read a stream.
        self._end = weakref.finalize(self, end)
        watch = asyncio.create_task(self._watch_client())
        try:
            resolved: dict[Any, ResolvedRequest[Request]] = {}
            own = []
            for request in requests:
                # With `relevant`, the prompt decides which prefixes apply.
                prompt = (request.prompt, request.prompt_ids, request.messages)
                key = prompt if request.when == "relevant" else None
                if key not in resolved:
                    resolved[key] = await self._server.resolve(self._client, request, watch)
                own.append(resolved[key].for_prompt(request))
            self._echoes = [None] * len(own)
            if echoes:
                for steered in own[:: self._body.num_choices]:
                    prompt_only = await self._server.without_tokens(self._client, steered)
                    self._num_echo_tokens += prompt_only.num_prompt_tokens
                try:
                    self._echoes = list(
                        await self._server.echoes(self._client, own, self._formatter.top, watch)
                    )
                except (OverloadedError, RequestError):  # not computed
                    self._num_echo_tokens = 0
                    raise
            for i, steered in enumerate(own):
                if generates:
                    await self._submit(i, steered)
                else:
                    self._tickets.append(ticket := Ticket())
                    empty = await self._server.without_tokens(self._client, steered)
                    ticket.num_prompt_tokens = empty.num_prompt_tokens
                    self._events.put_nowait((i, empty))
                self._require_client(watch)
            if self._body.stream:
                # An error before the first text still gets a status of its own, unless it takes
                # so long that a proxy would close a connection without an answer.
                first = None
                with contextlib.suppress(TimeoutError):
                    first = await asyncio.wait_for(self._next_event(), _KEEP_ALIVE_S)
                if first is not None and isinstance(first[1], BaseException):
                    raise first[1]
                return EventSourceResponse(
                    self._stream(first, len(own)),
                    ping=_KEEP_ALIVE_S,
                    sep="\n",
                    # A server that stops finishes its streams.
                    shutdown_grace_period=self._server.limits.timeout_s,
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                )
            finished = await self._collect(len(own))
            body = self._formatter.whole(self._common, finished, self._usage(finished))
            self._end()
            return JSONResponse(body.model_dump(mode="json"))
        except BaseException:
            self._cancel()
            raise
        finally:
            watch.cancel()  # from here on, sse-starlette watches the client

    async def _submit(self, i: int, request: Any) -> None:
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

        self._tickets.append(
            await self._server.submit(self._client, request, deliver, self._formatter.top)
        )
        self._unfinished[i] = request.request.max_new_tokens

    async def _collect(self, num_choices: int) -> list[Finished]:
        finished: dict[int, Finished] = {}
        while len(finished) < num_choices:
            i, event = await self._next_event()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Completion):
                finished[i] = self._finished(i, event)
        return [finished[i] for i in range(num_choices)]

    async def _stream(
        self, first: tuple[int, Event] | None, num_choices: int
    ) -> AsyncIterator[dict[str, str]]:
        finished: dict[int, Finished] = {}
        reports = [_TokenReport(self._server) for _ in range(num_choices)]
        pending = first
        try:
            for payload in self._formatter.opening(self._common, self._echoes):
                yield _event(payload)
            while len(finished) < num_choices:
                i, event = pending or await self._next_event()
                pending = None
                if isinstance(event, BaseException):
                    raise event
                report = reports[i]
                is_first = report.is_first
                if isinstance(event, str):
                    tokens = report.for_text(event, self._tickets[i].tokens)
                    for payload in self._formatter.delta(
                        self._common, i, event, tokens, is_first=is_first
                    ):
                        yield _event(payload)
                    continue
                finished[i] = self._finished(i, event)
                if is_first:
                    for payload in self._formatter.delta(self._common, i, "", (), is_first=True):
                        yield _event(payload)
                rest = report.rest(finished[i].tokens)
                for payload in self._formatter.end(self._common, i, finished[i], rest):
                    yield _event(payload)
            choices = [finished[i] for i in range(num_choices)]
            for payload in self._formatter.closing(
                self._common, choices, self._usage(choices), include_usage=self._body.reports_usage
            ):
                yield _event(payload)
            yield {"data": "[DONE]"}
        except ControlPrefixError as error:
            yield {"data": json.dumps({"error": error_body(error)[1].model_dump()})}
        finally:
            self._cancel()

    async def _next_event(self) -> tuple[int, Event]:
        """The next event of any choice.

        Raises:
            RequestTimeoutError: If the request has used up its time.
            ClientDisconnectedError: If the client has disconnected.
        """
        timeout_s = self._server.limits.timeout_s
        left_s = self._started + timeout_s - time.monotonic()
        try:
            i, event = await asyncio.wait_for(self._events.get(), max(0.0, left_s))
        except TimeoutError:
            raise RequestTimeoutError(f"not finished within {timeout_s:.0f} s") from None
        if isinstance(event, BaseException) and not isinstance(event, ControlPrefixError):
            _log.error("a request failed", exc_info=event)
            raise InternalServerError(str(event))
        if not self._has_text and not isinstance(event, BaseException):
            first_text_s = time.monotonic() - self._started
            self._server.metrics.first_text_s.observe(first_text_s)
            self._http_request.state.report["first_text_s"] = round(first_text_s, 3)
            self._has_text = True
        return i, event

    async def _watch_client(self) -> None:
        """Wait until the client disconnects, and end the request then."""
        await disconnection(self._http_request)
        self._events.put_nowait((-1, _client_gone()))

    @staticmethod
    def _require_client(watch: "asyncio.Task[None]") -> None:
        if watch.done():
            raise _client_gone()

    def _cancel(self) -> None:
        if not self._is_counted:
            self._is_counted = True
            # An abandoned choice counts as much as it might have taken.
            num_new = self._num_finished_tokens + sum(self._unfinished.values())
            prompts = self._tickets[:: self._body.num_choices]
            num_prompt = sum(ticket.num_prompt_tokens for ticket in prompts)
            num_prompt = max(num_prompt, self._num_echo_tokens)
            self._server.count_tokens(self._client, num_prompt + num_new)
        for ticket in self._tickets:
            ticket.cancel()
        self._end()

    def _finished(self, i: int, completion: Completion) -> Finished:
        self._unfinished.pop(i, None)
        self._num_finished_tokens += completion.num_tokens
        tokens = self._tickets[i].tokens[: completion.num_tokens]
        return Finished(completion, tokens, self._echoes[i])

    def _usage(self, choices: Sequence[Finished]) -> Usage:
        # The choices of one prompt count it once, as OpenAI does.
        prompts = choices[:: self._body.num_choices]
        num_prompt_tokens = sum(choice.completion.num_prompt_tokens for choice in prompts)
        num_tokens = sum(choice.completion.num_tokens for choice in choices)
        self._is_counted = True
        self._server.count_tokens(self._client, num_prompt_tokens + num_tokens)
        metrics = self._server.metrics
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.completion_tokens.inc(num_tokens)
        metrics.request_s.observe(time.monotonic() - self._started)
        self._http_request.state.report |= {
            "model": self._common["model"],
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
        }
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
        )


class _TokenReport:
    """Which tokens' log-probabilities a stream has sent: those of the text that it has sent."""

    def __init__(self, server: Server) -> None:
        self._names = server.token_bytes
        self._num_sent = 0
        self._num_token_bytes = 0
        self._num_text_bytes = 0
        self.is_first = True

    def for_text(self, text: str, tokens: Sequence[TokenLogProbs]) -> list[TokenLogProbs]:
        """The tokens that are complete with that text."""
        self.is_first = False
        self._num_text_bytes += len(text.encode())
        rest = tokens[self._num_sent :]
        num_ready, num_bytes = 0, self._num_token_bytes
        for i, token in enumerate(rest):
            size = len(self._names.in_text(token.token))
            num_bytes += size
            if num_bytes > self._num_text_bytes:
                break
            if size:  # one without text, such as the end token, waits for the next that has some
                num_ready, self._num_token_bytes = i + 1, num_bytes
        self._num_sent += num_ready
        return list(rest[:num_ready])

    def rest(self, tokens: Sequence[TokenLogProbs]) -> Sequence[TokenLogProbs]:
        """The tokens of a whole completion that were not sent."""
        return tokens[self._num_sent :]


def _client_gone() -> ClientDisconnectedError:
    return ClientDisconnectedError("the client has disconnected")


def _event(payload: tuple[str | None, Mapping[str, Any]]) -> dict[str, str]:
    name, data = payload
    return {"data": json.dumps(data), **({"event": name} if name else {})}
