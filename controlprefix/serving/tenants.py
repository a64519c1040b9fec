"""Tenants: who sends a request, and the engine with their prefixes."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cachetools import LRUCache, TTLCache

from controlprefix.attributes import AttributeSpace
from controlprefix.engine import ControlPrefix
from controlprefix.errors import UnauthorizedError, UnknownNameError
from controlprefix.inference.resolver import PrefixCaches
from controlprefix.jobs import JobWorker
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Kind
from controlprefix.serving.rate_limit import RateLimiter
from controlprefix.store import AuditEntry, EncryptionKeys, PrefixStore, tenant_of

_log = logging.getLogger(__name__)

_ANY_TENANT = "default"  # the store is opened as one tenant; requests have views of their own
_MAX_ENGINES = 256
_AUDIT_WINDOW = 100  # numbers before the newest that is known, which are read again
_OLDEST_REMOVAL = timedelta(hours=2)
_MAX_KNOWN_KEYS = 10_000
_MAX_WRONG_KEYS_PER_MINUTE = 60  # from one address
_KEY_CACHE_S = 10.0  # after which a key is looked up again, so that revoking it takes effect


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request.

    Attributes:
        tenant, key_name: The tenant, and the name of the API key.
        cp: The engine with the tenant's prefixes.
    """

    tenant: str
    key_name: str
    cp: ControlPrefix


class Tenants:
    """Authenticates clients, and makes an engine per tenant on one frozen model.

    All tenants share the database's connections and one cache of prefixes, whose size is
    bounded; the engines of those that were active last are kept.

    Args:
        frozen: The model.
        store: SQLAlchemy URL.
        open_tenant: Serve this tenant to everybody, without API keys; None: a key is needed.
        encryption_keys: Keys of encrypted prefixes.
        attributes: Attribute space of all tenants.
        rate_limiter: Counts the requests of each API key.

    Raises:
        StoreError: If the store cannot be opened.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        store: str,
        *,
        open_tenant: str | None,
        encryption_keys: EncryptionKeys | None,
        attributes: AttributeSpace | None,
        rate_limiter: RateLimiter,
    ) -> None:
        self._frozen = frozen
        self._open_tenant = open_tenant
        self._attributes = attributes
        self._rate_limiter = rate_limiter
        self._failure_limiter = RateLimiter(_MAX_WRONG_KEYS_PER_MINUTE)
        self._lock = threading.Lock()
        self._engines: LRUCache[str, ControlPrefix] = LRUCache(_MAX_ENGINES)
        self._caches = PrefixCaches()
        self._read_entries: dict[str, set[int]] = {}  # tenant -> last numbers in its audit log
        self._known_keys: TTLCache[str, tuple[str, str]] = TTLCache(_MAX_KNOWN_KEYS, _KEY_CACHE_S)
        self._store = PrefixStore(
            store, tenant=open_tenant or _ANY_TENANT, encryption_keys=encryption_keys
        )
        if self._store.ignores_row_security:
            _log.warning(
                "the store's role is a superuser or bypasses row security, so PostgreSQL does not "
                "hold tenants apart; connect as another role"
            )

    def authenticate(self, api_key: str | None, address: str = "") -> Client:
        """The client with an API key. It queries the store, so it must not run in an event loop.

        Args:
            api_key: The key.
            address: Where the request comes from; wrong keys are limited per address.

        Raises:
            UnauthorizedError: If the key is missing or unknown.
            RateLimitError: If it has sent too many requests, or the address too many wrong keys.
        """
        if self._open_tenant is not None:
            return Client(self._open_tenant, "", self._engine(self._open_tenant))
        try:
            tenant, key_name = self._look_up(api_key or "")
        except UnauthorizedError:
            self._failure_limiter.hit("", address)
            raise
        self._rate_limiter.hit(tenant, key_name)
        return Client(tenant, key_name, self._engine(tenant))

    def worker(self) -> JobWorker:
        """What does the jobs of all tenants."""
        return JobWorker(self._frozen, self._store, self._attributes)

    @property
    def store_label(self) -> str:
        """How messages name the store."""
        return self._store.display_name

    def has_prefixes(self, tenant: str) -> bool:
        """Whether a tenant has any prefix for the model.

        Args:
            tenant: Its name.
        """
        engine = self._engine(tenant)
        kinds: tuple[Kind, ...] = ("task", "attribute", "user")
        return any(engine.names(kind, limit=1) for kind in kinds)

    def drop_forgotten(self) -> Iterator[tuple[str, AuditEntry]]:
        """Drop from memory what other processes removed from the store since the last call.

        Yields:
            Tenant and removal of all that was removed, by this process too, each once.

        Raises:
            StoreError: If the store does not answer.
        """
        with self._lock:
            tenants = {
                *self._engines,
                *(tenant for tenant, _ in self._caches.prefixes.cached_keys()),
            }
        for tenant in sorted(tenants):
            is_first = tenant not in self._read_entries
            read = self._read_entries.setdefault(tenant, set())
            oldest = datetime.now(UTC) - _OLDEST_REMOVAL
            # An entry may be committed after one with a higher number.
            after = max(read, default=0) - _AUDIT_WINDOW
            for entry in self._store.for_tenant(tenant).audit_log(after=after, action="forget"):
                is_new = entry.number not in read
                read.add(entry.number)
                # At the first look, what is older is in no memory, and its files have expired.
                if is_new and not (is_first and entry.at < oldest):
                    self._caches.forget(tenant, entry.key)
                    yield tenant, entry
            newest = max(read, default=0)
            self._read_entries[tenant] = {n for n in read if n > newest - _AUDIT_WINDOW}

    def check_health(self) -> None:
        """Check that the store answers.

        Raises:
            StoreError: If it does not.
        """
        self._store.check_health()

    def close(self) -> None:
        """Close all stores."""
        self._store.close()

    def _look_up(self, api_key: str) -> tuple[str, str]:
        """The tenant and the name of an API key."""
        with self._lock:
            if (client := self._known_keys.get(api_key)) is not None:
                return client
        # Anyone can write a tenant into a key, so nothing is kept for a wrong one, and the same is
        # done for every tenant, active or not.
        name, claimed_tenant = None, tenant_of(api_key)
        if claimed_tenant is not None and claimed_tenant.isprintable():
            with contextlib.suppress(UnknownNameError):  # no name of a tenant
                name = self._store.for_tenant(claimed_tenant).name_of_api_key(api_key)
        if claimed_tenant is None or name is None:
            raise UnauthorizedError("the API key is missing, unknown or revoked")
        with self._lock:
            self._known_keys[api_key] = (claimed_tenant, name)
        return claimed_tenant, name

    def _engine(self, tenant: str) -> ControlPrefix:
        with self._lock:
            engine = self._engines.get(tenant)
            if engine is None:
                engine = ControlPrefix(
                    self._frozen,
                    self._store.for_tenant(tenant),
                    self._attributes,
                    caches=self._caches,
                )
                self._engines[tenant] = engine
            return engine
