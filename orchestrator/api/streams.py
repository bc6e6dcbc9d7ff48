"""Server-sent events: our own feed (`/events`) and llama.cpp's (`/models/sse`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import orjson
from fastapi.responses import StreamingResponse

from orchestrator.control.feed import Feed, Message

PING_EVERY_S = 10.0
PING = b": still here\n\n"
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: Mapping[str, object], *, name: str | None = None, key: int | None = None) -> bytes:
    """One event as bytes; `key` is its id, to resume after."""
    lines = [f"id: {key}"] if key is not None else []
    if name is not None:
        lines.append(f"event: {name}")
    lines.append(f"data: {orjson.dumps(data).decode()}")
    return ("\n".join(lines) + "\n\n").encode()


def event_stream(chunks: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(chunks, media_type="text/event-stream", headers=SSE_HEADERS)


async def changes(
    feed: Feed, snapshot: Callable[[], dict[str, object]], last_id: int | None
) -> AsyncIterator[bytes]:
    """A snapshot first, then changes with ids; after `last_id` only what was missed, if still kept."""
    with feed.subscribe() as subscription:
        missed = feed.since(last_id) if last_id is not None else None
        if missed is None:
            yield event(snapshot(), name="snapshot", key=feed.last_id)
        else:
            for message in missed:
                if message.topic != "status":
                    yield as_change(message)
        async for new in subscription.messages(tick_s=PING_EVERY_S):
            if new is None:
                yield PING
            elif new.topic != "status":
                yield as_change(new)


def as_change(message: Message) -> bytes:
    return event(message.data, name=message.topic, key=message.id)


async def statuses(feed: Feed) -> AsyncIterator[bytes]:
    """llama.cpp router events: {"model", "event": "model_status", "data": {"status", …}}."""
    with feed.subscribe() as subscription:
        yield PING  # headers and a first byte at once, so that clients know they are connected
        async for message in subscription.messages(tick_s=PING_EVERY_S):
            if message is None:
                yield PING
            elif message.topic == "status":
                yield event(message.data)


async def begin(chunks: AsyncIterator[bytes], wait_s: float | None) -> AsyncIterator[bytes]:
    """The same chunks, once there is a first one, or after `wait_s` (None: however long that takes).

    Raises what the first one raises, so that it can still be an answer of its own.
    """
    first = asyncio.ensure_future(anext(chunks, b""))
    try:
        await asyncio.wait({first}, timeout=wait_s)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return first_and(first, chunks)


async def first_and(first: asyncio.Future[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield await first
        async for chunk in rest:
            yield chunk
    finally:
        close = getattr(rest, "aclose", None)
        if not first.done():
            first.cancel()
        elif close is not None:
            await close()
