"""VllmRunner: runs requests on a vLLM server instead of a batch in this process."""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import httpx

from controlprefix.errors import (
    ControlPrefixError,
    EngineError,
    OverloadedError,
    RequestError,
    StoreError,
    UnknownNameError,
    UnsupportedModelError,
)
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Deliver, Ticket, closing_error
from controlprefix.inference.stopping import IncrementalDetokenizer, completion_from_tokens
from controlprefix.model import FrozenModel
from controlprefix.model.mass_in_keys import MassInKeys
from controlprefix.prefixes import PrefixKey
from controlprefix.request import Request
from controlprefix.vllm.client import CONNECT_TIMEOUT_S, VllmClient, parse_log_probs
from controlprefix.vllm.handshake import compare_with_local_model
from controlprefix.vllm.placement import Placement, place
from controlprefix.vllm.prefix_folder import PrefixFolder

_log = logging.getLogger(__name__)

_UNLIMITED_CONTEXT = 1 << 40
_COMPARED_TOKENS = 10


@dataclass(slots=True, eq=False)
class _RemoteRequest:
    """A request on its way to the server.

    Attributes:
        placement: Where its slots are.
        prompt: Token ids of the prompt, without placeholders.
        has_streamed: Whether any text was delivered.
        is_forgotten: Whether its user was forgotten meanwhile; the slots are not written again.
        started_at: When it was accepted, in UTC.
        job: The coroutine that runs it.
    """

    resolved: ResolvedRequest[Any]
    ticket: Ticket
    placement: Placement
    prompt: tuple[int, ...]
    top_log_probs: int | None
    has_streamed: bool = False
    is_forgotten: bool = False
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    job: "Future[None]" = field(default_factory=Future)

    def wait(self, timeout_s: float | None) -> None:
        try:
            self.job.result(timeout_s)
        except BaseException as error:  # the ticket already has this error
            _log.debug("while closing: %r", error)


class VllmRunner:
    """Sends requests to one vLLM server, or to a load balancer in front of identical ones.

    At the start, log-probabilities with and without a prefix are compared with the model here.

    Args:
        frozen: The same weights, for tokenization, rotation and that comparison.
        url: URL of the server, such as `http://localhost:8001`.
        folder: Where its workers read prefixes.
        api_key: The server's own API key, if it has one.
        model_name: Which of its models to use, such as a LoRA adapter, which `frozen` then has
            too; left out, the first.
        max_requests: Concurrent requests; more are refused.

    Raises:
        UnsupportedModelError: If the model cannot be served so.
        EngineError: If the server does not answer, or not as expected.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        *,
        url: str,
        folder: PrefixFolder,
        api_key: str | None = None,
        model_name: str | None = None,
        max_requests: int = 1024,
    ) -> None:
        self._frozen, self._folder = frozen, folder
        try:
            self._rope = frozen.rope
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"vLLM cannot serve this model: {error}; serve it with --engine transformers"
            ) from error
        config = frozen.model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        # With sliding windows, layers have blocks of different sizes: none are shared.
        self._may_share_blocks = not getattr(config, "sliding_window", None)
        self._block_size: int | None = None
        self._masses = MassInKeys(frozen)
        self._context_length = frozen.request_tokenizer.context_length or _UNLIMITED_CONTEXT
        self._max_requests = max_requests
        self._closing = False
        self._lock = threading.Lock()
        self._running: set[_RemoteRequest] = set()
        try:
            self._client = VllmClient(url, api_key)
        except httpx.InvalidURL as error:
            raise EngineError(f"{url!r} is no URL: {error}") from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="controlprefix-vllm", daemon=True
        )
        self._thread.start()
        try:
            self._model_name = self._wait_for(self._read_server_info(model_name))
            compare_with_local_model(frozen, self._place, self._remote_log_probs)
        except BaseException:
            self.close(timeout_s=0)
            raise

    def submit(
        self,
        resolved: ResolvedRequest[Any],
        *,
        top_log_probs: int | None = None,
        deliver: Deliver | None = None,
    ) -> Ticket:
        """Start a request: see `Runner.submit`.

        Raises:
            RequestError: If this engine cannot carry it out.
            ContextLengthError: If prompt, slots and new tokens do not fit the context.
            OverloadedError: If too many requests run, or the runner is closing.
        """
        request = resolved.request
        if request.num_beams > 1:
            raise RequestError("beam search is not supported by this server; use num_beams=1")
        if request.repetition_penalty != 1:
            raise RequestError(
                "repetition_penalty would count placeholder tokens on this server's engine "
                "(vLLM); leave it out"
            )
        if any(message.images for message in request.conversation):
            raise RequestError("images are not supported in front of vLLM; leave them out")
        self.require_capacity()
        placement = self._place(resolved)
        # vLLM would generate less than was asked for.
        request, prompt = self._frozen.request_tokenizer.fitted(
            request, num_slots=placement.num_slots, context_length=self._context_length
        )
        resolved = replace(resolved, request=request)
        self._write_slots(placement)
        remote = _RemoteRequest(resolved, Ticket(deliver), placement, prompt, top_log_probs)
        remote.ticket.num_prompt_tokens = len(prompt)
        with self._lock:
            if self._closing:
                raise closing_error()
            remote.job = asyncio.run_coroutine_threadsafe(self._run(remote), self._loop)
            self._running.add(remote)
        remote.ticket.on_cancel(remote.job.cancel)
        remote.job.add_done_callback(lambda _: self._running.discard(remote))
        return remote.ticket

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests sent; which of them wait, only vLLM knows."""
        return len(self._running), 0

    def require_capacity(self) -> None:
        """Check that a request could be submitted now: see `Runner.require_capacity`."""
        if self._closing:
            raise closing_error()
        if len(self._running) >= self._max_requests:
            raise OverloadedError(f"{self._max_requests} requests run already; try again later")

    def check_health(self) -> None:
        """Check that the server is healthy.

        Raises:
            EngineError: If it is not.
        """
        self._wait_for(self._client.check_health())

    def forget(self, tenant: str, key: PrefixKey, *, removed_at: datetime | None = None) -> None:
        """Remove the files of a user: see `Runner.forget`. Workers drop their copy within minutes.

        Raises:
            StoreError: If one cannot be removed.
        """
        if key.kind != "user":
            return
        for remote in list(self._running):
            names = [part.used.name for part in remote.resolved.parts if part.used.kind == "user"]
            is_later = removed_at is not None and remote.started_at > removed_at
            if remote.resolved.tenant == tenant and key.name in names and not is_later:
                remote.is_forgotten = True
        self._folder.forget(tenant, key.name)

    def remove_expired(self) -> None:
        """Remove files that nobody used for an hour: see `Runner.remove_expired`.

        Raises:
            StoreError: If one cannot be removed.
        """
        self._folder.remove_expired()

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Accept no more requests, and finish the accepted ones: see `Runner.close`."""
        with self._lock:
            self._closing = True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for remote in list(self._running):
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            remote.wait(left_s)
        finished = not self._running
        for remote in list(self._running):
            remote.ticket.cancel()
            remote.wait(CONNECT_TIMEOUT_S)
        self._wait_for(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return finished

    # --- one request -------------------------------------------------------------------------

    def _place(self, resolved: ResolvedRequest[Any]) -> Placement:
        return place(
            resolved,
            f"{self._frozen.fingerprint}:{self._frozen.dtype}",
            vocab_size=self._vocab_size,
            block_size=self._block_size,
        )

    def _write_slots(self, placement: Placement, *, overwrite: bool = False) -> None:
        if placement.num_slots:
            self._folder.write(
                placement.file_name,
                lambda: placement.slots(self._rope, self._masses),
                overwrite=overwrite,
            )

    def _body(
        self,
        request: Request,
        placement: Placement,
        prompt: tuple[int, ...],
        top_log_probs: int | None,
    ) -> dict[str, Any]:
        """The body of the request: every setting, since vLLM would use the model's defaults."""
        slots = {"file": placement.file_name, "num_slots": placement.num_slots}
        return {
            "model": self._model_name,
            "prompt": [*placement.placeholder_ids, *prompt],
            "max_tokens": request.max_new_tokens,
            "temperature": (request.temperature or 1.0) if request.do_sample else 0.0,
            "top_p": request.top_p or 1.0,
            "top_k": request.top_k or 0,
            "min_p": request.min_p or 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()} or None,
            "seed": request.seed,
            "stop": list(request.stop),
            "structured_outputs": None
            if request.json_schema is None
            else {"json": request.json_schema, "disable_any_whitespace": True},
            "stop_token_ids": list(self._frozen.request_tokenizer.end_ids),
            "logprobs": top_log_probs,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "stream": True,
            "cache_salt": placement.salt,
            "kv_transfer_params": {"controlprefix": slots} if placement.num_slots else None,
        }

    async def _run(self, remote: _RemoteRequest) -> None:
        ticket, resolved = remote.ticket, remote.resolved
        try:
            try:
                tokens = await self._generate(remote)
            except EngineError:
                is_lost = await asyncio.to_thread(self._is_lost, remote.placement)
                if remote.has_streamed or not is_lost:
                    raise
                if remote.is_forgotten:
                    raise UnknownNameError("the user of this request was forgotten") from None
                # Its file was evicted while the request waited, or is damaged: try once more.
                await asyncio.to_thread(self._write_slots, remote.placement, overwrite=True)
                ticket.tokens.clear()
                tokens = await self._generate(remote)
            tokenizer = self._frozen.request_tokenizer
            completion = completion_from_tokens(tokenizer, resolved.request, remote.prompt, tokens)
            ticket.put(resolved.report_in(completion))
        except asyncio.CancelledError:
            ticket.put(EngineError("the request was cancelled"))
        except ControlPrefixError as error:
            ticket.put(error)
        except httpx.HTTPError as error:
            ticket.put(EngineError(f"vLLM did not answer: {type(error).__name__} {error}"))
        except Exception as error:
            ticket.put(error)

    async def _generate(self, remote: _RemoteRequest) -> list[int]:
        """The generated tokens; the ticket gets their text as they arrive.

        Tokens are decoded here, since vLLM's detokenizer may split characters elsewhere.
        """
        request: Request = remote.resolved.request
        tokenizer = self._frozen.request_tokenizer
        top = remote.top_log_probs
        body = self._body(request, remote.placement, remote.prompt, top)
        tokens: list[int] = []
        stream, reason = IncrementalDetokenizer(tokenizer, request), None
        async for chunk in self._client.complete(body):
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
                remote.ticket.tokens += parse_log_probs(choice.get("logprobs"), top)
                reason = choice.get("finish_reason") or reason
                text = stream.update(tokens)[0] if tokens else ""
                if text:
                    remote.has_streamed = True
                    remote.ticket.put(text)
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended the request with {reason!r}")
        return tokens

    def _is_lost(self, placement: Placement) -> bool:
        """Whether the slots' file should exist, and cannot be read."""
        try:
            if placement.num_slots:
                self._folder.read(placement.file_name)
        except StoreError:
            return True
        return False

    # --- the server --------------------------------------------------------------------------

    def _wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except httpx.HTTPError as error:
            raise EngineError(
                f"no vLLM answers at {self._client.url}: {type(error).__name__} {error}"
            ) from error

    async def _read_server_info(self, model_name: str | None) -> str:
        """The name of the model there; also its context length and block size."""
        info = await self._client.model_info(model_name)
        if self._may_share_blocks:
            self._block_size = await self._client.block_size()
        self._context_length = int(info["max_model_len"] or self._context_length)
        return str(info["id"])

    def _remote_log_probs(self, placement: Placement, prompt: tuple[int, ...]) -> dict[int, float]:
        """The server's most likely tokens after a prompt, with their log-probabilities."""
        self._write_slots(placement)
        resolved = ResolvedRequest(Request(prompt="probe", raw=True, max_new_tokens=1), ())
        remote = _RemoteRequest(resolved, Ticket(), placement, prompt, _COMPARED_TOKENS)
        self._wait_for(self._generate(remote))
        return dict(remote.ticket.tokens[0].top)
