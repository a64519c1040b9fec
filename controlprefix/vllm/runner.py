"""Runs requests on a vLLM server, in the place of a batch of our own."""

import asyncio
import json
import logging
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel

from controlprefix.errors import (
    ContextLengthError,
    ControlPrefixError,
    EngineError,
    OverloadedError,
    RequestError,
    StoreError,
)
from controlprefix.inference.continuous_batching import (
    Event,
    Prepare,
    Prepared,
    Ticket,
    TokenChosen,
    shutting_down,
)
from controlprefix.inference.generation import completion_of, ready_text
from controlprefix.inference.guidance import Guidance
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.assembly import Part
from controlprefix.request import PartUsed, Request
from controlprefix.vllm.placement import Placement, place
from controlprefix.vllm.prefix_folder import PrefixFolder
from controlprefix.vllm.rotation import Rotation

_log = logging.getLogger(__name__)

_CONNECT_S = 10.0
_PROBES = ((5, 11, 17, 23, 29, 31), (41, 43, 47, 53, 59), (101, 97, 89, 83))  # tokens
_FAR_APART = {torch.float32: 0.02, torch.float16: 0.2, torch.bfloat16: 0.3}  # nats


class VllmRunner:
    """Sends requests to one vLLM server, or a balancer before several that are alike.

    At the start it asks for a token with and without a prefix and compares what vLLM says
    with the model here: so a server without the connector, of other weights, or that cannot
    read the folder is noticed before anyone is served.

    Args:
        model: The same weights, for the encoding, the rotation and that comparison.
        encoder: Of the model.
        prepare: Finds a request's parts; called in the thread that submits it.
        url: Of the server, such as `http://localhost:8001`.
        folder: Where its workers read prefixes.
        key: The server's own API key.
        max_requests: At a time; more are refused.

    Raises:
        UnsupportedModelError: If the model cannot be served so.
        EngineError: If the server does not answer, or not as it should.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: RequestEncoder,
        prepare: Prepare,
        *,
        url: str,
        folder: PrefixFolder,
        key: str | None = None,
        max_requests: int = 1024,
    ) -> None:
        self._encoder, self._prepare, self._folder = encoder, prepare, folder
        self._rotation = Rotation.of(model)
        self._fingerprint = Steering.of(model).geometry.fingerprint
        self._dtype = model.dtype
        config = model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        # With windows, layers keep blocks of different sizes: nothing is shared.
        self._may_share = not getattr(config, "sliding_window", None)
        self._block_size: int | None = None
        self._context = encoder.context or 1 << 40
        self._max_requests = max_requests
        self._closing = False
        self._lock = threading.Lock()
        self._running: set[_RemoteTicket] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="controlprefix-vllm", daemon=True
        )
        self._thread.start()
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        try:
            self._name = self._wait_for(self._greet())
            self._compare(model)
        except BaseException:
            self.close(wait=0)
            raise

    def submit(
        self,
        request: Request,
        *,
        top_log_probs: int | None = None,
        prepare: Prepare | None = None,
        deliver: Callable[[Event], object] | None = None,
    ) -> Ticket:
        """Have a request written: see `Batcher.submit`.

        Raises:
            RequestError: If it cannot be carried out there.
            UnknownNameError: If it names a task, label or user that does not exist.
            OverloadedError: If too many run, or this process is closing.
        """
        if request.num_beams > 1:
            raise RequestError("beam search is not given by this server; use num_beams=1")
        if request.repetition_penalty != 1:
            raise RequestError(
                "repetition_penalty would count placeholder tokens on this server's engine "
                "(vLLM); leave it out"
            )
        if self._closing:
            raise shutting_down()
        if len(self._running) >= self._max_requests:
            raise OverloadedError(f"{self._max_requests} requests run already; try again later")
        prepared = (prepare or self._prepare)(request)
        placement = self._place(prepared)
        prompt = self._encoder.prompt_ids(request)
        needed = placement.num_slots + len(prompt) + request.max_new_tokens
        if needed > self._context:  # vLLM would write less than was asked for
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, asks for {request.max_new_tokens} more, and "
                f"its slots take {placement.num_slots} positions on this server's engine (vLLM), "
                f"whose context is {self._context}; shorten the prompt or lower max_new_tokens"
            )
        self._keep(placement)
        body = self._body(request, placement, prompt, top_log_probs)
        ticket = _RemoteTicket(deliver)
        with self._lock:
            if self._closing:
                raise shutting_down()
            ticket.job = asyncio.run_coroutine_threadsafe(
                self._run(ticket, request, prepared, placement, prompt, body), self._loop
            )
            self._running.add(ticket)
        ticket.job.add_done_callback(lambda _: self._running.discard(ticket))
        return ticket

    @property
    def load(self) -> tuple[int, int]:
        """Requests on their way; which of them wait, vLLM knows."""
        return len(self._running), 0

    def check(self) -> None:
        """Ask the server whether it is well.

        Raises:
            EngineError: If it does not say so.
        """
        self._wait_for(self._healthy())

    def close(self, *, wait: float | None = None) -> bool:
        """Take no more requests, and finish those there are: see `Batcher.close`."""
        with self._lock:
            self._closing = True
        until = None if wait is None else time.monotonic() + wait
        for ticket in list(self._running):
            left = None if until is None else max(0.0, until - time.monotonic())
            ticket.wait(left)
        finished = not self._running
        for ticket in list(self._running):
            ticket.cancel()
            ticket.wait(_CONNECT_S)
        self._wait_for(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return finished

    # --- one request -------------------------------------------------------------------------

    def _place(self, prepared: Prepared) -> Placement:
        return place(
            prepared,
            f"{self._fingerprint}:{self._dtype}",
            vocab_size=self._vocab_size,
            block_size=self._block_size,
        )

    def _keep(self, placement: Placement, *, anew: bool = False) -> None:
        if placement.num_slots:
            self._folder.keep(placement.digest, lambda: placement.slots(self._rotation), anew=anew)

    def _body(
        self,
        request: Request,
        placement: Placement,
        prompt: tuple[int, ...],
        top: int | None,
    ) -> dict[str, Any]:
        """Everything is said: what is left out, the server would take from the model's defaults."""
        slots = {"digest": placement.digest, "num_slots": placement.num_slots}
        return {
            "model": self._name,
            "prompt": [*placement.ids, *prompt],
            "max_tokens": request.max_new_tokens,
            "temperature": (request.temperature or 1.0) if request.samples else 0.0,
            "top_p": request.top_p or 1.0,
            "top_k": request.top_k or 0,
            "min_p": request.min_p or 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed,
            "stop": list(request.stop),
            "stop_token_ids": list(self._encoder.end_ids),
            "logprobs": top,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "stream": True,
            "cache_salt": placement.salt,
            "kv_transfer_params": {"controlprefix": slots} if placement.num_slots else None,
        }

    async def _run(
        self,
        ticket: "_RemoteTicket",
        request: Request,
        prepared: Prepared,
        placement: Placement,
        prompt: tuple[int, ...],
        body: dict[str, Any],
    ) -> None:
        try:
            try:
                written = await self._write(ticket, request, body)
            except EngineError:
                if ticket.has_begun or not await asyncio.to_thread(self._is_lost, placement):
                    raise
                # Its file went while the request waited for its turn, or is damaged: once more.
                await asyncio.to_thread(self._keep, placement, anew=True)
                ticket.tokens.clear()
                written = await self._write(ticket, request, body)
            done = completion_of(self._encoder, request, prompt, written)
            ticket._put(prepared.named(done))
        except asyncio.CancelledError:
            ticket._put(EngineError("the request was cancelled"))
        except ControlPrefixError as error:
            ticket._put(error)
        except httpx.HTTPError as error:
            ticket._put(EngineError(f"vLLM did not answer: {type(error).__name__} {error}"))
        except Exception as error:
            ticket._put(error)

    def _is_lost(self, placement: Placement) -> bool:
        """Whether there should be a file, and there is none that can be read."""
        try:
            if placement.num_slots:
                self._folder.read(placement.digest)
        except StoreError:
            return True
        return False

    async def _write(
        self, ticket: "_RemoteTicket", request: Request, body: dict[str, Any]
    ) -> list[int]:
        """The tokens that the server writes; the ticket is given their text as they come.

        They are read here as everywhere: a tokenizer of vLLM may cut characters elsewhere.
        """
        tokens: list[int] = []
        shown, reason = 0, None
        async for chunk in self._chunks(body):
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
                ticket.tokens += _chosen(choice.get("logprobs"), body["logprobs"])
                reason = choice.get("finish_reason") or reason
                text = ready_text(self._encoder, request, tokens)[0] if tokens else ""
                if len(text) > shown:
                    ticket.has_begun = True
                    ticket._put(text[shown:])
                    shown = len(text)
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended the request with {reason!r}")
        return tokens

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                told = _message(answer)
                if answer.status_code == 400:
                    raise RequestError(f"this server's engine (vLLM) refuses it: {told}")
                raise EngineError(f"vLLM answers {answer.status_code}: {told}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EngineError(f"vLLM failed: {chunk['error'].get('message')}")
                yield chunk

    # --- the server --------------------------------------------------------------------------

    def _wait_for(self, what: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(what, self._loop).result()
        except httpx.HTTPError as error:
            raise EngineError(
                f"no vLLM answers at {self._client.base_url}: {type(error).__name__} {error}"
            ) from error

    async def _greet(self) -> str:
        """The name it calls the model by; and how large its blocks are, where it says so."""
        answer = await self._client.get("/v1/models", timeout=_CONNECT_S)
        if answer.status_code != 200:
            raise EngineError(f"vLLM answers {answer.status_code}: {_message(answer)}")
        metrics = await self._client.get("/metrics", timeout=_CONNECT_S)
        if metrics.status_code == 200 and self._may_share:
            self._block_size = _block_size(metrics.text)
        about = answer.json()["data"][0]
        self._context = int(about.get("max_model_len") or self._context)
        return str(about["id"])

    async def _healthy(self) -> None:
        answer = await self._client.get("/health", timeout=_CONNECT_S)
        if answer.status_code != 200:
            raise EngineError(f"vLLM answers {answer.status_code} when asked for its health")

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel) -> None:
        """With and without a prefix, what vLLM thinks likely, and what we do.

        Without the connector vLLM would read placeholders as text. So what it says with a prefix
        must also be much nearer to what we say with it than to what we say to such a text.
        """
        prefix = prefix_from_tokens(model, _PROBES[0])
        used = PartUsed(kind="user", name="probe", version=0, strength=2.0)
        far = {"without a prefix": 0.0, "with a prefix": 0.0, "of placeholders": 0.0}
        for probe in _PROBES:
            said = self._said(self._place(Prepared(_alone([]), "")), probe)
            far["without a prefix"] += _apart(said, self._likely(model, [], (), probe))
            parts = [Part(prefix, used.strength)]
            placement = self._place(Prepared(_alone(parts), "", (used,)))
            said = self._said(placement, probe)
            far["with a prefix"] += _apart(said, self._likely(model, parts, (), probe))
            read = self._likely(model, [], placement.ids, probe)
            far["of placeholders"] += _apart(said, read)
        means = {name: total / len(_PROBES) for name, total in far.items()}
        for name in ("without a prefix", "with a prefix"):
            if means[name] > _FAR_APART[model.dtype]:
                raise EngineError(
                    f"vLLM's log-probabilities {name} are {means[name]:.2f} nats from those of the "
                    "model here: it serves another model, or has no connector"
                )
        if means["with a prefix"] > means["of placeholders"] / 2:
            raise EngineError(
                "vLLM reads placeholders as text: it runs without the connector "
                "(--kv-transfer-config, see docs/deploy.md)"
            )

    def _said(self, placement: Placement, probe: tuple[int, ...]) -> dict[int, float]:
        """The likeliest tokens after a text, and their log-probabilities, as vLLM has it."""
        self._keep(placement)
        request = Request(prompt="probe", raw=True, max_new_tokens=1)
        ticket = _RemoteTicket(None)
        self._wait_for(self._write(ticket, request, self._body(request, placement, probe, 10)))
        return dict(ticket.tokens[0].top)

    @staticmethod
    def _likely(
        model: PreTrainedModel, parts: list[Part], before: Sequence[int], probe: Sequence[int]
    ) -> torch.Tensor:
        """Our log-probabilities of the token after a text, `(vocabulary,)`."""
        steering = Steering.of(model)
        ids = torch.tensor([[*before, *probe]], device=model.device)
        with steering.attached(steering.assemble([parts])):
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
        return logits.float().log_softmax(-1)


def _apart(said: dict[int, float], ours: torch.Tensor) -> float:
    """How far vLLM's log-probabilities are from ours, in nats, in the mean."""
    return statistics.fmean(abs(ours[token].item() - one) for token, one in said.items())


def _alone(parts: list[Part]) -> Guidance:
    return Guidance([parts], [0], [[]])


class _RemoteTicket(Ticket):
    """A ticket whose request is cancelled by hanging up."""

    def __init__(self, deliver: Callable[[Event], object] | None) -> None:
        super().__init__(deliver)
        self.job: Future[None] | None = None
        self.has_begun = False

    def cancel(self) -> None:
        super().cancel()
        if self.job is not None:
            self.job.cancel()

    def wait(self, seconds: float | None) -> None:
        """For the end, so long."""
        if self.job is not None:
            try:
                self.job.result(seconds)
            except BaseException as error:  # whatever it was, the ticket was told
                _log.debug("while closing: %r", error)


def _chosen(log_probs: dict[str, Any] | None, top: int | None) -> list[TokenChosen]:
    """vLLM's log-probabilities of a chunk, tokens as `token_id:17`."""
    if log_probs is None:
        return []
    found = []
    for token, log_prob, others in zip(
        log_probs["tokens"],
        log_probs["token_logprobs"],
        log_probs["top_logprobs"] or [{}] * len(log_probs["tokens"]),
        strict=True,
    ):
        ranked = sorted((others or {}).items(), key=lambda one: -one[1])[:top]
        best = tuple((_token(name), float(value)) for name, value in ranked)
        found.append(TokenChosen(_token(token), float(log_prob), best))
    return found


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _block_size(metrics: str) -> int | None:
    """Of the cache, from what Prometheus would read; None unless all engines say the same."""
    sizes = set()
    for line in metrics.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            _, _, rest = line.partition('block_size="')
            sizes.add(rest.partition('"')[0])
    (size,) = sizes if len(sizes) == 1 else ("",)
    return int(size) if size.isdigit() else None
