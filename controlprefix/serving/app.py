"""The HTTP side: OpenAI's endpoints, users, attributes, health, metrics, honest errors."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlprefix import __version__
from controlprefix.errors import (
    ControlPrefixError,
    EngineError,
    OverloadedError,
    RequestError,
    StoreError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.inference.continuous_batching import Event, Ticket, TokenChosen
from controlprefix.request import Completion
from controlprefix.request import Request as Generation
from controlprefix.serving.schema import (
    Asked,
    ChatAsked,
    Enrolment,
    ModelNotFoundError,
    TextAsked,
    ToJudge,
)
from controlprefix.serving.tenants import (
    Client,
    Gateway,
    RateLimitError,
    UnauthorizedError,
)

_log = logging.getLogger(__name__)

_MOST_USERS = 1000  # listed
_LOOK_S = 0.5  # between looks whether the client is still there


class _TimeoutError(ControlPrefixError):
    """It took too long."""


class _GoneError(ControlPrefixError):
    """Nobody waits for it."""


class _InternalError(ControlPrefixError):
    """Something that should not happen; what it was is for the log alone."""


# The first that fits: status, OpenAI's type, and a code.
_STATUS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (UnauthorizedError, 401, "authentication_error", "invalid_api_key"),
    (RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (OverloadedError, 503, "server_error", "overloaded"),
    (_GoneError, 499, "server_error", "client_gone"),  # for the metrics: nobody reads it
    (_TimeoutError, 504, "server_error", "timeout"),
    (_InternalError, 500, "server_error", "internal_error"),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (UnknownNameError, 404, "invalid_request_error", "not_found"),
    (EngineError, 503, "server_error", "engine_unavailable"),
    (StoreError, 503, "server_error", "store_unavailable"),
    (RequestError, 400, "invalid_request_error", "invalid_request"),
    (TrainingDataError, 400, "invalid_request_error", "invalid_request"),
    (ControlPrefixError, 400, "invalid_request_error", "invalid_request"),
)


class Metrics:
    """What Prometheus reads."""

    def __init__(self, gateway: Gateway) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("controlprefix_requests", "Answered.", ["path", "status"], **of)
        self.prompt = Counter("controlprefix_prompt_tokens", "Read.", **of)
        self.written = Counter("controlprefix_completion_tokens", "Written.", **of)
        self.first = Histogram("controlprefix_first_token_seconds", "To the first text.", **of)
        self.seconds = Histogram("controlprefix_request_seconds", "To the end.", **of)
        Gauge("controlprefix_rows", "In the batch.", **of).set_function(lambda: gateway.load[0])
        Gauge("controlprefix_waiting", "In line.", **of).set_function(lambda: gateway.load[1])


class _Limited:
    """Counts what is received of a body, and answers 413 where it is too much."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, begun = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise RequestError("the body is too large")
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            if received > self._most and not begun:
                return  # whatever the application made of the error
            begun = True
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, counted, noted)
        if received > self._most and not begun:
            told = f"the body is larger than {self._most:,} bytes"
            answer = _error(413, "invalid_request_error", "body_too_large", told)
            await answer(scope, receive, send)


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, noted)


def create_app(gateway: Gateway) -> FastAPI:
    """The application for an ASGI server; at its end the gateway is drained."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(gateway.close)

    app = FastAPI(
        title="controlprefix",
        version=__version__,
        description="One frozen model; a task in the model's name, attributes and users beside.",
        lifespan=lifespan,
    )
    metrics = Metrics(gateway)
    enrolling = 0
    bearer = HTTPBearer(auto_error=False, description="An API key of a tenant.")

    async def client(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Client:
        return await run_in_threadpool(gateway.client, given.credentials if given else None)

    Known = Annotated[Client, Depends(client)]

    app.add_middleware(_Counted, requests=metrics.requests)
    app.add_middleware(_Limited, most=gateway.limits.body_bytes)

    @app.exception_handler(ControlPrefixError)
    async def explained(_: Request, error: ControlPrefixError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return _answer(_InternalError(str(error)))

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(
            f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}"
            for one in error.errors()
        )
        return _error(400, "invalid_request_error", "invalid_request", found)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, "invalid_request_error", "http", str(error.detail))

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, who: Known, request: Request) -> Response:
        messages = [message.plain() for message in asked.messages]
        top = asked.top_logprobs if asked.logprobs else None
        _require_few(asked.n, gateway)
        jobs = asked.requests(gateway.name, [{"messages": messages}], gateway.limits.new_tokens)
        return await _Answer(gateway, metrics, who, asked, request, _Chat(top)).to(jobs)

    @app.post("/v1/completions")
    async def text(asked: TextAsked, who: Known, request: Request) -> Response:
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        if not prompts:
            raise RequestError("prompt is an empty list; give a text")
        _require_few(len(prompts) * asked.n, gateway)
        given = [{"prompt": prompt, "raw": True} for prompt in prompts]
        jobs = asked.requests(gateway.name, given, gateway.limits.new_tokens)
        return await _Answer(gateway, metrics, who, asked, request, _Text(asked.logprobs)).to(jobs)

    @app.get("/v1/models")
    async def models(who: Known) -> dict[str, Any]:
        tasks = await run_in_threadpool(who.cp.names, "task")
        names = [gateway.name, *(f"{gateway.name}/{task}" for task in tasks)]
        data = [{"id": n, "object": "model", "created": 0, "owned_by": who.tenant} for n in names]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, who: Known) -> dict[str, Any]:
        known = (await models(who))["data"]
        found = next((one for one in known if one["id"] == name), None)
        if found is None:
            raise ModelNotFoundError(
                f"no model {name!r} here; there are: {', '.join(one['id'] for one in known)}"
            )
        return dict(found)

    @app.get("/v1/attributes")
    async def attributes(who: Known) -> dict[str, Any]:
        names = await run_in_threadpool(who.cp.names, "attribute")
        found: dict[str, Any] = {}
        for name in names:
            attribute, _, label = name.partition("=")
            found.setdefault(attribute, {"labels": {}})["labels"][label] = {"description": ""}
        space = who.cp.attributes
        for attribute, about in space.attributes.items() if space else ():
            for label, told in about.labels.items():
                if label in found.get(attribute, {"labels": {}})["labels"]:
                    found[attribute]["labels"][label] = told.model_dump()
        return {"attributes": found}

    @app.get("/v1/users")
    async def users(who: Known) -> dict[str, Any]:
        found = await run_in_threadpool(who.cp.names, "user")
        return {"users": found[:_MOST_USERS], "num_users": len(found)}

    @app.post("/v1/judge")
    async def judge(asked: ToJudge, who: Known) -> dict[str, Any]:
        def chances() -> list[dict[str, Any]]:
            results: list[dict[str, Any]] = [{} for _ in asked.texts]
            for one in gateway.judges:
                rows = one.chances(asked.texts).tolist()
                for result, row in zip(results, rows, strict=True):
                    result[one.attribute] = dict(zip(one.labels, row, strict=True))
            return results

        return {"results": await run_in_threadpool(chances)}

    @app.put("/v1/users/{user:path}")
    async def enroll(user: str, asked: Enrolment, who: Known) -> dict[str, Any]:
        if len(asked.texts) > gateway.limits.texts:
            raise RequestError(
                f"{len(asked.texts)} texts; this server takes {gateway.limits.texts} at once"
            )
        nonlocal enrolling
        if enrolling >= gateway.limits.enrolments:  # each may take a thread for long
            raise OverloadedError(f"{enrolling} users are being enrolled; try again later")
        enrolling += 1
        try:
            version = await run_in_threadpool(
                who.cp.enroll,
                user,
                asked.texts,
                decoder=asked.decoder,
                refine=asked.refine,
                keep_texts=asked.keep_texts,
            )
        finally:
            enrolling -= 1
        return {"user": user, "version": version}

    @app.get("/v1/users/{user:path}")
    async def versions(user: str, who: Known) -> dict[str, Any]:
        found = await run_in_threadpool(who.cp.versions, "user", user)
        return {
            "user": user,
            "versions": [
                {
                    "version": one.version,
                    "current": one.current,
                    "slots": one.num_slots,
                    "bytes": one.size_bytes,
                    "created_at": one.created_at.isoformat(),
                }
                for one in found
            ],
        }

    @app.delete("/v1/users/{user:path}")
    async def forget(user: str, who: Known) -> dict[str, Any]:
        return {"user": user, "removed": await run_in_threadpool(who.cp.forget_user, user)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        if not gateway.ready:
            raise OverloadedError("this process is shutting down")
        await run_in_threadpool(gateway.check)
        return JSONResponse({"status": "ready"})

    @app.get("/playground", include_in_schema=False)
    async def playground() -> Response:
        page = resources.files("controlprefix.serving").joinpath("playground.html")
        return Response(page.read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Chat:
    """The form of a chat completion."""

    kind, chunk_kind, start = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, top: int | None) -> None:
        self.top = top

    def choice(self, index: int, done: Completion, log_probs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": log_probs,
            "finish_reason": done.finish_reason,
        }

    def piece(self, index: int, text: str, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def last(self, index: int, reason: str, log_probs: Any) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": log_probs, "finish_reason": reason}

    def log_probs(self, tokens: list[TokenChosen], decode: Callable[[int], str]) -> Any:
        def said(token: int, log_prob: float) -> dict[str, Any]:
            text = decode(token)
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

        content = [
            {
                **said(one.token, one.log_prob),
                "top_logprobs": [said(token, log_prob) for token, log_prob in one.top],
            }
            for one in tokens
        ]
        return {"content": content, "refusal": None}


class _Text:
    """The form of a text completion."""

    kind, chunk_kind, start = "text_completion", "text_completion", "cmpl-"

    def __init__(self, top: int | None) -> None:
        self.top = top

    def choice(self, index: int, done: Completion, log_probs: Any) -> dict[str, Any]:
        return {
            "index": index,
            "text": done.text,
            "logprobs": log_probs,
            "finish_reason": done.finish_reason,
        }

    def piece(self, index: int, text: str, *, first: bool) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def last(self, index: int, reason: str, log_probs: Any) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": log_probs, "finish_reason": reason}

    def log_probs(self, tokens: list[TokenChosen], decode: Callable[[int], str]) -> Any:
        texts = [decode(one.token) for one in tokens]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [one.log_prob for one in tokens],
            "top_logprobs": [{decode(t): p for t, p in one.top} for one in tokens],
            "text_offset": offsets,
        }


class _Answer:
    """Submits a request's choices and puts what comes of them into OpenAI's form."""

    def __init__(
        self,
        gateway: Gateway,
        metrics: Metrics,
        who: Client,
        asked: Asked,
        request: Request,
        form: _Chat | _Text,
    ) -> None:
        self._gateway, self._metrics, self._who = gateway, metrics, who
        self._asked, self._request, self._form = asked, request, form
        self._began = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._has_begun, self._looked = False, self._began
        self._head = {
            "id": form.start + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": asked.model,
        }

    async def to(self, jobs: list[Generation]) -> Response:
        loop = asyncio.get_running_loop()
        try:
            for i, job in enumerate(jobs):

                def deliver(event: Event, i: int = i) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                        loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

                ticket = await run_in_threadpool(
                    self._gateway.submit, self._who, job, deliver, self._form.top
                )
                self._tickets.append(ticket)
            if self._asked.stream:
                # Whatever goes wrong before the first text still has a status of its own.
                first = await self._next()
                if isinstance(first[1], BaseException):
                    raise first[1]
                return StreamingResponse(
                    self._stream(first, len(jobs)), media_type="text/event-stream"
                )
            return JSONResponse(await self._whole(len(jobs)))
        except BaseException:
            self._cancel()
            raise

    async def _whole(self, count: int) -> dict[str, Any]:
        done: dict[int, Completion] = {}
        while len(done) < count:
            i, event = await self._next()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Completion):
                done[i] = event
        choices = [self._form.choice(i, done[i], self._log_probs(i, done[i])) for i in range(count)]
        self._metrics.seconds.observe(time.monotonic() - self._began)
        return {
            **self._head,
            "object": self._form.kind,
            "choices": choices,
            "usage": self._usage(done),
            **_stand_ins(done[i] for i in range(count)),
        }

    async def _stream(self, first: tuple[int, Event], count: int) -> AsyncIterator[str]:
        done: dict[int, Completion] = {}
        begun: set[int] = set()
        event: tuple[int, Event] | None = first
        try:
            while len(done) < count:
                i, found = event or await self._next()
                event = None
                if isinstance(found, BaseException):
                    raise found
                if isinstance(found, str):
                    yield self._chunk(self._form.piece(i, found, first=i not in begun))
                    begun.add(i)
                    continue
                done[i] = found
                if i not in begun:
                    yield self._chunk(self._form.piece(i, "", first=True))
                log_probs = self._log_probs(i, found)
                last = self._form.last(i, found.finish_reason, log_probs)
                yield self._line({"choices": [last], **_stand_ins([found])})
            options = self._asked.stream_options
            if options and options.include_usage:
                yield self._line({"choices": [], "usage": self._usage(done)})
            else:
                self._usage(done)
            self._metrics.seconds.observe(time.monotonic() - self._began)
            yield "data: [DONE]\n\n"
        except ControlPrefixError as error:
            yield f"data: {json.dumps({'error': _told(error)[1]})}\n\n"
        finally:
            self._cancel()

    async def _next(self) -> tuple[int, Event]:
        """The next thing that happens; the client may go away before.

        Raises:
            _TimeoutError: If the request has had its time.
            _GoneError: If the client has.
        """
        while True:
            now = time.monotonic()
            if now > self._looked + _LOOK_S:
                self._looked = now
                if await self._request.is_disconnected():
                    raise _GoneError("the client has gone away")
            left = self._began + self._gateway.limits.seconds - now
            if left <= 0:
                raise _TimeoutError(f"not done in {self._gateway.limits.seconds:.0f} s")
            try:
                found = await asyncio.wait_for(self._events.get(), min(left, _LOOK_S))
            except TimeoutError:
                continue
            event = found[1]
            if isinstance(event, BaseException) and not isinstance(event, ControlPrefixError):
                _log.error("a request failed", exc_info=event)
                raise _InternalError(str(event))
            if not self._has_begun:
                self._metrics.first.observe(time.monotonic() - self._began)
                self._has_begun = True
            return found

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def _log_probs(self, i: int, done: Completion) -> Any:
        if self._form.top is None:
            return None
        decode = self._who.cp.tokenizer.decode
        tokens = self._tickets[i].tokens[: done.num_tokens]
        return self._form.log_probs(tokens, lambda token: str(decode([token])))

    def _usage(self, done: dict[int, Completion]) -> dict[str, int]:
        # The choices of one prompt read it once, as OpenAI counts.
        prompt = sum(done[i].num_prompt_tokens for i in range(0, len(done), self._asked.n))
        written = sum(one.num_tokens for one in done.values())
        self._metrics.prompt.inc(prompt)
        self._metrics.written.inc(written)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def _chunk(self, choice: dict[str, Any]) -> str:
        return self._line({"choices": [choice]})

    def _line(self, what: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head, 'object': self._form.chunk_kind, **what})}\n\n"


def _stand_ins(done: Iterable[Completion]) -> dict[str, Any]:
    """What stood in for labels that nobody learned; nothing where there was none."""
    found = [one.model_dump() for each in done for one in each.stand_ins]
    return {"stand_ins": found} if found else {}


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    message = str(error)
    if isinstance(error, (StoreError, EngineError, _InternalError)):  # where is nobody's business
        _log.warning("%s", error)
        message = "something is wrong on the server's side; try again later"
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            return status, {"message": message, "type": name, "param": None, "code": code}
    raise error


def _require_few(choices: int, gateway: Gateway) -> None:
    """Refuse too many, before anything is made of them."""
    most = gateway.limits.choices
    if choices > most:
        raise RequestError(f"{choices:,} choices; this server gives {most} at most")


def _answer(error: ControlPrefixError) -> JSONResponse:
    status, told = _told(error)
    headers = {}
    if isinstance(error, RateLimitError):
        headers["Retry-After"] = str(max(1, round(error.wait)))
    elif status == 503:
        headers["Retry-After"] = "1"
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": told}, status, headers)


def _error(status: int, kind: str, code: str, message: str) -> JSONResponse:
    told = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": told}, status)
