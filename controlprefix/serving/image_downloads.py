"""Images that a request names by URL: downloaded from the origins that the server allows."""

import base64
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from controlprefix.cancellation import raise_if_stopped
from controlprefix.errors import RequestError, short_reason
from controlprefix.message import MAX_IMAGES
from controlprefix.serving.chat_message import ChatMessage

if TYPE_CHECKING:
    from controlprefix.serving.server import Server
    from controlprefix.serving.tenants import Client

_MAX_BYTES = 32 << 20  # of all images of a request
_TIMEOUT_S = 10.0  # of all downloads of a request
_CHUNK = 1 << 16


def origin_of(url: str) -> str | None:
    """The origin of a URL, such as `https://images.example.com`; None if it is not of the web.

    Default ports are left out.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        return None
    host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default) else "")


def require_origins(values: Sequence[str]) -> frozenset[str]:
    """Origins as they are compared.

    Raises:
        RequestError: If one is none.
    """
    for value in values:
        if origin_of(value) is None or urlsplit(value).path not in ("", "/"):
            raise RequestError(
                f"{value!r} is no origin of images; give one such as https://images.example.com"
            )
    return frozenset(str(origin_of(value)) for value in values)


def remote_images(
    messages: Sequence[ChatMessage], origins: Collection[str]
) -> list[MutableMapping[str, Any]]:
    """The parts of messages that are images of allowed origins."""
    return [part for part in _parts(messages) if origin_of(_url(part)) in origins]


async def download_images(
    messages: Sequence[ChatMessage], client: "Client", server: "Server"
) -> None:
    """Put the images that messages name by allowed URLs into the messages.

    Raises:
        RequestError: If one cannot be had.
        OverloadedError: If the tenant has too many downloads already.
    """
    parts = remote_images(messages, server.image_origins)
    if parts:
        await server.work_pools.download(client.tenant, partial(download, parts))


def download(parts: Sequence[MutableMapping[str, Any]]) -> None:
    """Replace the URLs of images by their contents. Redirects are not followed.

    Raises:
        RequestError: If one cannot be had, or all are too large or take too long.
    """
    if len(parts) > MAX_IMAGES:
        raise RequestError(f"{len(parts)} images; a request may have {MAX_IMAGES}")
    deadline = time.monotonic() + _TIMEOUT_S
    remaining = _MAX_BYTES
    for part in parts:
        url = _url(part)
        try:
            content = b"".join(_chunks(url, remaining, deadline))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RequestError(
                f"the image {url[:200]} cannot be downloaded: {_reason(error)}"
            ) from None
        remaining -= len(content)
        part["image_url"] = f"data:image/*;base64,{base64.b64encode(content).decode()}"


def _parts(messages: Sequence[ChatMessage]) -> Iterator[MutableMapping[str, Any]]:
    for message in messages:
        if not isinstance(message.content, str):
            yield from (p for p in message.content if p.get("type") in ("image_url", "input_image"))


def _url(part: MutableMapping[str, Any]) -> str:
    value = part.get("image_url")
    return str(value.get("url") if isinstance(value, dict) else value)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: a redirect could lead to any host."""


def _chunks(url: str, limit: int, deadline: float) -> Iterator[bytes]:
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(url, timeout=max(0.1, deadline - time.monotonic())) as response:
        while chunk := response.read1(_CHUNK):
            raise_if_stopped()
            limit -= len(chunk)
            if limit < 0:
                raise ValueError(f"the images of a request may have {_MAX_BYTES:,} bytes in all")
            if time.monotonic() > deadline:
                raise ValueError(f"it took longer than {_TIMEOUT_S:.0f} s")
            yield chunk


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"its server answered {error.code}"
    if isinstance(error, TimeoutError):
        return f"it took longer than {_TIMEOUT_S:.0f} s"
    return short_reason(getattr(error, "reason", None) or error)
