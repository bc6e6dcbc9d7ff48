"""One HTTP exchange with a client: what was already answered, and whether the client is still there."""

from __future__ import annotations

import asyncio

import orjson

from orchestrator.api.asgi import Headers, Receive, Scope, Send, send_problem
from orchestrator.api.problems import Problem

WATCH_AFTER_S = 0.02
"""Most answers are over by then, and need no watcher."""

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange:
    """The client's side of a relayed request.

    `watch` cancels the task that relays when the client hangs up or a time limit passes, and notes why
    in `aborted`; nothing else cancels it with that note set.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, integer_code: bool = False) -> None:
        self.scope = scope
        self.has_begun = False  # we have sent a status line
        self.has_answer = False  # the instance has sent one
        self.is_event_stream = False
        self.aborted: str | None = None
        self._integer_code = integer_code  # as llama.cpp's own paths have it in errors
        self._receive = receive
        self._send = send
        self._task: asyncio.Task[object] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    # --- answering

    async def begin(self, status: int, headers: Headers, *, is_event_stream: bool) -> None:
        """Send the status line; a second begin is ignored (a held stream has long begun)."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.has_begun:
            return
        self.has_begun = True
        self.is_event_stream = is_event_stream
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def chunk(self, data: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def comment(self, text: str) -> None:
        """An SSE comment that keeps a held stream alive."""
        await self.begin(200, SSE_HEADERS, is_event_stream=True)
        await self.chunk(f": {text}\n\n".encode())

    async def problem(self, problem: Problem) -> None:
        """Say what went wrong in the way that is still open: an answer, an event, or a cut connection."""
        if not self.has_begun:
            self.has_begun = True
            await send_problem(self._send, problem, integer_code=self._integer_code)
        elif self.is_event_stream:
            await self.error_event(problem.body(integer_code=self._integer_code))
        # else the body stays unfinished, and the server cuts the connection

    async def error_event(self, body: bytes) -> None:
        await self.chunk(b"data: " + body + b"\n\n", is_last=True)

    async def upstream_error(self, status: int, body: bytes) -> None:
        """An upstream's own error, after the stream had to begin."""
        try:
            orjson.loads(body)
        except orjson.JSONDecodeError:
            text = body.decode("utf-8", "replace")[:500]
            body = Problem(status, text or f"The service answered {status}.", "upstream_error").body()
        await self.error_event(body)

    # --- watching

    def arm(self, deadline_s: float, limit_s: float) -> None:
        """Watch the client from a moment on; abort at the deadline of the first byte, and at the limit."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        start = loop.call_later(WATCH_AFTER_S, self._start_watching, deadline_s, limit_s)
        self._timers.append(start)

    def _start_watching(self, deadline_s: float, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._watcher = loop.create_task(self._watch())
        if not self.has_begun:
            self._deadline = loop.call_at(deadline_s, self._abort, "deadline")
            self._timers.append(self._deadline)
        self._timers.append(loop.call_later(limit_s, self._abort, "limit"))

    async def _watch(self) -> None:
        await self.client_left()
        self._abort("client")

    async def client_left(self) -> None:
        """Return once the client has hung up."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _abort(self, why: str) -> None:
        if self._task is not None and self.aborted is None:
            self.aborted = why
            self._task.cancel()

    def disarm(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._deadline = None
        self._task = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def take_abort(self) -> bool:
        """True if the cancellation being handled is an abort of ours; the task then goes on."""
        task = asyncio.current_task()
        if self.aborted is None or task is None:
            return False
        task.uncancel()
        return True
