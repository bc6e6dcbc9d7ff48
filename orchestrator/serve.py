"""Runs the server in this process until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from orchestrator.app import Server
from orchestrator.core.errors import CatalogueError, OrchestratorError
from orchestrator.log_lines import set_up_logging
from orchestrator.one_write import OneWriteProtocol
from orchestrator.settings import Settings

log = structlog.get_logger(__name__)

GRACEFUL_S = 3
BACKLOG = 2048


class PortTaken(OrchestratorError):
    """Another program listens where we should."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises OrchestratorError for what keeps it from starting."""
    set_up_logging(settings.log_level)
    listener = listen(settings.host, settings.port)
    try:
        server = Server(settings)
    except BaseException:
        listener.close()
        raise
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run(server, listener))


def new_event_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


async def run(server: Server, listener: socket.socket) -> None:
    config = uvicorn.Config(
        server.build(),
        http=OneWriteProtocol,
        ws="websockets-sansio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACEFUL_S,
        timeout_keep_alive=75,
        log_config=None,
    )
    host, port = listener.getsockname()[:2]
    log.info(f"serving on http://{host}:{port}", docs=f"http://{host}:{port}/docs")
    reload_on_hangup(server)
    spare_the_collector()
    await QuietServer(config).serve(sockets=[listener])


class QuietServer(uvicorn.Server):
    """Ends with exit code 0 when it is told to end; a second SIGINT does not wait for streams."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def spare_the_collector() -> None:
    """What was imported and built lives for ever: looking through it again and again costs the gateway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def reload_on_hangup(server: Server) -> None:
    """SIGHUP reads the catalogue again; a bad one changes nothing and says so."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await server.reload_catalogue()
            log.info("catalogue read again")
        except CatalogueError:
            pass  # every error is in the log
        except OrchestratorError as error:
            log.error(f"the catalogue was not read again: {error.message}")

    def hang_up() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, hang_up)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken that says how to choose another port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"Port {port} on {host} is in use by another program. "
                "Choose another: `orchestrator serve --port 8001`, or port: in orchestrator.yaml."
            ) from None
        raise PortTaken(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
    listener.setblocking(False)
    return listener
