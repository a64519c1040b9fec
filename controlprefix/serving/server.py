"""Server: the state that all routes share."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from controlprefix.attributes import AttributeSpace
from controlprefix.cancellation import raise_if_stopped
from controlprefix.completion import Completion
from controlprefix.errors import (
    ForgottenError,
    OverloadedError,
    RequestError,
    StoreError,
    TrainingInterrupted,
    UnknownNameError,
)
from controlprefix.evaluation import AttributeClassifier
from controlprefix.inference.generator import Generator
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Deliver, Runner, Ticket
from controlprefix.model import FrozenModel
from controlprefix.model.token_bytes import TokenBytes
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.request import Request
from controlprefix.serving.bodies import MIN_TEMPERATURE
from controlprefix.serving.image_downloads import ImageDownloads
from controlprefix.serving.large_bodies import LargeBodies
from controlprefix.serving.metrics import Metrics
from controlprefix.serving.openai import Echo
from controlprefix.serving.prompt_echo import PromptEcho
from controlprefix.serving.rate_limit import RateLimiter, TokenLimiter
from controlprefix.serving.settings import ServerLimits
from controlprefix.serving.tenants import Client, Tenants
from controlprefix.serving.work_pools import WorkPools
from controlprefix.store import AuditEntry, EncryptionKeys

UnknownUsers = Literal["refuse", "plain"]


class Server:
    """One frozen model for all tenants of a store.

    Args:
        frozen: The model.
        store: SQLAlchemy URL.
        name: The name that clients call the model by.
        open_tenant: Serve this tenant to everybody, without API keys; None: a key is needed.
        encryption_keys: Keys of encrypted prefixes.
        attributes: Attribute space of all tenants.
        classifiers: Classify texts for `/v1/classify`.
        limits: What is accepted.
        runner: Runs requests, such as a `VllmRunner`; left out, a batch in this process.
        allowed_hosts: With `open_tenant`, host names that are served in addition to `localhost`
            and IP addresses.
        unknown_users: What to do with a user that has no prefix: refuse the request, or write
            without one.
        sampling_defaults: Sampling settings (`temperature`, `top_p`, …) of requests that leave
            them out, beside those of the model's generation config.
        image_origins: Origins such as `https://images.example.com` from which images may be
            downloaded that requests name by URL; left out, none are.
        does_jobs: Train users in this process; otherwise other processes do (`controlprefix
            worker`).

    Attributes:
        name, limits, classifiers, allowed_hosts: As given.
        image_downloads: Downloads images that requests name by URL.
        sampling_defaults: Those, with the generation config's.
        token_bytes: The bytes of the model's tokens.
        fingerprint: Fingerprint of the model.
        is_open: It needs no API keys.
        metrics: For Prometheus.
        is_ready: False once it is shutting down.
        large_bodies: Parses large bodies in turn.
        work_pools: Threads for blocking work.

    Raises:
        StoreError: If the store cannot be opened.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        store: str,
        *,
        name: str,
        open_tenant: str | None = None,
        encryption_keys: EncryptionKeys | None = None,
        attributes: AttributeSpace | None = None,
        classifiers: Sequence[AttributeClassifier] = (),
        limits: ServerLimits | None = None,
        runner: Runner | None = None,
        allowed_hosts: Collection[str] = (),
        unknown_users: UnknownUsers = "refuse",
        sampling_defaults: Mapping[str, float] | None = None,
        image_origins: Sequence[str] = (),
        does_jobs: bool = True,
    ) -> None:
        self.name = name
        self.sampling_defaults = {**frozen.sampling_defaults, **(sampling_defaults or {})}
        if temperature := self.sampling_defaults.get("temperature"):
            self.sampling_defaults["temperature"] = max(MIN_TEMPERATURE, temperature)
        self.token_bytes = TokenBytes(frozen.tokenizer)
        self.fingerprint = frozen.fingerprint
        self._unknown_users = unknown_users
        self._tokenizer = frozen.request_tokenizer
        self._generator = Generator(frozen)
        self._prompt_echo = PromptEcho(frozen)
        self.limits = limits or ServerLimits()
        self.classifiers = tuple(classifiers)
        self.is_ready = True
        self.is_open = open_tenant is not None
        self.allowed_hosts = tuple(allowed_hosts)
        self.image_downloads = ImageDownloads(image_origins, self.limits.max_body_bytes)
        self.large_bodies = LargeBodies()
        self.num_watchers = Counter[str]()  # by tenant, of jobs
        self.work_pools = WorkPools(self.limits.max_enrolments, self.limits.timeout_s)
        self._to_forget: list[tuple[str, AuditEntry]] = []
        self._under_way: dict[object, tuple[str, int]] = {}  # tenant, and number of choices
        self._token_limiter = TokenLimiter(self.limits.tokens_per_minute)
        self._tenants = Tenants(
            frozen,
            store,
            open_tenant=open_tenant,
            encryption_keys=encryption_keys,
            attributes=attributes,
            rate_limiter=RateLimiter(self.limits.requests_per_minute),
        )
        self._runner = runner or self._generator.batcher(
            max_sequences=self.limits.max_sequences,
            # `admit` counts what runs and waits; all of it may wait for a moment.
            max_waiting=self.limits.max_waiting + self.limits.max_sequences,
            max_sequences_per_tenant=None if open_tenant else self.limits.sequences_per_tenant,
            max_sequences_beside_others=(
                None if open_tenant else self.limits.sequences_beside_others
            ),
        )
        self._worker = self._tenants.worker() if does_jobs else None
        if self._worker is not None:
            self._worker.start()
        self.metrics = Metrics(lambda: self._runner.load)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model takes messages."""
        return self._tokenizer.has_chat_template

    @property
    def store_label(self) -> str:
        """How messages name the store."""
        return self._tenants.store_label

    def has_prefixes(self, tenant: str) -> bool:
        """Whether a tenant has any prefix for the model."""
        return self._tenants.has_prefixes(tenant)

    def authenticate(self, api_key: str | None, address: str = "") -> Client:
        """The client with an API key: see `Tenants.authenticate`."""
        return self._tenants.authenticate(api_key, address)

    async def resolve(
        self, client: Client, request: Request, disconnect_task: "asyncio.Task[None] | None" = None
    ) -> ResolvedRequest[Request]:
        """Find the prefixes of a request.

        Args:
            client: Who sent it.
            request: The request.
            disconnect_task: Done when the client has disconnected.

        Raises:
            ControlPrefixError: If it cannot be accepted.
        """
        self.require_capacity(client)
        if request.unseen == "distill":
            raise RequestError(
                "unseen='distill' trains a prefix, which requests to a server do not; distill the "
                "label beforehand (cp.distill), or use unseen='text'"
            )
        try:
            return await self._resolve(client, request, disconnect_task)
        except UnknownNameError as error:
            if request.user is None or self._unknown_users == "refuse":
                raise
            plain = request.model_copy(update={"user": None})
            try:
                return await self._resolve(client, plain, disconnect_task)
            except UnknownNameError:
                raise error from None  # it was not the user
            except RequestError:
                if request.when == "always":
                    raise
                # No prefix is left that knows what it is for.
                plain = plain.model_copy(update={"when": "always"})
                return await self._resolve(client, plain, disconnect_task)

    async def _resolve(
        self, client: Client, request: Request, disconnect_task: "asyncio.Task[None] | None"
    ) -> ResolvedRequest[Request]:
        if request.unseen == "refuse" and request.when == "always":
            return await self.work_pools.run_with_store(client.cp.resolve, request)
        # Labels without a prefix, and prompts, are looked up by embeddings.
        resolve = partial(client.cp.resolve, request)
        return await self.work_pools.run_with_model(
            client.tenant, resolve, disconnect_task=disconnect_task
        )

    def require_capacity(self, client: Client) -> None:
        """Check that a client's request could be submitted now.

        Raises:
            RateLimitError: If its API key has used up its tokens.
            OverloadedError: If too many requests are waiting.
        """
        if client.key_name:
            self._token_limiter.require(client.tenant, client.key_name)
        self._runner.require_capacity()

    def count_tokens(self, client: Client, num_tokens: int) -> None:
        """Count a client's tokens against the limit of its API key."""
        self._token_limiter.add(client.tenant, client.key_name, num_tokens)

    def admit(self, tenant: str, num_choices: int) -> Callable[[], object]:
        """Count the choices of a request as under way, all or none of them.

        Returns:
            Ends the count.

        Raises:
            OverloadedError: If the tenant, or all together, would have more than run and wait.
        """
        limits, under_way = self.limits, [*self._under_way.values()]
        own = all_tenants = limits.max_waiting + limits.max_sequences
        if not self.is_open:
            own = limits.max_waiting - limits.max_waiting // 8 + limits.sequences_per_tenant
        for count, limit, whose in (
            (sum(n for name, n in under_way if name == tenant), own, "of this tenant"),
            (sum(n for _, n in under_way), all_tenants, "of all tenants"),
        ):
            if count and count + num_choices > limit:
                raise OverloadedError(
                    f"{count} choices {whose} are under way, and with {num_choices} more there "
                    f"would be more than {limit}; try again later"
                )
        entry = object()
        self._under_way[entry] = tenant, num_choices
        # One operation on a dict, since garbage collection may call it in any thread.
        return lambda: self._under_way.pop(entry, None)

    async def submit(
        self,
        client: Client,
        resolved: ResolvedRequest[Request],
        deliver: Deliver,
        top_log_probs: int | None,
    ) -> Ticket:
        """Start a request.

        Raises:
            ControlPrefixError: If it cannot be accepted.
        """

        def work() -> Ticket:
            ticket = self._runner.submit(resolved, top_log_probs=top_log_probs, deliver=deliver)
            try:
                raise_if_stopped()
            except TrainingInterrupted:  # nobody waits for it any more
                ticket.cancel()
                raise
            return ticket

        return await self.work_pools.run_tokenizing(client.tenant, work)

    async def echoes(
        self,
        client: Client,
        resolved: Sequence[ResolvedRequest[Request]],
        top: int | None,
        disconnect_task: "asyncio.Task[None]",
    ) -> list[Echo]:
        """The prompts of requests, with log-probabilities if `top` is given.

        Args:
            client: Who sent them.
            resolved: The requests.
            top: Likeliest tokens per position.
            disconnect_task: Done when the client has disconnected.

        Raises:
            ControlPrefixError: If they cannot be computed.
        """

        read = partial(self._prompt_echo.read, resolved, top)
        return await self.work_pools.run_with_model(
            client.tenant, read, disconnect_task=disconnect_task
        )

    async def without_tokens(
        self, client: Client, resolved: ResolvedRequest[Request]
    ) -> Completion:
        """The completion of a request for no tokens.

        Raises:
            RequestError: If its prompt cannot be tokenized.
        """
        read = partial(self._tokenizer.prompt_ids, resolved.request)
        prompt = await self.work_pools.run_tokenizing(client.tenant, read)
        empty = Completion(
            text="", finish_reason="length", num_prompt_tokens=len(prompt), num_tokens=0
        )
        return resolved.report_in(empty)

    def wake_worker(self) -> None:
        """Let this process do a job that was just queued, if it does jobs."""
        if self._worker is not None:
            self._worker.wake()

    def drop_forgotten(self) -> None:
        """Drop what was removed from the store, also by other processes, and what has expired.

        Raises:
            StoreError: If the store does not answer, or a file cannot be removed.
        """
        for removed in self._tenants.drop_forgotten():
            self._to_forget.append(removed)  # until it is done, whatever fails meanwhile
        failed = None
        for removed in list(self._to_forget):
            tenant, entry = removed
            try:
                self._runner.forget(tenant, entry.key, removed_at=entry.at)
            except StoreError as error:
                failed = error
            else:
                self._to_forget.remove(removed)
        if failed is not None:
            raise failed
        self._runner.remove_expired()

    async def enroll(
        self,
        client: Client,
        user: str,
        options: Mapping[str, Any],
        disconnect_task: "asyncio.Task[None]",
    ) -> int:
        """Enroll a user; returns the version. A user who is forgotten meanwhile stays forgotten.

        Args:
            client: Who sent the request.
            user: Name of the user.
            options: Arguments of `ControlPrefix.enroll`.
            disconnect_task: Done when the client has disconnected; then nothing is stored.

        Raises:
            ForgottenError: If the user was forgotten meanwhile.
            ControlPrefixError: If the user cannot be enrolled.
        """
        store = client.cp.store
        before = await self.work_pools.run_with_store(
            partial(store.last_removal_number, forgotten=user)
        )

        def work() -> int:
            if store.last_removal_number(forgotten=user) != before:  # while this waited
                raise ForgottenError(user)
            return client.cp.enroll(user, **options)

        return await self.work_pools.run_enrolment(
            client.tenant, work, disconnect_task=disconnect_task
        )

    async def forget(self, client: Client, kind: Kind, name: str) -> int:
        """Remove a name from the store, and from this process; returns its versions.

        Raises:
            UnknownNameError: If there is nothing of that name.
        """
        num_versions = await self.work_pools.run_with_store(client.cp.remove, kind, name)
        await self.work_pools.run_with_store(
            self._runner.forget, client.tenant, PrefixKey(kind, name)
        )
        return num_versions

    def check_health(self) -> None:
        """Check that the server is not shutting down, and that engine and store answer.

        Raises:
            OverloadedError, StoreError, EngineError: If not.
        """
        if not self.is_ready:
            raise OverloadedError("this process is shutting down")
        self._runner.check_health()
        self._tenants.check_health()

    def close(self) -> None:
        """Accept no more requests, and finish the accepted ones."""
        self.is_ready = False
        self.work_pools.stop()
        if self._worker is not None:
            self._worker.close()
        self._runner.close(timeout_s=self.limits.timeout_s)
        self._tenants.close()
