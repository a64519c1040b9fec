"""The gateway: whose request it is, what it may ask for, and where it runs."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.attributes import AttributeSpace
from controlprefix.engine import ControlPrefix
from controlprefix.errors import ControlPrefixError, UnknownNameError
from controlprefix.evaluation import Judge
from controlprefix.inference.continuous_batching import Event, Runner, Ticket
from controlprefix.request import Request
from controlprefix.store import KeyProvider, PrefixStore, tenant_of

_TRUSTED_FOR_S = 10.0  # after which a key is looked up again, so that revoking one takes effect


class UnauthorizedError(ControlPrefixError):
    """No API key, or one that is not known."""


class RateLimitError(ControlPrefixError):
    """More requests a minute than a key may send.

    Attributes:
        wait: Seconds until the next may come.
    """

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes.

    Attributes:
        body_bytes: Of a request.
        new_tokens: Of a completion; more are refused.
        choices: Of one request (`n`, or prompts times `n`).
        requests_a_minute: Of a key; 0 for no limit.
        seconds: Of a request, from when it came.
        rows, waiting: In the batch, and in line for it.
        texts: That a user may be enrolled from at once.
        enrolments: At a time.
    """

    body_bytes: int = 1 << 20
    new_tokens: int = 2048
    choices: int = 16
    requests_a_minute: int = 0
    seconds: float = 300.0
    rows: int = 32
    waiting: int = 256
    texts: int = 1000
    enrolments: int = 4


@dataclass(slots=True)
class _Bucket:
    """How many requests a key has left, refilled evenly."""

    left: float
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    Attributes:
        tenant, key: Whose key it is, and its name.
        cp: With that tenant's prefixes.
    """

    tenant: str
    key: str
    cp: ControlPrefix


class Gateway:
    """One frozen model for all tenants of a store.

    Args:
        model, tokenizer: Loaded, and frozen.
        store: Its URL.
        name: That clients call the model by.
        open_tenant: Serve this tenant to whoever asks, without keys; None: a key is needed.
        keys: To decrypt stored prefixes with.
        attributes: For all tenants.
        judges: To say which labels texts show.
        limits: What is taken.
        runner: Runs requests elsewhere, such as `cp.vllm_runner`; left out, a batch in this
            process does.

    Raises:
        StoreError: If the store cannot be opened.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: str,
        *,
        name: str,
        open_tenant: str | None = None,
        keys: KeyProvider | None = None,
        attributes: AttributeSpace | None = None,
        judges: Sequence[Judge] = (),
        limits: Limits | None = None,
        runner: Callable[[ControlPrefix], Runner] | None = None,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.open_tenant = open_tenant
        self.judges = tuple(judges)
        self.ready = True
        self._model, self._tokenizer = model, tokenizer
        self._store, self._keys, self._attributes = store, keys, attributes
        self._lock = threading.Lock()
        self._engines: dict[str, ControlPrefix] = {}
        self._trusted: dict[str, tuple[str, str, float]] = {}
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        some = self._engine(open_tenant or "default")
        self._runner = (
            runner(some)
            if runner
            else some.batcher(max_rows=self.limits.rows, max_waiting=self.limits.waiting)
        )

    def client(self, key: str | None) -> Client:
        """Who asks, by their API key. It waits for the store: not for an event loop.

        Raises:
            UnauthorizedError: If the key is missing or unknown.
            RateLimitError: If it has sent too many requests.
        """
        if self.open_tenant is not None:
            return Client(self.open_tenant, "", self._engine(self.open_tenant))
        tenant, name = self._known(key or "")
        self._count(tenant, name)
        return Client(tenant, name, self._engine(tenant))

    def submit(
        self,
        client: Client,
        request: Request,
        deliver: Callable[[Event], object],
        top_log_probs: int | None,
    ) -> Ticket:
        """Have a request written. It waits for the store.

        Raises:
            ControlPrefixError: If it cannot be taken.
        """
        return self._runner.submit(
            request,
            top_log_probs=top_log_probs,
            prepare=client.cp.prepare,
            deliver=deliver,
        )

    @property
    def load(self) -> tuple[int, int]:
        """Rows in the batch, and requests that wait."""
        return self._runner.load

    def check(self) -> None:
        """Ask the store, and the engine, something.

        Raises:
            StoreError, EngineError: If one does not answer.
        """
        self._runner.check()
        next(iter(self._engines.values())).store.stats()

    def close(self) -> None:
        """Finish what there is, and take no more."""
        self.ready = False
        self._runner.close(wait=self.limits.seconds)
        for engine in self._engines.values():
            engine.store.close()

    def _known(self, key: str) -> tuple[str, str]:
        tenant, name, until = self._trusted.get(key, ("", "", 0.0))
        if time.monotonic() < until:
            return tenant, name
        self._trusted.pop(key, None)
        found, whose = None, tenant_of(key)
        if whose is not None:
            known = self._engines.get(whose)
            if known is not None:
                found = known.store.name_of_api_key(key)
            else:  # anyone may write a tenant's name into a key: nothing is kept for a wrong one
                with (
                    contextlib.suppress(UnknownNameError),  # a name that no tenant can have
                    PrefixStore(self._store, tenant=whose, keys=self._keys) as store,
                ):
                    found = store.name_of_api_key(key)
        if whose is None or found is None:
            raise UnauthorizedError("the API key is missing, unknown or revoked")
        self._trusted[key] = (whose, found, time.monotonic() + _TRUSTED_FOR_S)
        return whose, found

    def _count(self, tenant: str, name: str) -> None:
        most = self.limits.requests_a_minute
        if not most:
            return
        with self._lock:
            bucket = self._buckets.setdefault((tenant, name), _Bucket(float(most)))
            now = time.monotonic()
            bucket.left = min(float(most), bucket.left + (now - bucket.at) * most / 60)
            bucket.at = now
            if bucket.left < 1:
                wait = (1 - bucket.left) * 60 / most
                raise RateLimitError(
                    f"this key may send {most} requests a minute; the next in {wait:.1f} s", wait
                )
            bucket.left -= 1

    def _engine(self, tenant: str) -> ControlPrefix:
        with self._lock:
            if tenant not in self._engines:
                opened = PrefixStore(self._store, tenant=tenant, keys=self._keys)
                self._engines[tenant] = ControlPrefix(
                    self._model, self._tokenizer, opened, self._attributes
                )
            return self._engines[tenant]
