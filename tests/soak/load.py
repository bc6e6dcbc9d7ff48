"""Clients of every kind on one server, and what became of each request; used by the soak and crash tests.

async with Crowd(server, models, seed=1).running(clients=8) as crowd:
    ...
    await crowd.quiet()     # no new requests, and the old ones have ended
    crowd.resume()
    assert crowd.tally.lost == []
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.world import Stream, until, whole_text
from tests.server import RunningServer

QUIET_S = 60.0
PAUSE_S = 0.08
DOWN_PAUSE_S = 0.25
LEAVES_WITHIN_S = 0.4
LOOKS_S = 0.5
REFUSALS = frozenset({"model_unloaded", "queue_full"})
"""What this load brings upon itself: somebody unloads what somebody else waits for."""


@dataclass
class Tally:
    """What became of the requests. `lost` are sentences about those that had neither answer nor reason."""

    sent: int = 0
    answered: int = 0
    left: int = 0  # by a client that hung up
    cut: int = 0  # by a server that was killed
    loads: int = 0
    unloads: int = 0
    looks: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # 503 by code
    lost: list[str] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        """Requests that none of these counts has; 0 once all have ended."""
        lost = sum(1 for line in self.lost if not line.startswith("GET "))  # looks are counted apart
        return self.sent - self.answered - self.left - self.cut - self.refused.total() - lost


class Crowd:
    """Clients that ask `models` for chats and streams, leave early, load, unload, and look."""

    def __init__(
        self,
        server: RunningServer,
        models: Sequence[str],
        seed: int,
        refusals: frozenset[str] = REFUSALS,
    ) -> None:
        self.tally = Tally()
        self._server = server
        self._models = tuple(models)
        self._refusals = refusals
        self._rng = random.Random(seed)
        self._goes_on = asyncio.Event()
        self._busy = 0
        self._acts: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._kills = 0
        self._is_down = False
        self.http: httpx.AsyncClient

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[Crowd]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        url = self._server.url
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as self.http:
            self._tasks = [asyncio.create_task(self._client(self._rng.random())) for _ in range(clients)]
            self.resume()
            try:
                yield self
            finally:
                for task in self._tasks:
                    task.cancel()
                ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        broken = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
        assert broken == [], f"a client of the test itself failed: {broken!r}"

    def broken(self) -> list[BaseException | None]:
        """Mistakes of the test's own, by which clients ended."""
        return [task.exception() for task in self._tasks if task.done()]

    def resume(self) -> None:
        self._goes_on.set()

    async def quiet(self, timeout_s: float = QUIET_S, patience_s: float | None = None) -> None:
        """Send nothing more, and wait until every request has its end; after `patience_s` clients leave."""
        self._goes_on.clear()
        if patience_s is not None:
            with suppress(AssertionError):
                await until(lambda: self._busy == 0, patience_s)
            await asyncio.sleep(
                0
            )  # what was asked for in this very moment has begun then, and counts as sent
            for act in self._acts:
                act.cancel()
        await until(lambda: self._busy == 0, timeout_s, "every request should end")

    def going_down(self) -> None:
        """The server is killed now: until `came_up`, connections may be cut and refused."""
        self._kills += 1
        self._is_down = True

    def came_up(self) -> None:
        self._is_down = False

    # --- what clients do

    async def _client(self, seed: float) -> None:
        rng = random.Random(seed)
        actions = (self._chat, self._stream, self._load, self._unload, self._leave, self._look)
        while True:
            while not self._goes_on.is_set():  # it may be cleared again before a waiter has its turn
                await self._goes_on.wait()
            self._busy += 1
            try:
                (act,) = rng.choices(actions, weights=(8, 5, 1, 1, 2, 1))
                if act in actions[:4]:
                    await self._until_left(act(self._pick(rng), rng))
                else:
                    await act(self._pick(rng), rng)
            finally:
                self._busy -= 1
            await asyncio.sleep(DOWN_PAUSE_S if self._is_down else rng.uniform(0, PAUSE_S))

    def _pick(self, rng: random.Random) -> str:
        """The first models are asked for more often than the last."""
        return rng.choices(self._models, weights=range(len(self._models), 0, -1))[0]

    async def _chat(self, model: str, rng: random.Random) -> None:
        tokens = rng.randint(1, 20)
        answer = await self._post("/v1/chat/completions", chat_body(model, tokens, rng))
        if answer is not None and self._is_success("chat", model, answer):
            text = answer.json()["choices"][0]["message"]["content"]
            if text != whole_text(model, tokens):
                self.tally.lost.append(f"chat with '{model}': answered {text!r}")

    async def _stream(self, model: str, rng: random.Random) -> None:
        tokens = rng.randint(1, 40)
        stream, kills, was_down = Stream(model), self._kills, self._is_down
        self.tally.sent += 1
        await stream.read(self.http, chat_body(model, tokens, rng) | {"stream": True})
        if stream.is_complete and stream.text == whole_text(model, tokens):
            self.tally.answered += 1
        elif error := stream.refusal or next(iter(stream.errors), {}):
            self._refused("stream", model, stream.status, error)
        elif stream.was_cut:
            self._broke_off(f"stream of '{model}' cut after {stream.text!r}", kills, was_down)
        else:
            self.tally.lost.append(f"stream of '{model}' ended without a word after {stream.text!r}")

    async def _leave(self, model: str, rng: random.Random) -> None:
        """Hang up after a moment, in whatever phase that is."""
        leaves_s = rng.uniform(0, LEAVES_WITHIN_S)
        await self._until_left(rng.choice((self._chat, self._stream))(model, rng), leaves_s)

    async def _until_left(self, request: Coroutine[Any, Any, None], leaves_s: float | None = None) -> None:
        """Its client hangs up after `leaves_s`, or when it is told to."""
        act = asyncio.create_task(request)
        self._acts.add(act)
        try:
            await asyncio.wait({act}, timeout=leaves_s)
            act.cancel()
            await asyncio.gather(act, return_exceptions=True)
        finally:
            act.cancel()
            self._acts.discard(act)
        if act.cancelled():
            self.tally.left += 1
        else:
            act.result()  # a mistake of the test's own must be seen

    async def _load(self, model: str, rng: random.Random) -> None:
        wants = {"model": model, "wait": rng.random() < 0.5}
        answer = await self._post("/models/load", wants)
        if answer is not None and self._is_success("load", model, answer):
            self.tally.loads += 1

    async def _unload(self, model: str, rng: random.Random) -> None:
        wants = {"model": model, "wait": rng.random() < 0.5}
        answer = await self._post("/models/unload", wants)
        if answer is not None and self._is_success("unload", model, answer):
            self.tally.unloads += 1

    async def _look(self, model: str, rng: random.Random) -> None:
        paths = ("/state", "/v1/models", "/models", "/events", "/models/sse", f"/logs/{model}?follow=true")
        path = rng.choice(paths)
        kills, was_down = self._kills, self._is_down
        status = 0
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOKS_S), self.http.stream("GET", path) as answer:
                    status = answer.status_code
                    async for _ in answer.aiter_bytes():
                        pass
        except httpx.TransportError as error:
            if not self._was_killed(kills, was_down):
                self.tally.lost.append(f"GET {path}: {error!r}")
        if status not in (0, 200) and not (path.startswith("/logs") and status in (404, 503)):
            self.tally.lost.append(f"GET {path}: {status}")
        self.tally.looks += 1

    # --- what became of it

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response | None:
        """None where the server was killed meanwhile, or the request is lost and noted as such."""
        kills, was_down = self._kills, self._is_down
        self.tally.sent += 1
        try:
            return await self.http.post(path, json=body)
        except httpx.TransportError as error:
            self._broke_off(f"POST {path} {body['model']}: {error!r}", kills, was_down)
            return None

    def _is_success(self, what: str, model: str, answer: httpx.Response) -> bool:
        if answer.status_code == 200:
            self.tally.answered += 1
            return True
        self._refused(what, model, answer.status_code, answer.json()["error"])
        return False

    def _refused(self, what: str, model: str, status: int, error: dict[str, Any]) -> None:
        code = str(error.get("code"))
        if status in (200, 502, 503) and code in self._refusals and error.get("message"):
            self.tally.refused[code] += 1
        else:
            self.tally.lost.append(f"{what} of '{model}': {status} {error}")

    def _broke_off(self, what: str, kills_before: int, was_down: bool) -> None:
        if self._was_killed(kills_before, was_down):
            self.tally.cut += 1
        else:
            self.tally.lost.append(what)

    def _was_killed(self, kills_before: int, was_down: bool) -> bool:
        """Whether the server was killed, or was down, since a request began."""
        return was_down or self._is_down or self._kills != kills_before


def chat_body(model: str, tokens: int, rng: random.Random) -> dict[str, Any]:
    wishes = {"tokens": tokens, "tokens_per_s": rng.choice((0, 50, 200))}
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "mimic": wishes}
