"""What is written within one turn of the event loop leaves together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.one_write import OneWrite
from orchestrator.serve import new_event_loop


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[OneWrite, socket.socket]]:
    """A connection as the server writes to it, and the client's end."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    yield OneWrite(transport, loop), theirs
    transport.abort()
    theirs.close()


async def read(theirs: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(theirs, 100)


def test_what_one_turn_writes_arrives_in_order() -> None:
    async def said() -> bytes:
        async with connected() as (writer, theirs):
            writer.write(b"head, ")
            writer.writelines([b"body, ", b"more, "])
            writer.write(b"end")
            writer.close()
            return await read(theirs)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(said()) == b"head, body, more, end"


def test_what_comes_after_the_client_has_hung_up_is_dropped() -> None:
    errors: list[dict[str, Any]] = []

    async def said() -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with connected() as (writer, theirs):
            writer.abort()
            rest = await read(theirs)  # closed on both sides now
            writer.write(b"too late")
            await asyncio.sleep(0)
            return rest

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(said()) == b""
    assert errors == []
