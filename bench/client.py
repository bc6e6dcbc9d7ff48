"""The load generator: N kept-alive connections, each asking again as soon as it is answered.

    python -m bench.client HOST PORT CONNECTIONS SECONDS json|stream|stream-by-event [KEY]

Prints one line of JSON: how many were answered, in how many seconds, and each answer's latency in
microseconds. Raw bytes on uvloop, so that it costs less than what it measures.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from array import array
from typing import cast

import uvloop

REQUEST_BYTES = 1024
MODEL = "fast"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSING = b"0\r\n\r\n"
OK = b"HTTP/1.1 200"

EXTRA = {"json": "", "stream": '"stream":true,', "stream-by-event": '"stream":true,"chunks":"event",'}


def request(kind: str, host: str, port: int, key: str = "") -> bytes:
    """A chat request whose body is 1 KB, with an API key if there is one."""
    start = f'{{"model":"{MODEL}",{EXTRA[kind]}"messages":[{{"role":"user","content":"'
    end = '"}]}'
    body = start + "x" * (REQUEST_BYTES - len(start) - len(end)) + end
    shown = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\naccept: */*\r\n{shown}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


class Run:
    """What all connections share: when to end, and what was seen."""

    def __init__(self, data: bytes, seconds: float) -> None:
        self.data = data
        self.until_s = time.perf_counter() + seconds
        self.latencies_us = array("d")
        self.open = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, why: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(why))


class Connection(asyncio.Protocol):
    def __init__(self, run: Run) -> None:
        self._run = run
        self._size: int | None = None  # of the whole answer; None until its head is here, -1 if chunked
        self._received = 0
        self._tail = b""
        self._is_ending = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it
        self._run.open += 1
        self._ask()

    def _ask(self) -> None:
        self._size, self._received, self._tail = None, 0, b""
        self._begun_s = time.perf_counter()
        self._transport.write(self._run.data)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._size is None:
            data = self._tail + data
            self._size = self._whole_size(data)
        if self._size is None:
            self._tail = data
        elif self._size >= 0:
            if self._received >= self._size:
                self._answered()
        else:
            end = data if len(data) >= len(CLOSING) else (self._tail + data)[-len(CLOSING) :]
            self._tail = end[-len(CLOSING) :]
            if end.endswith(CLOSING):
                self._answered()

    def _whole_size(self, data: bytes) -> int | None:
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            return None
        if not data.startswith(OK):
            self._run.fail(f"not answered with 200: {data[:400]!r}")
        found = LENGTH.search(data, 0, head_end)
        return head_end + 4 + int(found[1]) if found else -1

    def _answered(self) -> None:
        now_s = time.perf_counter()
        self._run.latencies_us.append((now_s - self._begun_s) * 1e6)
        if now_s < self._run.until_s:
            self._ask()
        else:
            self._is_ending = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_ending:
            self._run.fail(f"the connection was cut: {exc}")
        self._run.open -= 1
        if not self._run.open and not self._run.over.done():
            self._run.over.set_result(None)


async def generate(host: str, port: int, connections: int, seconds: float, kind: str, key: str = "") -> None:
    loop = asyncio.get_running_loop()
    begun_s = time.perf_counter()
    run = Run(request(kind, host, port, key), seconds)
    connecting = (loop.create_connection(lambda: Connection(run), host, port) for _ in range(connections))
    await asyncio.gather(*connecting)
    await run.over
    took_s = time.perf_counter() - begun_s
    rounded = [round(latency, 1) for latency in run.latencies_us]
    print(json.dumps({"answers": len(rounded), "seconds": took_s, "latencies_us": rounded}))


def main() -> None:
    host, port, connections, seconds, kind, *key = sys.argv[1:]
    uvloop.run(generate(host, int(port), int(connections), float(seconds), kind, *key))


if __name__ == "__main__":
    main()
