"""Streams of the engine, each read by a thread of its own, as a read blocks until there is something."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, ParamSpec, Protocol, TypeVar

import structlog
from docker.errors import DockerException

from orchestrator.core.errors import EngineError, EngineUnavailable

log = structlog.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)

_BUFFERED_CHUNKS = 64
_RETRY_FIRST_S = 0.1
_RETRY_LAST_S = 5.0
_LOOK_BACK_S = 2.0


class Stream(Protocol[T_co]):
    """What the library returns: an iterator that another thread may close."""

    def __iter__(self) -> Iterator[T_co]: ...

    def close(self) -> None: ...


def in_new_thread(name: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
    """For work that may hang for long: it takes no place in a pool, and nobody waits for it at exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()

    def tell(result: R | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def work() -> None:
        try:
            outcome: tuple[R | None, BaseException | None] = (call(*args, **kwargs), None)
        except Exception as error:
            outcome = (None, error)
        with suppress(RuntimeError):  # the loop is closed: nobody wants to know
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


class EventWatcher:
    """Reads the engine's events until closed, and connects again whenever the stream ends.

    All callbacks are called in the watcher's thread. A stream that ends says nothing about why, so each
    new one begins where the last event was, and `on_connected` is to compare; `on_lost` too, which is
    called each time that there is no new one.
    """

    def __init__(
        self,
        subscribe: Callable[[str], Stream[Mapping[str, Any]]],
        on_event: Callable[[Mapping[str, Any]], None],
        on_connected: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._subscribe = subscribe
        self._on_event = on_event
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._since = f"{time.time() - _LOOK_BACK_S:.9f}"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream[Mapping[str, Any]] | None = None
        self._thread = threading.Thread(target=self._run, name="docker-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Blocks until the thread has ended."""
        self._closed.set()
        with self._lock:
            _close(self._stream)
        self._thread.join(timeout=_RETRY_LAST_S)

    def _run(self) -> None:
        pause_s = _RETRY_FIRST_S
        while not self._closed.is_set():
            try:
                self._read()
                pause_s = _RETRY_FIRST_S
            except (
                Exception
            ) as error:  # whatever ends a stream, even a bug of the library: exits must be seen
                log.warning("lost the Docker engine's events, connecting again", error=str(error))
                pause_s = min(2 * pause_s, _RETRY_LAST_S)
                self._on_lost()
            self._closed.wait(pause_s)

    def _read(self) -> None:
        stream = self._subscribe(self._since)
        with self._lock:
            self._stream = stream
            if self._closed.is_set():
                _close(stream)
        self._on_connected()
        for event in stream:
            seconds, nanoseconds = divmod(int(event["timeNano"]) + 1, 1_000_000_000)
            self._since = f"{seconds}.{nanoseconds:09d}"
            self._on_event(event)


async def read_stream(name: str, open_stream: Callable[[], Stream[bytes]]) -> AsyncIterator[bytes]:
    """The stream's chunks; the thread ends with the stream, or when the caller stops reading.

    A caller who reads slowly slows the stream down. Raises what `open_stream` raises.
    """
    relay = _Relay(open_stream)
    work = in_new_thread(name, relay.run)
    try:
        while (chunk := await relay.chunks.get()) is not None:
            relay.room.release()
            yield chunk
        await work
    finally:
        relay.close()


class _Relay:
    """Hands chunks from a thread to the loop, a bounded number at a time."""

    def __init__(self, open_stream: Callable[[], Stream[bytes]]) -> None:
        self.chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.room = threading.Semaphore(_BUFFERED_CHUNKS)
        self._loop = asyncio.get_running_loop()
        self._open = open_stream
        self._lock = threading.Lock()
        self._stream: Stream[bytes] | None = None
        self._is_closed = False

    def run(self) -> None:
        """Raises EngineError, unless nobody reads any more."""
        try:
            self._read()
        except EngineError:
            if not self._is_closed:
                raise
        except Exception as error:  # the library lets through what its own dependencies raise
            if not self._is_closed:
                raise EngineUnavailable(f"The log broke off: {error}.") from error
        finally:
            self._put(None)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            _close(self._stream)
        self.room.release()

    def _read(self) -> None:
        stream = self._open()
        with self._lock:
            self._stream = stream
            if self._is_closed:
                _close(stream)
        for chunk in stream:
            self.room.acquire()
            if self._is_closed:
                return
            self._put(chunk)

    def _put(self, chunk: bytes | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)


def _close(stream: Stream[Any] | None) -> None:
    """The library reaches for the socket through parts that are gone once the stream has ended."""
    if stream is not None:
        with suppress(AttributeError, OSError, DockerException):
            stream.close()
