"""How the tests of the API speak to the server: plain HTTP, raw bytes, event streams."""

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.server import RunningServer
from tests.support import eventually

T = TypeVar("T")
ODDITY = Path(__file__).with_name("oddity.py")


def oddity_service(marks: Path, **more: Any) -> dict[str, Any]:
    """A service.yaml for oddity.py."""
    marks.mkdir(parents=True, exist_ok=True)
    return {
        "command": [sys.executable, str(ODDITY)],
        "environment": {"ODDITY_MARKS": str(marks)},
        "health": {"path": "/health", "start_timeout": "20s"},
        "memory": "declared",
        "stop_grace": "2s",
    } | more


@contextmanager
def http_client(
    server: RunningServer, timeout_s: float = 30.0, key: str | None = None
) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.url, timeout=timeout_s, trust_env=False, headers=headers) as http:
        yield http


def problem(response: httpx.Response, status: int, code: object = None) -> dict[str, Any]:
    """The answer's error, after checking that it has the one shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "code", "param"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    return error


def address_of(server: RunningServer, model: str) -> str:
    """Where the model's instance itself listens."""
    address: str = server.model(model)["instance"]["address"]
    return address


# --- raw bytes, for what no client library would send


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def raw_bytes(server: RunningServer, data: bytes) -> bytes:
    """Send these bytes on a connection of its own, and return all that comes until the server closes it.

    Raises TimeoutError if nothing comes for 20 s.
    """
    received = b""
    with connection_to(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        while chunk := connection.recv(65536):
            received += chunk
    return received


def connection_to(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def raw_request(server: RunningServer, data: bytes) -> Answer:
    """Send these bytes on a connection of its own, and read until the server closes it."""
    return parsed_answer(raw_bytes(server, data))


def parsed_answer(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answer(int(first.split()[1]), headers, body)


def unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            break
        found, data = found + rest[:length], rest[length + 2 :]
    return found


def raw_get(server: RunningServer, target: str, *headers: str, method: str = "GET") -> Answer:
    """A request with exactly this target; the Host header is the server's own unless given."""
    given = list(headers)
    if not any(line.lower().startswith("host:") for line in given):
        given.insert(0, "Host: " + server.url.removeprefix("http://"))
    lines = [f"{method} {target} HTTP/1.1", *given, "Connection: close", "", ""]
    return raw_request(server, "\r\n".join(lines).encode("latin-1"))


# --- afterwards


def assert_unharmed(server: RunningServer, *models: str) -> None:
    """It is ready, nobody waits or is counted, its loop turns (it loads and unloads these), and no bug
    was logged."""
    assert server.is_running
    with http_client(server, key=server.key) as http:
        assert http.get("/readyz").status_code == 200
        eventually(lambda: is_quiet(http), timeout_s=30)
        for name in models:
            loaded = http.post("/models/load", json={"model": name, "wait": True})
            assert loaded.status_code == 200, loaded.text
            gone = http.post("/models/unload", json={"model": name})
            assert gone.status_code == 200, gone.text
    assert "Traceback" not in server.log()


def is_quiet(http: httpx.Client) -> bool:
    state = http.get("/state").json()
    return not state["queue"] and all(instance["in_flight"] == 0 for instance in state["instances"])


def open_files(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


# --- event streams


@dataclass
class Event:
    """One server-sent event; a comment has only `comment`."""

    data: str = ""
    name: str | None = None
    id: str | None = None
    comment: str | None = None
    lines: list[str] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.data)


def events(response: httpx.Response) -> Iterator[Event]:
    """Events and comments as they come."""
    lines: list[str] = []
    for line in response.iter_lines():
        if line:
            lines.append(line)
        elif lines:
            yield parsed(lines)
            lines = []


def parsed(lines: list[str]) -> Event:
    event = Event(lines=list(lines))
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                event.comment = value
            case "data":
                event.data += value
            case "event":
                event.name = value
            case "id":
                event.id = value
    return event


class Watcher:
    """Everything an event stream has said so far; `wait` for what it has yet to say."""

    def __init__(self, server: RunningServer, path: str, last_id: str | None = None) -> None:
        self.events: list[Event] = []
        self._server = server
        self._path = path
        self._headers = {"Last-Event-ID": last_id} if last_id else {}
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        assert self._is_open.wait(10), "the stream did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it may have been closed by the server
            self._response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _watch(self) -> None:
        try:
            with (
                http_client(self._server) as http,
                http.stream("GET", self._path, headers=self._headers) as self._response,
            ):
                for event in events(self._response):
                    if event.comment is None:
                        self.events.append(event)
                    self._is_open.set()
        except (httpx.HTTPError, httpx.StreamError, OSError):
            pass  # closed, by us or by the server

    def wait(self, claim: Callable[[list[Event]], T]) -> T:
        """The claim's answer about all events so far, once it is true."""
        return eventually(lambda: claim(list(self.events)), timeout_s=20)
