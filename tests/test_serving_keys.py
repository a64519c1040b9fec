"""API keys of a server: what wrong ones and busy ones may do."""

import contextlib

import httpx
import pytest

from controlprefix.errors import RateLimitError, UnauthorizedError
from controlprefix.serving.rate_limit import RateLimiter, TokenLimiter
from controlprefix.serving.tenants import Tenants

from helpers import frozen
from servers import Keys, Served


@pytest.mark.slow
def test_wrong_keys_are_limited_and_right_ones_are_not(two_tenants: str, keys: Keys) -> None:
    served = Served(two_tenants)
    try:
        url = f"{served.base}/v1/models"
        wrong = [
            httpx.get(url, headers={"Authorization": f"Bearer cp.YQ.{i}"}).status_code
            for i in range(65)
        ]
        assert set(wrong[:60]) == {401}
        assert set(wrong[60:]) == {429}
        assert httpx.get(url, headers=keys["a"]).status_code == 200
    finally:
        served.close()


def test_wrong_keys_of_one_address_limit_no_other(two_tenants: str) -> None:
    tenants = Tenants(
        frozen(), two_tenants, open_tenant=None, encryption_keys=None, attributes=None,
        rate_limiter=RateLimiter(0),
    )  # fmt: skip
    with contextlib.closing(tenants):
        for _ in range(60):
            with pytest.raises(UnauthorizedError):
                tenants.authenticate("cp.YQ.x", "10.0.0.1")
        with pytest.raises(RateLimitError):
            tenants.authenticate("cp.YQ.x", "10.0.0.1")
        with pytest.raises(UnauthorizedError):
            tenants.authenticate("cp.YQ.x", "10.0.0.2")


def test_each_key_of_a_tenant_has_its_own_rate() -> None:
    limiter = RateLimiter(1)
    for tenant, key in (("a", "web"), ("a", "app"), ("b", "web")):
        limiter.hit(tenant, key)
        with pytest.raises(RateLimitError):
            limiter.hit(tenant, key)


def test_limits_of_tenants_are_apart_whatever_their_names() -> None:
    limiter = RateLimiter(1)
    limiter.hit("a", "b/c")
    limiter.hit("a/b", "c")
    with pytest.raises(RateLimitError):
        limiter.hit("a", "b/c")
    tokens = TokenLimiter(5)
    tokens.add("a", "b/c", 9)
    tokens.require("a/b", "c")
    with pytest.raises(RateLimitError):
        tokens.require("a", "b/c")
