"""A stand-in for an engine that costs as little as Python can: fixed answers, raw HTTP/1.1 on uvloop.

GET answers `{}` at once (health). POST answers 1 KB of JSON, or, if the body asks for a stream, 200 SSE
events in 20 writes of 10 with a turn of the event loop between, so that they leave one after the other.
Each write is one HTTP chunk; with `"chunks": "event"` in the body every event is a chunk of its own, which
is what most servers send. HOST and PORT are in the environment. Imports nothing of the product.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import cast

import uvloop

EVENTS = 200
EVENTS_PER_WRITE = 10
ANSWER_BYTES = 1024
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSING = b"0\r\n\r\n"


def json_answer() -> bytes:
    start = b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"content":"'
    end = b'"},"finish_reason":"stop"}]}'
    body = start + b"x" * (ANSWER_BYTES - len(start) - len(end)) + end
    return with_head(b"application/json", body)


def with_head(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


def stream_writes(*, chunk_per_event: bool) -> list[bytes]:
    """What is written for one streamed answer, turn by turn."""
    delta = b'{"choices":[{"index":0,"delta":{"content":" word"}}]}'
    event = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk",' + delta[1:] + b"\n\n"
    batch = [event] * EVENTS_PER_WRITE
    one = b"".join(map(chunk, batch)) if chunk_per_event else chunk(b"".join(batch))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    writes = [one] * (EVENTS // EVENTS_PER_WRITE)
    return [head + writes[0], *writes[1:-1], writes[-1] + CLOSING]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


JSON = json_answer()
HEALTHY = with_head(b"application/json", b"{}")
STREAM = stream_writes(chunk_per_event=False)
STREAM_BY_EVENT = stream_writes(chunk_per_event=True)


class Stub(asyncio.Protocol):
    """One connection, kept alive; requests come one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        found = LENGTH.search(self._buffer, 0, head_end)
        size = head_end + 4 + (int(found[1]) if found else 0)
        if len(self._buffer) < size:
            return
        request, self._buffer = self._buffer[:size], self._buffer[size:]
        self._answer(request)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self._transport.write(HEALTHY)
        elif b'"stream":true' not in request:
            self._transport.write(JSON)
        else:
            self._write_on(STREAM_BY_EVENT if b'"chunks":"event"' in request else STREAM, 0)

    def _write_on(self, writes: Sequence[bytes], index: int) -> None:
        self._transport.write(writes[index])
        if index + 1 < len(writes):
            self._loop.call_soon(self._write_on, writes, index + 1)


async def serve(host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(loop), host, port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(os.environ["HOST"], int(os.environ["PORT"])))
