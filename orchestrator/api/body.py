"""Request bodies: small ones stay in memory, large ones wait on disk, and a total bounds them all."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO

from orchestrator.api.asgi import Receive
from orchestrator.api.problems import BadRequest
from orchestrator.core.entities import MIB

SPOOL_FROM_BYTES = 256 * 1024


class ClientLeft(Exception):
    """The client hung up; nobody is there to answer."""


class TooManyBodies(BadRequest):
    """The disk space for waiting bodies is used up."""

    def __init__(self) -> None:
        message = "Too many large requests wait at once; try again in a moment."
        super().__init__(message, code="spool_full", status=503)


class Spool:
    """How many bytes of bodies may lie on disk at once, over all requests."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes

    def take(self, size: int) -> None:
        if size > self._left_bytes:
            raise TooManyBodies
        self._left_bytes -= size

    def give_back(self, size: int) -> None:
        self._left_bytes += size


class Body:
    """A whole request body. `data` has all of it if it is small; else it lies in `file`."""

    __slots__ = ("_spool", "data", "file", "size")

    def __init__(self, data: bytes = b"", file: IO[bytes] | None = None, spool: Spool | None = None) -> None:
        self.data = data
        self.file = file
        self.size = len(data)
        self._spool = spool

    def write(self, chunk: bytes) -> None:
        assert self.file is not None and self._spool is not None
        self._spool.take(len(chunk))
        self.size += len(chunk)
        self.file.write(chunk)

    def view(self) -> bytes | mmap.mmap:
        """All bytes, searchable; those on disk are mapped, not read."""
        if self.file is None:
            return self.data
        self.file.flush()
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def payload(self) -> bytes | IO[bytes]:
        """What an HTTP client sends; from the start, each time it is asked for."""
        if self.file is None:
            return self.data
        # a file of its own for each try: the client closes what it has sent
        self.file.flush()
        return Path(f"/proc/self/fd/{self.file.fileno()}").open("rb")

    def close(self) -> None:
        if self.file is not None and self._spool is not None:
            self.file.close()
            self.file = None
            self._spool.give_back(self.size)


async def read_body(receive: Receive, limit_bytes: int, spool: Spool) -> Body:
    """Read the request to its end. Raises BadRequest (413) beyond the limit, ClientLeft, TooManyBodies."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    first = message.get("body", b"")
    if not message.get("more_body") and len(first) <= SPOOL_FROM_BYTES:
        return Body(first)
    return await read_rest(receive, bytearray(first), message.get("more_body", False), limit_bytes, spool)


async def read_rest(
    receive: Receive, start: bytearray, is_more: bool, limit_bytes: int, spool: Spool
) -> Body:
    body: Body | None = None
    try:
        while True:
            if (body.size if body else len(start)) > limit_bytes:
                raise too_large(limit_bytes)
            if body is None and len(start) > SPOOL_FROM_BYTES:
                body = Body(file=tempfile.TemporaryFile(), spool=spool)  # noqa: SIM115
                body.write(bytes(start))
            if not is_more:
                return body or Body(bytes(start))
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            is_more = message.get("more_body", False)
            if body is None:
                start += chunk
            else:
                body.write(chunk)
    except BaseException:
        if body is not None:
            body.close()
        raise


def too_large(limit_bytes: int) -> BadRequest:
    message = (
        f"The request body is larger than {limit_bytes // MIB} MiB (body_limit_mib in orchestrator.yaml)."
    )
    return BadRequest(message, code="body_too_large", status=413)


def too_slow(limit_s: float) -> BadRequest:
    """A client that died in the middle of its body would hold it, and its share of the disk, for ever."""
    message = f"The request body did not arrive within {limit_s:.0f} s (request_limit in orchestrator.yaml)."
    return BadRequest(message, code="body_too_slow", status=408)
