"""ServerLimits: what a server accepts."""

import math
from dataclasses import dataclass

from controlprefix.errors import RequestError


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server accepts.

    Attributes:
        max_body_bytes: Size of a request body.
        max_new_tokens: New tokens per completion.
        max_choices: Choices per request (`n`, or prompts times `n`).
        requests_per_minute, tokens_per_minute: Per API key; 0 for no limit.
        timeout_s: Seconds per request, from its arrival.
        body_timeout_s: Seconds that a request's body may take to arrive, and for which a client
            may read nothing of a response.
        header_timeout_s: Seconds that a connection may be idle, or take to send a head.
        max_connections: Open connections; beyond it, those that are idle are closed.
        max_sequences, max_waiting: Rows decoded concurrently, and requests that wait.
        max_sequences_per_tenant: Of these rows, those that one tenant may have. The fewer,
            the less another tenant's requests are slowed. Left out, seven eighths, and half
            while another tenant has asked within the last minute.
        max_texts: Texts per enrolment.
        max_enrolments: Enrolments that a tenant may have, those that wait included; one at a
            time is made.

    Raises:
        RequestError: If one is below 0, or 0 where that is not "no limit".
    """

    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 2048
    max_choices: int = 16
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    timeout_s: float = 300.0
    body_timeout_s: float = 30.0
    header_timeout_s: float = 20.0
    max_connections: int = 512
    max_sequences: int = 32
    max_waiting: int = 256
    max_sequences_per_tenant: int | None = None
    max_texts: int = 1000
    max_enrolments: int = 4

    def __post_init__(self) -> None:
        may_be_zero = {"requests_per_minute", "tokens_per_minute"}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in may_be_zero):
                raise RequestError(f"{name} is {value}; it must be a number above 0")

    @property
    def sequences_per_tenant(self) -> int:
        """Rows that one of several tenants may have, so that others find one free."""
        return self.max_sequences_per_tenant or self.max_sequences - self.max_sequences // 8

    @property
    def sequences_beside_others(self) -> int:
        """Those that it may have while another tenant asks."""
        return self.max_sequences_per_tenant or max(1, self.max_sequences // 2)
