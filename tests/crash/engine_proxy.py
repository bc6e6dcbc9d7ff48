"""A Unix socket in front of a Docker engine's own, which can do to its callers what bad engines do.

with EngineProxy(folder / "engine.sock") as proxy:
    env = {"DOCKER_HOST": proxy.url}
    late = proxy.hold_requests(CREATE, times=1)   # the engine is not told yet
    late.wait_hit()
    server.kill()                                 # whoever asked is dead
    late.end()                                    # and now the engine does it all the same

A fault counts for requests that match its pattern, which is searched in `METHOD /path?query` without the
API's version. The first fault that matches wins; without one, requests and answers pass as they are. Every
request is a connection of its own to the engine, and is passed on to its end even if the caller has gone.
What takes over the connection (attach, exec) is not understood.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import eventually

ENGINE_SOCKET = Path("/var/run/docker.sock")
ANY = ""
CREATE = r"^POST /containers/create"
START = r"^POST /containers/[^/]+/start"
STOP = r"^POST /containers/[^/]+/(stop|kill)"
INSPECT = r"^GET /containers/[^/]+/json"
LIST = r"^GET /containers/json"
REMOVE = r"^DELETE /containers/"
EVENTS = r"^GET /events"
HIT_S = 30.0
CHUNK = 65536
HELD_LOOK_S = 0.005
VERSION = re.compile(r"^/v[0-9.]+(?=/)")


class Kind(Enum):
    HOLD_REQUEST = auto()
    HOLD_ANSWER = auto()
    DELAY = auto()
    REFUSE = auto()
    CUT_REQUEST = auto()
    CUT_ANSWER = auto()
    MUTE = auto()


@dataclass(eq=False)
class Fault:
    """What happens to matching requests until `end`, or to the first `times` of them."""

    pattern: str
    kind: Kind
    times: int | None = None
    seconds: float = 0.0
    status: int = 500
    message: str = ""
    hits: list[str] = field(default_factory=list)  # the requests that it met, as `METHOD /path?query`
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Let go of what is held; from now on requests pass."""
        self.ended.set()

    def wait_hit(self, count: int = 1, timeout_s: float = HIT_S) -> None:
        """Wait until so many requests have met it. Raises AssertionError."""
        eventually(lambda: len(self.hits) >= count, timeout_s, every_s=0.002)

    def takes(self, line: str) -> bool:
        """Whether this request meets it, and then it counts."""
        if not self.applies_to(line) or (self.times is not None and len(self.hits) >= self.times):
            return False
        self.hits.append(line)
        return True

    def applies_to(self, line: str) -> bool:
        return not self.ended.is_set() and re.search(self.pattern, line) is not None


@dataclass
class Message:
    """A request's head and body as the caller sent them, and its first line in short."""

    raw: bytes
    line: str


class EngineProxy:
    """Listens on `socket` in a thread of its own, as a context manager. Controls are thread-safe."""

    def __init__(self, socket: Path, engine: Path = ENGINE_SOCKET) -> None:
        self.socket = socket
        self.engine = engine
        self.requests: list[str] = []  # every one that came in, as `METHOD /path?query`
        self.done: list[str] = []  # every one that the engine has begun to answer
        self._faults: list[Fault] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._callers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """As DOCKER_HOST has it."""
        return f"unix://{self.socket}"

    def __enter__(self) -> EngineProxy:
        self._thread.start()
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        self.leave()
        self._call(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- the engine as a whole

    def listen(self) -> None:
        """The socket is there, as at the beginning."""
        self._call(self._listen())

    def leave(self) -> None:
        """The engine is gone: no socket, and all connections are cut. What it was told, it still does."""
        self._call(self._leave())
        self.cut()

    def cut(self) -> None:
        """Cut the connections there are; new ones are accepted."""
        self._call(self._cut())

    # --- faults

    def hold_requests(self, pattern: str = ANY, times: int | None = None) -> Fault:
        """Accept, and tell the engine only when this has ended: a hung engine, or one that acts late."""
        return self._add(Fault(pattern, Kind.HOLD_REQUEST, times))

    def hold_answers(self, pattern: str = ANY, times: int | None = None) -> Fault:
        """The engine acts at once, and the caller hears of it only when this has ended."""
        return self._add(Fault(pattern, Kind.HOLD_ANSWER, times))

    def delay(self, seconds: float, pattern: str = ANY, times: int | None = None) -> Fault:
        """Each request reaches the engine this much later."""
        return self._add(Fault(pattern, Kind.DELAY, times, seconds=seconds))

    def refuse(self, pattern: str, status: int, message: str, times: int | None = None) -> Fault:
        """Answer with this error instead of asking the engine."""
        return self._add(Fault(pattern, Kind.REFUSE, times, status=status, message=message))

    def cut_requests(self, pattern: str = ANY, times: int | None = None) -> Fault:
        """Cut the connection before the engine hears of the request."""
        return self._add(Fault(pattern, Kind.CUT_REQUEST, times))

    def cut_answers(self, pattern: str = ANY, times: int | None = None) -> Fault:
        """The engine acts, and the connection is cut instead of an answer."""
        return self._add(Fault(pattern, Kind.CUT_ANSWER, times))

    def mute(self, pattern: str = EVENTS) -> Fault:
        """Streams, those that are open too, go on without another byte: lost without an error."""
        return self._add(Fault(pattern, Kind.MUTE))

    def clear(self) -> None:
        """End all faults."""
        for fault in self._faults:
            fault.end()
        self._faults = []

    def wait_request(self, pattern: str, after: int = 0, timeout_s: float = HIT_S) -> None:
        """Wait for a matching request to come in, beyond the first `after` of all `requests`."""
        eventually(
            lambda: any(re.search(pattern, line) for line in self.requests[after:]), timeout_s, every_s=0.002
        )

    def wait_done(self, pattern: str, after: int = 0, timeout_s: float = HIT_S) -> None:
        """Wait until the engine has begun to answer one, beyond the first `after` that are `done`."""
        eventually(
            lambda: any(re.search(pattern, line) for line in self.done[after:]), timeout_s, every_s=0.002
        )

    def _add(self, fault: Fault) -> Fault:
        self._faults = [*self._faults, fault]
        return fault

    # --- in the thread

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(HIT_S)

    async def _listen(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self.socket, backlog=256)

    async def _leave(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.socket.unlink(missing_ok=True)

    async def _cut(self) -> None:
        for writer in list(self._callers):
            writer.transport.abort()

    async def _cancel_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._callers.add(writer)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                message = await read_message(reader)
                self.requests.append(message.line)
                fault = next((fault for fault in self._faults if fault.takes(message.line)), None)
                await self._pass(message, writer, fault)
        finally:
            self._callers.discard(writer)
            writer.close()

    async def _pass(self, message: Message, writer: asyncio.StreamWriter, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if fault is not None and kind is Kind.REFUSE:
            await send(writer, refusal(fault))
            return
        if fault is not None and kind is Kind.HOLD_REQUEST:
            await until_ended(fault)
        if fault is not None and kind is Kind.DELAY:
            await asyncio.sleep(fault.seconds)
        if kind is Kind.CUT_REQUEST:
            return
        answers, engine = await asyncio.open_unix_connection(str(self.engine), limit=CHUNK)
        try:
            engine.write(message.raw)
            await engine.drain()
            await self._relay(message, answers, writer, fault)
        finally:
            engine.close()

    async def _relay(
        self,
        message: Message,
        answers: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fault: Fault | None,
    ) -> None:
        """The engine's answer to its end. A stream whose caller has left ends with the next chunk."""
        is_first = True
        while chunk := await answers.read(CHUNK):
            if is_first:
                self.done.append(message.line)
                if fault is not None and fault.kind is Kind.CUT_ANSWER:
                    return
                if fault is not None and fault.kind is Kind.HOLD_ANSWER:
                    await until_ended(fault)
            if is_first or not self._is_muted(message.line):
                await send(writer, chunk)
            is_first = False

    def _is_muted(self, line: str) -> bool:
        return any(fault.kind is Kind.MUTE and fault.applies_to(line) for fault in self._faults)


async def read_message(reader: asyncio.StreamReader) -> Message:
    """One request, with `Connection: close`, so that the engine's answer ends with the connection.

    Raises IncompleteReadError when the caller has no (whole) request.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
    method, target, version = first.split(" ", 2)
    values = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
    kept = [line for line in fields if line.partition(":")[0].lower() != "connection"]
    raw = "\r\n".join([f"{method} {target} {version}", *kept, "Connection: close", "", ""]).encode("latin-1")
    if values.get("transfer-encoding", "").lower() == "chunked":
        raw += await read_chunked(reader)
    else:
        raw += await reader.readexactly(int(values.get("content-length", "0")))
    return Message(raw, f"{method} {VERSION.sub('', target)}")


async def read_chunked(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it stands, its framing included."""
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if size == 0:
            return body


async def until_ended(fault: Fault) -> None:
    while not fault.ended.is_set():  # noqa: ASYNC110 - it is set in another thread
        await asyncio.sleep(HELD_LOOK_S)


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def refusal(fault: Fault) -> bytes:
    content = json.dumps({"message": fault.message}).encode()
    lines = [f"HTTP/1.1 {fault.status} Fault", "Content-Type: application/json", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content
