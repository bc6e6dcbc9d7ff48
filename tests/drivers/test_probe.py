"""Health probes against a real listener."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from orchestrator.core.entities import NOBODY_LISTENS
from orchestrator.drivers.probe import HttpProbe
from tests.support import free_port

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def saying(text: str) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /health?x=1 "):
            writer.write(text.replace("\n", "\r\n").encode())
            await writer.drain()

    return answer


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An answer without end, never silent for long."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.01)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@asynccontextmanager
async def listening(answer: Answer, host: str = "127.0.0.1") -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            await answer(reader, writer)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def probe() -> AsyncIterator[HttpProbe]:
    probe = HttpProbe(timeout_s=0.2)
    yield probe
    await probe.close()


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        ("200 OK", None),
        ("204 No Content", None),
        ("302 Found", "HTTP 302"),
        ("404 No", "HTTP 404"),
        ("503 Wait", "HTTP 503"),
    ],
)
async def test_only_2xx_is_healthy(probe: HttpProbe, status: str, problem: str | None) -> None:
    async with listening(saying(f"HTTP/1.1 {status}\nLocation: /\nContent-Length: 0\n\n")) as port:
        for _ in range(3):
            assert await probe.problem("127.0.0.1", port, "/health?x=1") == problem


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (hang, "no answer within 0.2 s"),
        (drip, "no answer within 0.2 s"),
        (saying("nonsense\n\n"), "no answer that is HTTP"),
    ],
)
async def test_what_does_not_answer_well_is_not_healthy(
    probe: HttpProbe, answer: Answer, problem: str
) -> None:
    async with listening(answer) as port:
        assert await probe.problem("127.0.0.1", port, "/health?x=1") == problem


async def test_nobody_listens(probe: HttpProbe) -> None:
    assert await probe.problem("127.0.0.1", free_port(), "/health?x=1") == NOBODY_LISTENS
    assert await probe.problem("no such host.invalid", 80, "/health?x=1") is not None


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    probe = HttpProbe()
    async with listening(saying("HTTP/1.1 200 OK\nContent-Length: 0\n\n")) as port:
        assert await probe.problem("127.0.0.1", port, "/health?x=1") is None
    await probe.close()


async def test_ipv6(probe: HttpProbe) -> None:
    async with listening(saying("HTTP/1.1 200 OK\nContent-Length: 0\n\n"), "::1") as port:
        assert await probe.problem("::1", port, "/health?x=1") is None
