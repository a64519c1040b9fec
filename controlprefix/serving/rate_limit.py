"""Limits per minute and API key: of requests, and of tokens."""

import json
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from controlprefix.errors import RateLimitError


class RateLimiter:
    """Limits the requests of each API key in any 60 seconds.

    Args:
        requests_per_minute: 0 for no limit.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self._limit = requests_per_minute
        self._item = RateLimitItemPerMinute(max(1, requests_per_minute))
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def hit(self, tenant: str, key_name: str) -> None:
        """Count a request.

        Raises:
            RateLimitError: If the key has sent too many.
        """
        name = _identifier(tenant, key_name)
        if not self._limit or self._limiter.hit(self._item, name):
            return
        reset_at = self._limiter.get_window_stats(self._item, name).reset_time
        wait_s = max(0.0, reset_at - time.time())
        raise RateLimitError(
            f"too many requests: {self._limit} per minute are accepted; the next in {wait_s:.1f} s",
            wait_s,
        )


class TokenLimiter:
    """Limits the tokens of each API key in a minute.

    Tokens count when a request is done, since only then their number is certain: the request
    that goes beyond the limit is finished, and the next ones wait for the end of the minute.

    Args:
        tokens_per_minute: Of prompts and completions; 0 for no limit.
    """

    def __init__(self, tokens_per_minute: int) -> None:
        self._limit = tokens_per_minute
        self._item = RateLimitItemPerMinute(max(1, tokens_per_minute))
        self._storage = MemoryStorage()
        self._limiter = FixedWindowRateLimiter(self._storage)

    def require(self, tenant: str, key_name: str) -> None:
        """Check that a key has tokens left.

        Raises:
            RateLimitError: If it has not.
        """
        name = _identifier(tenant, key_name)
        if not self._limit or self._limiter.test(self._item, name):
            return
        reset_at = self._limiter.get_window_stats(self._item, name).reset_time
        wait_s = max(0.0, reset_at - time.time())
        raise RateLimitError(
            f"too many tokens: {self._limit} per minute are given; more in {wait_s:.1f} s", wait_s
        )

    def add(self, tenant: str, key_name: str, num_tokens: int) -> None:
        """Count tokens of a key."""
        if self._limit and num_tokens:
            key = self._item.key_for(_identifier(tenant, key_name))
            self._storage.incr(key, self._item.get_expiry(), amount=num_tokens)


def _identifier(tenant: str, key_name: str) -> str:
    return json.dumps([tenant, key_name])  # names may contain what the limiter joins them with
