"""CompletionJob: one HTTP completion, from submitted requests to a response or a stream."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from controlprefix.completion import Completion, StandIn
from controlprefix.errors import (
    ClientDisconnectedError,
    ControlPrefixError,
    InternalServerError,
    RequestTimeoutError,
)
from controlprefix.inference.runner import Event, Ticket
from controlprefix.request import Request
from controlprefix.serving.bodies import CompletionBody
from controlprefix.serving.errors import error_body
from controlprefix.serving.openai import CompletionResponse, Format, LogProbs, Usage
from controlprefix.serving.server import Server
from controlprefix.serving.tenants import Client

_log = logging.getLogger(__name__)

_DISCONNECT_CHECK_S = 0.5


class CompletionJob:
    """Submits the requests of one body, and turns their events into OpenAI's form.

    Args:
        server: Runs the requests.
        client: Who sent them.
        body: The body.
        http_request: To notice that the client has disconnected.
        form: Chat or text.
    """

    def __init__(
        self,
        server: Server,
        client: Client,
        body: CompletionBody,
        http_request: HttpRequest,
        form: Format,
    ) -> None:
        self._server, self._client, self._body = server, client, body
        self._http_request, self._form = http_request, form
        self._started = time.monotonic()
        self._last_check = self._started
        self._has_text = False
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._head: dict[str, Any] = {
            "id": form.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": body.model,
        }

    async def respond(self, requests: list[Request]) -> Response:
        """Submit the requests, and answer with a body or a stream.

        Raises:
            ControlPrefixError: If a request cannot be accepted, or fails before its first text.
        """
        loop = asyncio.get_running_loop()
        try:
            # All of them differ in prompt and seed alone.
            resolved = await self._server.resolve(self._client, requests[0])
            for i, request in enumerate(requests):
                await self._require_client()

                def deliver(event: Event, i: int = i) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                        loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

                own = resolved.for_prompt(request)
                self._tickets.append(await self._server.submit(own, deliver, self._form.top))
            if self._body.stream:
                # An error before the first text still gets a status of its own.
                first = await self._next_event()
                if isinstance(first[1], BaseException):
                    raise first[1]
                stream = self._stream(first, len(requests))
                return StreamingResponse(stream, media_type="text/event-stream")
            response = await self._collect(len(requests))
            return JSONResponse(response.model_dump(mode="json"))
        except BaseException:
            self._cancel()
            raise

    async def _collect(self, num_choices: int) -> CompletionResponse:
        completions: dict[int, Completion] = {}
        while len(completions) < num_choices:
            i, event = await self._next_event()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Completion):
                completions[i] = event
        self._server.metrics.request_s.observe(time.monotonic() - self._started)
        ordered = [completions[i] for i in range(num_choices)]
        return CompletionResponse(
            **self._head,
            object=self._form.kind,
            choices=[
                self._form.choice(i, completion, self._log_probs(i, completion))
                for i, completion in enumerate(ordered)
            ],
            usage=self._usage(completions),
            stand_ins=_stand_ins(ordered) or None,
        )

    async def _stream(self, first: tuple[int, Event], num_choices: int) -> AsyncIterator[str]:
        completions: dict[int, Completion] = {}
        with_text: set[int] = set()
        pending: tuple[int, Event] | None = first
        try:
            while len(completions) < num_choices:
                i, event = pending or await self._next_event()
                pending = None
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, str):
                    is_first = i not in with_text
                    yield self._chunk(self._form.text_delta(i, event, is_first=is_first))
                    with_text.add(i)
                    continue
                completions[i] = event
                if i not in with_text:
                    yield self._chunk(self._form.text_delta(i, "", is_first=True))
                log_probs = self._log_probs(i, event)
                dumped = None if log_probs is None else log_probs.model_dump(mode="json")
                final = self._form.final_delta(i, event.finish_reason, dumped)
                stand_ins = [stand_in.model_dump() for stand_in in _stand_ins([event])]
                extra = {"stand_ins": stand_ins} if stand_ins else {}
                yield self._line({"choices": [final], **extra})
            usage = self._usage(completions)
            options = self._body.stream_options
            if options and options.include_usage:
                yield self._line({"choices": [], "usage": usage.model_dump()})
            self._server.metrics.request_s.observe(time.monotonic() - self._started)
            yield "data: [DONE]\n\n"
        except ControlPrefixError as error:
            yield f"data: {json.dumps({'error': error_body(error)[1].model_dump()})}\n\n"
        finally:
            self._cancel()

    async def _next_event(self) -> tuple[int, Event]:
        """The next event of any choice.

        Raises:
            RequestTimeoutError: If the request has used up its time.
            ClientDisconnectedError: If the client has disconnected.
        """
        timeout_s = self._server.limits.timeout_s
        while True:
            now = time.monotonic()
            if now > self._last_check + _DISCONNECT_CHECK_S:
                self._last_check = now
                await self._require_client()
            left_s = self._started + timeout_s - now
            if left_s <= 0:
                raise RequestTimeoutError(f"not finished within {timeout_s:.0f} s")
            try:
                i, event = await asyncio.wait_for(
                    self._events.get(), min(left_s, _DISCONNECT_CHECK_S)
                )
            except TimeoutError:
                continue
            if isinstance(event, BaseException) and not isinstance(event, ControlPrefixError):
                _log.error("a request failed", exc_info=event)
                raise InternalServerError(str(event))
            if not self._has_text:
                self._server.metrics.first_text_s.observe(time.monotonic() - self._started)
                self._has_text = True
            return i, event

    async def _require_client(self) -> None:
        if await self._http_request.is_disconnected():
            raise ClientDisconnectedError("the client has disconnected")

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def _log_probs(self, i: int, completion: Completion) -> LogProbs | None:
        if self._form.top is None:
            return None
        decode = self._client.cp.tokenizer.decode
        tokens = self._tickets[i].tokens[: completion.num_tokens]
        return self._form.log_probs(tokens, lambda token: str(decode([token])))

    def _usage(self, completions: Mapping[int, Completion]) -> Usage:
        # The choices of one prompt count it once, as OpenAI does.
        prompts = range(0, len(completions), self._body.n)
        num_prompt_tokens = sum(completions[i].num_prompt_tokens for i in prompts)
        num_tokens = sum(completion.num_tokens for completion in completions.values())
        self._server.metrics.prompt_tokens.inc(num_prompt_tokens)
        self._server.metrics.completion_tokens.inc(num_tokens)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
        )

    def _chunk(self, choice: Mapping[str, Any]) -> str:
        return self._line({"choices": [choice]})

    def _line(self, fields: Mapping[str, Any]) -> str:
        body = {**self._head, "object": self._form.chunk_kind, **fields}
        return f"data: {json.dumps(body)}\n\n"


def _stand_ins(completions: Iterable[Completion]) -> list[StandIn]:
    return [stand_in for completion in completions for stand_in in completion.stand_ins]
