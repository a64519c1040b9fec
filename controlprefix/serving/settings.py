"""ServerLimits: what a server accepts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server accepts.

    Attributes:
        max_body_bytes: Size of a request body.
        max_new_tokens: New tokens per completion.
        max_choices: Choices per request (`n`, or prompts times `n`).
        requests_per_minute: Per API key; 0 for no limit.
        timeout_s: Seconds per request, from its arrival.
        max_sequences, max_waiting: Sequences decoded concurrently, and requests that wait.
        max_texts: Texts per enrolment.
        max_enrolments: Concurrent enrolments.
    """

    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 2048
    max_choices: int = 16
    requests_per_minute: int = 0
    timeout_s: float = 300.0
    max_sequences: int = 32
    max_waiting: int = 256
    max_texts: int = 1000
    max_enrolments: int = 4
