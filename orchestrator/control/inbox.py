"""Where every event arrives. One reader: the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from orchestrator.core.events import Event, Sampled


class Inbox:
    """Events in order of arrival. Only `post_from_thread` may be called off the event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: list[Event] = []
        self._filled = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._events)

    def post(self, event: Event) -> None:
        if isinstance(event, Sampled) and self._events and isinstance(self._events[-1], Sampled):
            self._events[-1] = event  # only the newest of a row of samples matters
        else:
            self._events.append(event)
        self._filled.set()

    def post_first(self, events: Iterable[Event]) -> None:
        """What happened before anything that has been posted yet."""
        self._events[:0] = events
        self._filled.set()

    def post_from_thread(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self.post, event)

    async def drain(self, until_s: float | None) -> list[Event]:
        """All events there are; waits for one, but not beyond `until_s` (monotonic)."""
        if not self._events:
            timeout_s = None if until_s is None else max(0.0, until_s - self._clock())
            try:
                async with asyncio.timeout(timeout_s):
                    await self._filled.wait()
            except TimeoutError:
                pass
        self._filled.clear()
        drained, self._events = self._events, []
        return drained
