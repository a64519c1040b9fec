"""RateLimiter: requests per minute and API key."""

import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

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
        if not self._limit or self._limiter.hit(self._item, tenant, key_name):
            return
        reset_at = self._limiter.get_window_stats(self._item, tenant, key_name).reset_time
        wait_s = max(0.0, reset_at - time.time())
        raise RateLimitError(
            f"too many requests: {self._limit} per minute are accepted; the next in {wait_s:.1f} s",
            wait_s,
        )
