"""What changed, for whoever watches: a bounded memory of messages with ids, and live subscribers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

KEPT = 1000
SUBSCRIBER_LIMIT = 2000


@dataclass(frozen=True, slots=True)
class Message:
    """`topic` is `model`, `status`, `operation` or `log`; `data` is ready for JSON."""

    id: int
    topic: str
    data: dict[str, object]


class Feed:
    """Fan-out on the event loop. A subscriber that falls too far behind is cut off and may resume."""

    def __init__(self, first_id: int) -> None:
        """Ids go on from `first_id`, which is higher than any of an earlier life of the server."""
        self._first_id = first_id
        self._kept: deque[Message] = deque(maxlen=KEPT)
        self._subscribers: set[asyncio.Queue[Message | None]] = set()
        self._last_id = first_id

    @property
    def last_id(self) -> int:
        return self._last_id

    @property
    def is_watched(self) -> bool:
        return bool(self._subscribers)

    def publish(self, topic: str, data: dict[str, object]) -> None:
        self._last_id += 1
        message = Message(self._last_id, topic, data)
        self._kept.append(message)
        for queue in tuple(self._subscribers):
            if queue.qsize() >= SUBSCRIBER_LIMIT:
                self._subscribers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(message)

    def since(self, last_id: int) -> tuple[Message, ...] | None:
        """Messages after `last_id`, or None if some of them are no longer kept."""
        if not self._first_id <= last_id <= self._last_id or (self._kept and last_id < self._kept[0].id - 1):
            return None
        return tuple(message for message in self._kept if message.id > last_id)

    def close(self) -> None:
        """End every subscription."""
        for queue in self._subscribers:
            queue.put_nowait(None)
        self._subscribers.clear()

    def subscribe(self) -> Subscription:
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._subscribers.add(queue)
        return Subscription(self, queue)

    def unsubscribe(self, queue: asyncio.Queue[Message | None]) -> None:
        self._subscribers.discard(queue)


class Subscription:
    """Messages from the moment of subscribing on; use as a context manager."""

    def __init__(self, feed: Feed, queue: asyncio.Queue[Message | None]) -> None:
        self._feed = feed
        self._queue = queue

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.unsubscribe(self._queue)

    async def messages(self, *, tick_s: float) -> AsyncIterator[Message | None]:
        """Each message as it comes; None after every `tick_s` of silence, so that callers can ping."""
        while True:
            try:
                async with asyncio.timeout(tick_s):
                    message = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if message is None:
                return
            yield message
