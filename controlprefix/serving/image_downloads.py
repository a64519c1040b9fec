"""Images that a request names by URL: downloaded from the origins that the server allows."""

import asyncio
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from controlprefix._io import requires_extra
from controlprefix.errors import OverloadedError, RequestError, short_reason
from controlprefix.message import MAX_IMAGES
from controlprefix.serving.chat_message import ChatMessage, image_url

if TYPE_CHECKING:
    from controlprefix.serving.server import Server
    from controlprefix.serving.tenants import Client

_TIMEOUT_S = 10.0  # of all downloads of a request, their wait included
_MAX_REQUESTS = 16  # of a tenant, that download or wait at the same time
_CONCURRENT_REQUESTS = 4  # of these, those that download
_DEFAULT_PORTS = {"http": 80, "https": 443}

ImagePart = MutableMapping[str, Any]


class ImageDownloads:
    """Downloads images within bounds.

    Args:
        origins: Origins such as `https://images.example.com`.
        max_bytes: Size of all images of a request.

    Raises:
        RequestError: If one of `origins` is none.
        MissingDependencyError: If there are some, and httpx is not installed.
    """

    def __init__(self, origins: Sequence[str], max_bytes: int) -> None:
        self._origins = require_origins(origins)
        if self._origins:
            with requires_extra("serve", "the download of images"):
                import httpx  # noqa: F401
        self._max_bytes = max_bytes
        self._num_requests: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Semaphore] = {}

    def parts(self, messages: Sequence[ChatMessage]) -> list[ImagePart]:
        """The parts of messages that are images of allowed origins."""
        return [
            part
            for part in _parts(messages)
            if origin_of(image_url(part.get("image_url"))) in self._origins
        ]

    async def fill(self, tenant: str, parts: Sequence[ImagePart]) -> None:
        """Replace the URLs of parts of messages by the images.

        Raises:
            RequestError: If one cannot be had, or all are too large or take too long.
            OverloadedError: If the tenant has too many such requests already.
        """
        if len(parts) > MAX_IMAGES:
            raise RequestError(f"{len(parts)} images; a request may have {MAX_IMAGES}")
        if self._num_requests[tenant] >= _MAX_REQUESTS:
            raise OverloadedError(
                f"{_MAX_REQUESTS} requests of this tenant download images already; try again later"
            )
        self._num_requests[tenant] += 1
        turns = self._turns.setdefault(tenant, asyncio.Semaphore(_CONCURRENT_REQUESTS))
        try:
            async with asyncio.timeout(_TIMEOUT_S), turns:
                await self._fill(parts)
        except TimeoutError:
            raise RequestError(
                f"the images could not be downloaded within {_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            self._num_requests[tenant] -= 1
            if not self._num_requests[tenant]:
                del self._num_requests[tenant], self._turns[tenant]

    async def _fill(self, parts: Sequence[ImagePart]) -> None:
        import httpx

        remaining = self._max_bytes
        async with httpx.AsyncClient(follow_redirects=False, timeout=_TIMEOUT_S) as client:
            for part in parts:
                url = image_url(part.get("image_url"))
                try:
                    content = await self._content(client, url, remaining)
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    raise _failed(url, short_reason(error)) from None
                remaining -= len(content)
                part["image_url"] = content

    async def _content(self, client: Any, url: str, limit: int) -> bytes:
        content = bytearray()
        # Not compressed, so that no small answer is a large image.
        async with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
            if response.status_code != 200:
                raise _failed(url, f"its server answered {response.status_code}")
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit:
                    raise _failed(
                        url, f"the images of a request may have {self._max_bytes:,} bytes in all"
                    )
        return bytes(content)


async def download_images(
    messages: Sequence[ChatMessage], client: "Client", server: "Server"
) -> None:
    """Put the images that messages name by allowed URLs into the messages.

    Raises:
        RequestError: If one cannot be had.
        OverloadedError: If the server, or the tenant's downloads, are at their limit.
    """
    parts = server.image_downloads.parts(messages)
    if parts:
        server.require_capacity(client)
        await server.image_downloads.fill(client.tenant, parts)


def origin_of(url: str) -> str | None:
    """The origin of a URL, such as `https://images.example.com`; None if it is not of the web.

    Default ports are left out.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not host or parts.username is not None:
        return None
    host = f"[{host}]" if ":" in host else host
    default = _DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default) else "")


def require_origins(values: Sequence[str]) -> frozenset[str]:
    """Origins as they are compared.

    Raises:
        RequestError: If one is none.
    """
    for value in values:
        is_origin = origin_of(value) is not None and "*" not in value
        parts = urlsplit(value) if is_origin else None
        if parts is None or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise RequestError(
                f"{value!r} is no origin of images; give one such as https://images.example.com"
            )
    return frozenset(str(origin_of(value)) for value in values)


def _parts(messages: Sequence[ChatMessage]) -> Iterator[ImagePart]:
    for message in messages:
        if not isinstance(message.content, str):
            yield from (p for p in message.content if p.get("type") in ("image_url", "input_image"))


def _failed(url: str, reason: str) -> RequestError:
    return RequestError(f"the image {url[:200]} cannot be downloaded: {reason}")
