"""Tenants: who sends a request, and the engine with their prefixes."""

import threading
import time
from dataclasses import dataclass

from controlprefix.attributes import AttributeSpace
from controlprefix.engine import ControlPrefix
from controlprefix.errors import UnauthorizedError
from controlprefix.model import FrozenModel
from controlprefix.serving.rate_limit import RateLimiter
from controlprefix.store import EncryptionKeys, PrefixStore, tenant_of
from controlprefix.store.api_keys import name_of
from controlprefix.store.database import Database

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
    """Authenticates clients, and keeps one engine per tenant on one frozen model.

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
        self._store = store
        self._open_tenant = open_tenant
        self._encryption_keys = encryption_keys
        self._attributes = attributes
        self._rate_limiter = rate_limiter
        self._failure_limiter = RateLimiter(_MAX_WRONG_KEYS_PER_MINUTE)
        self._lock = threading.Lock()
        self._engines: dict[str, ControlPrefix] = {}
        self._known_keys: dict[str, tuple[str, str, float]] = {}
        self._database = Database(store, "")
        self._database.create_tables()

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

    def check_health(self) -> None:
        """Check that the store answers.

        Raises:
            StoreError: If it does not.
        """
        self._database.run(lambda session, tenant: None)

    def close(self) -> None:
        """Close all stores."""
        self._database.close()
        for engine in self._engines.values():
            engine.store.close()

    def _look_up(self, api_key: str) -> tuple[str, str]:
        """The tenant and the name of an API key."""
        tenant, key_name, valid_until = self._known_keys.get(api_key, ("", "", 0.0))
        if time.monotonic() < valid_until:
            return tenant, key_name
        self._known_keys.pop(api_key, None)
        # Anyone can write a tenant into a key, so nothing is kept for a wrong one, and the same is
        # done for every tenant, active or not.
        name, claimed_tenant = None, tenant_of(api_key)
        if claimed_tenant is not None and claimed_tenant.isprintable():
            database = self._database.for_tenant(claimed_tenant)
            name = database.run(lambda session, tenant: name_of(session, tenant, api_key))
        if claimed_tenant is None or name is None:
            raise UnauthorizedError("the API key is missing, unknown or revoked")
        self._known_keys[api_key] = (claimed_tenant, name, time.monotonic() + _KEY_CACHE_S)
        return claimed_tenant, name

    def _engine(self, tenant: str) -> ControlPrefix:
        with self._lock:
            if tenant not in self._engines:
                store = PrefixStore(
                    self._store, tenant=tenant, encryption_keys=self._encryption_keys
                )
                self._engines[tenant] = ControlPrefix(self._frozen, store, self._attributes)
            return self._engines[tenant]
