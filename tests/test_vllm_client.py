"""The client of vLLM, against servers that break connections."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from controlprefix import EngineError
from controlprefix.vllm.client import VllmClient

# Line ends in a text are no line ends of the stream.
CHUNKS = [{"choices": [{"text": text}]} for text in ("a\u2028b\x85", "b")]


def answers(num_broken: int, num_chunks: int = 2) -> list[Any]:
    """What a server answers that first breaks some connections, each after some chunks."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        is_broken = connections <= num_broken
        lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in CHUNKS]
        if not is_broken or num_chunks < len(CHUNKS):
            head = (
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n"
            )
            body = "".join(lines[:num_chunks] if is_broken else [*lines, "data: [DONE]"])
            length = 999 if is_broken else len(body.encode())
            writer.write(head.replace("999", str(length)).encode() + body.encode())
            await writer.drain()
        writer.close()

    async def run() -> list[Any]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = VllmClient(f"http://127.0.0.1:{port}")
        try:
            return [chunk async for chunk in client.complete({"prompt": "x"})]
        finally:
            await client.close()
            server.close()

    return asyncio.run(run())


def test_a_connection_that_breaks_before_an_answer_is_replaced_once() -> None:
    assert answers(0) == answers(1) == CHUNKS
    with pytest.raises(httpx.TransportError):
        answers(2)


def test_an_answer_that_breaks_is_not_asked_for_again() -> None:
    with pytest.raises(httpx.TransportError):
        answers(1, num_chunks=1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "is not a server of vLLM"),
        ('{"models": []}', "is not a server of vLLM"),
        ('{"data": []}', "vLLM serves no model; it serves: none"),
        ('{"data": [{"id": "a"}]}', "vLLM serves no model 'b'; it serves: a"),
    ],
)
def test_what_is_no_vllm_is_told(body: str, message: str) -> None:
    client = VllmClient("http://test")
    client._http = httpx.AsyncClient(
        base_url="http://test",
        transport=httpx.MockTransport(lambda _: httpx.Response(200, text=body)),
    )
    with pytest.raises(EngineError, match=message):
        asyncio.run(client.model_info("b" if "id" in body else None))
