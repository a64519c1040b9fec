"""VllmClient: asynchronous calls of one vLLM server."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from controlprefix.errors import EngineError, RequestError
from controlprefix.model.log_probs import TokenLogProbs

CONNECT_TIMEOUT_S = 10.0
_KEEPALIVE_S = 2.0  # less than servers keep idle connections; uvicorn's default is 5
_BROKEN = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class VllmClient:
    """Talks to one vLLM server, or to a load balancer in front of identical ones.

    Args:
        url: URL of the server, such as `http://localhost:8001`.
        api_key: The server's own API key, if it has one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEPALIVE_S
            ),
        )

    async def model_info(self, name: str | None = None) -> dict[str, Any]:
        """One of `/v1/models`, with its `max_model_len`.

        Args:
            name: Its id, such as that of a LoRA adapter; left out, the first one.

        Raises:
            EngineError: If the server answers with an error, or has no such model.
        """
        response = await self._http.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        if response.status_code != 200:
            raise EngineError(f"vLLM answers {response.status_code}: {_error_message(response)}")
        try:
            models = {str(model["id"]): model for model in response.json()["data"]}
        except (ValueError, TypeError, LookupError) as error:
            raise EngineError(f"{self.url} is not a server of vLLM: {error}") from error
        first: dict[str, Any] = next(iter(models.values()), {})
        info = first if name is None else models.get(name)
        if not info:
            what = "no model" if name is None else f"no model {name!r}"
            served = ", ".join(sorted(models)) or "none"
            raise EngineError(f"vLLM serves {what}; it serves: {served}")
        # A LoRA adapter's is that of its base, which comes first.
        length = info.get("max_model_len") or first.get("max_model_len")
        return {**info, "max_model_len": length}

    async def block_size(self) -> int | None:
        """The block size of the KV cache, from `/metrics`; None unless all engines agree."""
        response = await self._http.get("/metrics", timeout=CONNECT_TIMEOUT_S)
        return parse_block_size(response.text) if response.status_code == 200 else None

    async def check_health(self) -> None:
        """Check `/health`.

        Raises:
            EngineError: If the server is not healthy.
        """
        response = await self._http.get("/health", timeout=CONNECT_TIMEOUT_S)
        if response.status_code != 200:
            raise EngineError(f"vLLM answers {response.status_code} to a health check")

    async def complete(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed `/v1/completions`.

        A connection that breaks before there is an answer, as one that the server closed while it
        was idle, is replaced once.

        Raises:
            RequestError: If the server refuses the request.
            EngineError: If it fails.
        """
        has_answer = False
        try:
            async for chunk in self._chunks(body):
                has_answer = True
                yield chunk
        except _BROKEN:
            if has_answer:
                raise
        else:
            return
        async for chunk in self._chunks(body):
            yield chunk

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                message = _error_message(response)
                if response.status_code == 400:
                    raise RequestError(f"this server's engine (vLLM) refuses it: {message}")
                raise EngineError(f"vLLM answers {response.status_code}: {message}")
            async for line in _lines(response):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EngineError(f"vLLM failed: {chunk['error'].get('message')}")
                yield chunk

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a body. httpx's own also end at U+2028 and others, which texts may have."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")
    if rest:
        yield rest


def parse_log_probs(log_probs: dict[str, Any] | None, top: int | None) -> list[TokenLogProbs]:
    """vLLM's log-probabilities of a chunk, in which tokens are named `token_id:17`."""
    if log_probs is None:
        return []
    tokens = []
    for name, log_prob, others in zip(
        log_probs["tokens"],
        log_probs["token_logprobs"],
        log_probs["top_logprobs"] or [{}] * len(log_probs["tokens"]),
        strict=True,
    ):
        ranked = sorted((others or {}).items(), key=lambda item: -item[1])[:top]
        best = tuple((_token_id(other), float(value)) for other, value in ranked)
        tokens.append(TokenLogProbs(_token_id(name), float(log_prob), best))
    return tokens


def parse_block_size(metrics: str) -> int | None:
    """The block size in Prometheus metrics; None unless all engines agree."""
    sizes = set()
    for line in metrics.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            _, _, rest = line.partition('block_size="')
            sizes.add(rest.partition('"')[0])
    (size,) = sizes if len(sizes) == 1 else ("",)
    return int(size) if size.isdigit() else None


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
