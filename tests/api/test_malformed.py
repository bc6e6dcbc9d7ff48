"""HTTP that is malformed, unfinished or in the wrong place: refused or given up, and nobody else notices."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from orchestrator.api.gateway import Gateway, Limits
from orchestrator.api.hostnames import Hostnames
from orchestrator.api.problems import problem_of
from orchestrator.core.entities import Model
from orchestrator.core.errors import EngineError
from tests.api.talk import (
    Answer,
    assert_unharmed,
    connection_to,
    oddity_service,
    open_files,
    parsed_answer,
    raw_bytes,
    raw_get,
    raw_request,
)
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

LIMIT_S = 4
MIB = 1024 * 1024
HOST = b"Host: localhost\r\n"
POST = b"POST /v1/mirror HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nConnection: close\r\n"
BODY = b'{"model": "odd"}'
SIZED = b"Content-Length: 16\r\n\r\n" + BODY
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"10\r\n" + BODY + b"\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "spool").mkdir()
    services = {"mimic": mimic_service(), "odd": oddity_service(folder / "marks")}
    models = {"alpha": {}, "odd": {"service": "odd"}}
    settings = {"request_limit": LIMIT_S, "spool_limit_mib": 8}
    env = {"TMPDIR": str(folder / "spool")}
    with running_server(folder, models, services, settings, env) as server:
        server.load("odd")
        yield server
        assert_unharmed(server, "odd", "alpha")


@pytest.fixture(autouse=True)
def nothing_was_loaded(server: RunningServer) -> Iterator[None]:
    assert raw_request(server, POST + SIZED).body == BODY  # also opens the connection to `odd`
    yield
    assert server.model("alpha")["state"] == "stopped"
    assert raw_request(server, POST + SIZED).body == BODY


# --- framing and headers


MALFORMED = {
    "chunk size is no number": POST + CHUNKED + b"\r\nzz\r\n" + BODY,
    "chunk size is negative": POST + CHUNKED + b"\r\n-5\r\n" + BODY,
    "chunk size overflows": POST + CHUNKED + b"\r\nffffffffffffffffff\r\n" + BODY,
    "chunk is longer than its size": POST + CHUNKED + b"\r\n3\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk lines end in LF": POST + CHUNKED + b"\r\n10\n" + BODY + b"\n0\n\n",
    "coding without chunks": POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "chunked and sized": POST + CHUNKED + b"Content-Length: 16\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "sized and chunked": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
    "two sizes": POST + b"Content-Length: 16\r\nContent-Length: 5\r\n\r\n" + BODY,
    "negative size": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "size in words": POST + b"Content-Length: many\r\n\r\n" + BODY,
    "size with a sign": POST + b"Content-Length: +16\r\n\r\n" + BODY,
    "size in hex": POST + b"Content-Length: 0x10\r\n\r\n" + BODY,
    "size overflows": POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    "folded header": POST + b"X-A: 1\r\n folded\r\n" + SIZED,
    "NUL in a header": POST + b"X-A: a\0b\r\n" + SIZED,
    "CR in a header": POST + b"X-A: a\rX-B: b\r\n" + SIZED,
    "LF in a header": POST + b"X-A: a\nX-B: b\r\n" + SIZED,
    "space before the colon": POST + b"X-A : 1\r\n" + SIZED,
    "no colon": POST + b"garbage\r\n" + SIZED,
    "no name": POST + b": v\r\n" + SIZED,
    "a name that is no token": POST + b"X(A): 1\r\n" + SIZED,
    "a name that is not ASCII": POST + b"X-\xe9: 1\r\n" + SIZED,
    "control characters": POST + b"X-A: a\x01\x7f\r\n" + SIZED,
    "unknown method": b"FROB /v1/mirror HTTP/1.1\r\n" + HOST + b"\r\n",
    "method in lower case": b"get /models HTTP/1.1\r\n" + HOST + b"\r\n",
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"GET /models HTTP/3.0\r\n" + HOST + b"\r\n",
    "no target": b"GET HTTP/1.1\r\n" + HOST + b"\r\n",
    "target without a slash": b"GET models HTTP/1.1\r\n" + HOST + b"\r\n",
    "target with a space": b"GET /models x HTTP/1.1\r\n" + HOST + b"\r\n",
    "target with bytes above ASCII": b"GET /upstream/odd/\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tunnel": b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_http_is_refused_once_and_closed(server: RunningServer, data: bytes) -> None:
    """One 400 and the end: what stands behind it must not be read as a request of its own."""
    received = raw_bytes(server, data)
    assert received.count(b"HTTP/1.1 ") == 1
    assert parsed_answer(received).status == 400


def test_what_stands_behind_a_body_is_no_second_request(server: RunningServer) -> None:
    """Both ends must agree where a body ends, or one client's bytes become another's request."""
    hidden = b"GET /upstream/odd/hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
    received = raw_bytes(server, POST + SIZED + hidden)
    assert received.count(b"HTTP/1.1 ") == 1
    assert parsed_answer(received).body == BODY
    assert b"hidden" not in received


@pytest.mark.parametrize("path", ["/models", "/upstream/odd/echo?x=1", "/v1/files?model=odd", "/nope"])
def test_a_whole_url_as_target_means_its_path(server: RunningServer, path: str) -> None:
    whole, short = raw_get(server, "http://localhost" + path), raw_get(server, path)
    assert (whole.status, whole.body) == (short.status, short.body)


@pytest.mark.parametrize("origin", [b"http://[::1", b"//[", b"http://[v1.a", b"\xff", b"http://", b"x"])
@pytest.mark.parametrize("path", [b"/models/unload", b"/v1/mirror", b"/nope"])
def test_an_origin_that_is_none_is_another_site(server: RunningServer, path: bytes, origin: bytes) -> None:
    head = b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Origin: " + origin + b"\r\nConnection: close\r\n"
    answer = raw_request(server, head + SIZED)
    assert answer.status == 403
    assert answer.json()["error"]["code"] == "cross_site_refused"


# --- forms that end too early


MODEL_PART = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
CUT_FORMS = {
    "in the header": b'--b\r\nContent-Disposition: form-data; name="mod',
    "in the value": MODEL_PART + b"od",
    "after the value": MODEL_PART + b"odd\r\n",
    "in the delimiter": MODEL_PART + b"odd\r\n--",
    "at the first delimiter": b"--b",
    "before any part": b"\r\n",
    "delimiters only": b"--b" * 2000,
    "a header without an end": MODEL_PART[:-4] + b"; x=" + b"y" * 8000 + b"\r\n\r\nodd\r\n--b--\r\n",
}


@pytest.mark.parametrize("form", CUT_FORMS.values(), ids=CUT_FORMS)
def test_a_cut_form_names_no_model(server: RunningServer, form: bytes) -> None:
    head = (
        b"POST /v1/mirror HTTP/1.1\r\n" + HOST + b"Connection: close\r\nContent-Type: multipart/form-data; "
    )
    answer = raw_request(server, head + b"boundary=b\r\nContent-Length: %d\r\n\r\n" % len(form) + form)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "model"


# --- WebSockets where there are none


HANDSHAKE = ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
NO_SOCKETS = [
    "/",
    "/docs",
    "/events",
    "/models",
    "/models/sse",
    "/nope",
    "/state",
    "/v1/chat/completions",
    "/v1/x?model=alpha",
    "/completion?model=alpha",
    "/upstream/",
    "/upstream/%ff/x",
    "/upstream/nope/ws",
    "/upstream/odd/no-socket",
]


def shake_hands(server: RunningServer, target: str) -> Answer:
    host = "Host: " + server.url.removeprefix("http://")
    lines = [f"GET {target} HTTP/1.1", host, "Connection: Upgrade", *HANDSHAKE, "", ""]
    return raw_request(server, "\r\n".join(lines).encode())


@pytest.mark.parametrize("target", NO_SOCKETS)
def test_a_socket_where_there_is_none_is_refused(server: RunningServer, target: str) -> None:
    assert shake_hands(server, target).status == 403


# --- bodies and streams that do not end


UNFINISHED = {
    "size": POST + b"Content-Length: 17\r\n\r\n" + BODY,
    "chunk": POST + CHUNKED + b"\r\nff\r\n" + BODY,
    "last chunk": POST + CHUNKED + b"\r\n" + CHUNK,
    "no body": POST + b"Content-Length: 16\r\n\r\n",
    "api": b"POST /models/unload HTTP/1.1\r\n"
    + HOST
    + b"Connection: close\r\nContent-Length: 99\r\n\r\n"
    + BODY,
    "spooled": POST + b"Content-Length: 9999999\r\n\r\n" + b"x" * MIB,
}


def spooled(server: RunningServer) -> list[Path]:
    spool = str(server.folder / "spool")
    links = Path(f"/proc/{server.pid}/fd").iterdir()
    found = []
    for link in links:
        with contextlib.suppress(FileNotFoundError):
            if spool in str(link.readlink()):
                found.append(link)
    return found


def received_from(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_bodies_that_do_not_end_are_given_up(server: RunningServer) -> None:
    """Others are answered meanwhile; what they held of the disk is free for the next."""
    before = open_files(server)
    with ExitStack() as stack:
        waiting = []
        for data in [*UNFINISHED.values()] * 4:
            connection = stack.enter_context(connection_to(server))
            connection.sendall(data)
            waiting.append(connection)
        eventually(lambda: len(spooled(server)) == 4)
        assert raw_request(server, POST + SIZED).body == BODY
        answers = [parsed_answer(received_from(connection)) for connection in waiting]
    assert {answer.status for answer in answers} == {408}
    errors = [answer.json()["error"] for answer in answers]
    assert {error["code"] for error in errors} == {"body_too_slow"}
    assert all("request_limit" in error["message"] for error in errors)
    eventually(lambda: not spooled(server) and open_files(server) <= before, timeout_s=20)


@pytest.mark.parametrize("data", UNFINISHED.values(), ids=UNFINISHED)
def test_clients_that_leave_in_a_body_leave_nothing(server: RunningServer, data: bytes) -> None:
    before = open_files(server)
    for _ in range(10):
        with connection_to(server) as connection:
            connection.sendall(data)
    eventually(lambda: not spooled(server) and open_files(server) <= before, timeout_s=20)


@pytest.mark.parametrize("path", ["/events", "/models/sse"])
def test_streams_that_are_cut_leave_nothing(server: RunningServer, path: str) -> None:
    before = open_files(server)
    for _ in range(20):
        with httpx.stream("GET", server.url + path, timeout=20, trust_env=False) as answer:
            assert answer.status_code == 200
            assert next(answer.iter_raw())
    eventually(lambda: open_files(server) <= before, timeout_s=20)


def test_who_follows_a_log_that_stays_empty_is_answered(server: RunningServer) -> None:
    """`odd` prints nothing; whoever follows it sees that the call was taken, and may leave."""
    before = open_files(server)
    with httpx.stream("GET", server.url + "/logs/odd?follow=1", timeout=20, trust_env=False) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
    eventually(lambda: open_files(server) <= before, timeout_s=20)


@pytest.mark.parametrize("attempt", ["", "..", "%2e%2e%2fx", "%2fetc", "%00", "a%20b", "x" * 65])
def test_an_attempt_is_no_path(server: RunningServer, attempt: str) -> None:
    answer = raw_get(server, f"/logs/odd?attempt={attempt}")
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "attempt"


def test_a_byte_at_a_time_is_still_a_request(server: RunningServer) -> None:
    with connection_to(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(POST + SIZED)):
            connection.sendall((POST + SIZED)[at : at + 1])
        assert parsed_answer(received_from(connection)).body == BODY


# --- what should not happen has the one shape too


async def test_a_bug_in_the_gateway_is_told_in_the_one_shape() -> None:
    def resolve(name: str) -> Model:
        raise RuntimeError("planted")

    limits = Limits(body_bytes=MIB, spool_bytes=MIB, request_s=60)
    gateway = Gateway(None, Hostnames(None, dict), resolve, limits)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/v1/completions", json={"model": "alpha"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "planted" not in answer.text


def test_an_engine_that_refuses_is_no_bug_of_ours() -> None:
    told = problem_of(EngineError("The engine said no."))
    assert (told.status, told.code) == (503, "engine_error")
