"""Server: the state that all routes share."""

from collections.abc import Collection, Sequence

from controlprefix.attributes import AttributeSpace
from controlprefix.errors import OverloadedError
from controlprefix.evaluation import AttributeClassifier
from controlprefix.inference.generator import Generator
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.inference.runner import Deliver, Runner, Ticket
from controlprefix.model import FrozenModel
from controlprefix.request import Request
from controlprefix.serving.metrics import Metrics
from controlprefix.serving.rate_limit import RateLimiter
from controlprefix.serving.settings import ServerLimits
from controlprefix.serving.tenants import Client, Tenants
from controlprefix.serving.work import WorkPools
from controlprefix.store import EncryptionKeys


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
        allowed_hosts: With `open_tenant`, host names beside `localhost` and IP addresses.

    Attributes:
        name, limits, classifiers, allowed_hosts: As given.
        is_open: It needs no API keys.
        metrics: For Prometheus.
        is_ready: False once it is shutting down.
        work: Threads for blocking work.

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
    ) -> None:
        self.name = name
        self.limits = limits or ServerLimits()
        self.classifiers = tuple(classifiers)
        self.is_ready = True
        self.is_open = open_tenant is not None
        self.allowed_hosts = tuple(allowed_hosts)
        self.work = WorkPools(self.limits.max_enrolments)
        self._tenants = Tenants(
            frozen,
            store,
            open_tenant=open_tenant,
            encryption_keys=encryption_keys,
            attributes=attributes,
            rate_limiter=RateLimiter(self.limits.requests_per_minute),
        )
        num_rows = self.limits.max_sequences
        self._runner = runner or Generator(frozen).batcher(
            max_sequences=num_rows,
            max_waiting=self.limits.max_waiting,
            # Others find a row free, whatever a tenant does.
            max_sequences_per_tenant=num_rows if open_tenant else num_rows - num_rows // 8,
        )
        self.metrics = Metrics(lambda: self._runner.load)

    def authenticate(self, api_key: str | None, address: str = "") -> Client:
        """The client with an API key: see `Tenants.authenticate`."""
        return self._tenants.authenticate(api_key, address)

    async def resolve(self, client: Client, request: Request) -> ResolvedRequest[Request]:
        """Find the prefixes of a request.

        Raises:
            ControlPrefixError: If it cannot be accepted.
        """
        self._runner.require_capacity()
        if request.unseen == "refuse":
            return await self.work.with_store(client.cp.resolve, request)
        # Labels without a prefix are looked up by embeddings, or made of texts.
        return await self.work.with_model(client.tenant, client.cp.resolve, request)

    async def submit(
        self, resolved: ResolvedRequest[Request], deliver: Deliver, top_log_probs: int | None
    ) -> Ticket:
        """Start a request.

        Raises:
            ControlPrefixError: If it cannot be accepted.
        """
        return await self.work.with_store(
            self._runner.submit, resolved, top_log_probs=top_log_probs, deliver=deliver
        )

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
        self._runner.close(timeout_s=self.limits.timeout_s)
        self._tenants.close()
