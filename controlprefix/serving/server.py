"""Server: the state that all routes share."""

from collections.abc import Sequence

from controlprefix.attributes import AttributeSpace
from controlprefix.errors import OverloadedError
from controlprefix.evaluation import AttributeClassifier
from controlprefix.inference.generator import Generator
from controlprefix.inference.runner import Deliver, Runner, Ticket
from controlprefix.model import FrozenModel
from controlprefix.request import Request
from controlprefix.serving.metrics import Metrics
from controlprefix.serving.rate_limit import RateLimiter
from controlprefix.serving.settings import ServerLimits
from controlprefix.serving.tenants import Client, Tenants
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

    Attributes:
        name, limits, classifiers: As given.
        metrics: For Prometheus.
        is_ready: False once it is shutting down.

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
    ) -> None:
        self.name = name
        self.limits = limits or ServerLimits()
        self.classifiers = tuple(classifiers)
        self.is_ready = True
        self._num_enrolments = 0
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

    def authenticate(self, api_key: str | None) -> Client:
        """The client with an API key: see `Tenants.authenticate`."""
        return self._tenants.authenticate(api_key)

    def submit(
        self, client: Client, request: Request, deliver: Deliver, top_log_probs: int | None
    ) -> Ticket:
        """Start a request. It queries the store, so it must not run in an event loop.

        Raises:
            ControlPrefixError: If it cannot be accepted.
        """
        self._runner.require_capacity()
        resolved = client.cp.resolve(request)
        return self._runner.submit(resolved, top_log_probs=top_log_probs, deliver=deliver)

    def begin_enrolment(self) -> None:
        """Count an enrolment, which may take a thread for long.

        Raises:
            OverloadedError: If there are too many.
        """
        if self._num_enrolments >= self.limits.max_enrolments:
            raise OverloadedError(
                f"{self._num_enrolments} users are being enrolled; try again later"
            )
        self._num_enrolments += 1

    def end_enrolment(self) -> None:
        """Count an enrolment as finished."""
        self._num_enrolments -= 1

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
